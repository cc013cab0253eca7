"""A set of samples on disk: drawn chunk by chunk when they are first asked for, read or decoded again afterwards.

A chunk holds tokens and conditions always, images only where they are kept. Chunks are never merged or split, because
kernels may round differently in batches of another size: decoded again, a chunk's images are the drawn ones.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megavar.chunks import ChunkStore, share
from megavar.errors import DataError
from megavar.parallel.environment import Environment
from megavar.sampling.sampler import Sampler

Decoder = Callable[[np.ndarray], Tensor]
"""Tokens [B, L] as a chunk holds them to images, uint8 [B, 3, H, W] on the CPU: the sampler's own, bit for bit, where
the batch, the device and the library versions are the same."""


class Samples:
    """The images of a sampler in index order (an ``ImageSet``).

    Reading images that have not been drawn draws them; so features can be taken from images that are never stored.
    """

    def __init__(
        self, store: ChunkStore, decode: Decoder | None, *, sampler: Sampler | None = None, keep_images: int = 0
    ) -> None:
        """Wrap ``store``.

        Args:
            decode: from stored tokens to images; None if all images are stored.
            sampler: draws what is missing; None if nothing is.
            keep_images: images of this many samples are stored, rounded up to whole chunks.
        """
        self.store = store
        self.chunk_size = store.size
        self.identity: dict[str, Any] = {"kind": "samples", **store.manifest()}
        self.notes: list[str] = []
        self._decode = decode
        self._sampler = sampler
        self._keep_images = keep_images
        self._latest: tuple[int, Tensor] | None = None

    @classmethod
    def stored(cls, directory: Path, decode: Decoder | None = None) -> "Samples":
        """Finished samples, read only.

        Raises:
            DataError: ``directory`` holds no samples, or only a part of them.
        """
        store = ChunkStore.existing(directory)
        missing = store.missing()
        if missing:
            raise DataError(
                f"{len(missing)} of {len(store)} chunks are missing in {directory}, the first is "
                f"{store.path(missing[0]).name}: finish sampling first"
            )
        return cls(store, decode)

    @property
    def directory(self) -> Path:
        """Where the chunks are."""
        return self.store.directory

    @functools.cached_property
    def labels(self) -> Tensor | None:
        """Classes int64 [N] of all samples, which must have been drawn; None if they were not asked for by class."""
        if "labels" not in self.store.names(0):
            return None
        return torch.cat([torch.from_numpy(arrays["labels"]) for arrays in self.store.read_all(["labels"])])

    def captions(self, count: int) -> list[str] | None:
        """What the first ``count`` samples, which must have been drawn, were asked for; None if not by text."""
        if "captions" not in self.store.names(0):
            return None
        chunks = range(min(len(self.store), -(-count // self.store.size)))
        found = [str(text) for chunk in chunks for text in self.store.read(chunk, ["captions"])["captions"]]
        return found[:count]

    def __len__(self) -> int:
        return self.store.count

    def read(self, first: int, last: int) -> Tensor:
        """Images ``first`` to ``last - 1``: uint8 [n, 3, H, W]."""
        size = self.store.size
        parts = []
        for chunk in range(first // size, -(-last // size)):
            start = self.store.range(chunk)[0]
            parts.append(self._images(chunk)[max(first - start, 0) : last - start])
        return torch.cat(parts)

    def fill(self, place: Environment) -> None:
        """Draw the samples that are missing, and store the images that are to be kept. Collective; rank 0 shows a bar.

        When it returns, all chunks are complete.
        """
        mine = share([chunk for chunk in range(len(self.store)) if not self._complete(chunk)], place)
        # disable=None: a bar on terminals only
        for chunk in tqdm(mine, desc="sampling", unit="chunk", disable=True if place.rank or not mine else None):
            if self.store.path(chunk).exists():
                stored = self.store.read(chunk)
                self.store.write(chunk, {**stored, "images": self._images(chunk).numpy()})
            else:
                self._draw(chunk)
        if dist.is_initialized():
            dist.barrier()

    def _images(self, chunk: int) -> Tensor:
        """All images of ``chunk``; those of the latest one are held, so that it is not decoded once per range."""
        if self._latest is None or self._latest[0] != chunk:
            self._latest = chunk, self._read(chunk) if self.store.path(chunk).exists() else self._draw(chunk)
        return self._latest[1]

    def _read(self, chunk: int) -> Tensor:
        arrays = self.store.read(chunk, ["images", "tokens"])
        if "images" in arrays:
            return torch.from_numpy(arrays["images"])
        if self._decode is None or "tokens" not in arrays:
            raise DataError(
                f"{self.store.path(chunk)} holds no images, only {', '.join(sorted(self.store.names(chunk)))}, and "
                f"nothing here decodes them: sample with sampling.keep_images={self.store.count}"
            )
        return self._decode(arrays["tokens"])

    def _draw(self, chunk: int) -> Tensor:
        if self._sampler is None:
            raise DataError(f"{self.store.path(chunk)} is missing: finish sampling first")
        first, last = self.store.range(chunk)
        drawn = self._sampler.draw(torch.arange(first, last))
        kept = {"images": drawn.images.numpy()} if self._kept(chunk) else {}
        self.store.write(chunk, drawn.arrays | kept)
        return drawn.images

    def _kept(self, chunk: int) -> bool:
        return self.store.range(chunk)[0] < self._keep_images

    def _complete(self, chunk: int) -> bool:
        return self.store.path(chunk).exists() and (not self._kept(chunk) or "images" in self.store.names(chunk))
