"""From (epoch, index) to a batch: read, decode, transform, stack.

A sample that cannot be read or decoded is never dropped quietly. Under the policy ``fail`` the run ends and names it.
Under ``skip-and-count`` another sample stands in for it, so that every rank keeps its number of samples and steps: the
stand-in is a function of (seed, epoch, index), both are named in the log, and ``Batch.replaced`` marks the place.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megavar.data.batch import Batch
from megavar.data.source import DamagedSampleError, Sample, Source, UnreadableSampleError
from megavar.data.text import TextEncoder
from megavar.data.transforms import Transform, Unchanged, choose, decode
from megavar.errors import DataAccessError, DataError
from megavar.parallel.seeds import random_bits, uniform

STAND_IN_ATTEMPTS = 8
REMEDY = (
    "Repair the data (tools/verify_shards.py --repair for shards), or set data.damaged_samples=skip-and-count to go on "
    "without it."
)
DamagePolicy = Literal["fail", "skip-and-count"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A sample ready to be stacked."""

    sample: Sample
    index: int
    epoch: int
    content: np.ndarray
    """The transformed image, uint8 [H, W, 3], or the chosen view of tokens [L] or latents [C, h, w]."""
    replaced: bool = False
    features: np.ndarray | None = None
    """float16 [N, D]: a teacher's features of the chosen view."""


class Preparation:
    """Decodes and transforms samples, or chooses a view of cached ones, as (seed, epoch, index) say.

    The first random number chooses the view of a cached sample, as it does in the ten-crop transform: training from
    images and from a cache of their ten crops is the same.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform = transform
        self.seed = seed

    def __call__(
        self, sample: Sample, epoch: int, index: int, draws: Callable[[], Sequence[float]] | None = None
    ) -> Prepared:
        """Prepare ``sample``, which is sample ``index`` of its source.

        Args:
            draws: gives the sample's row of :meth:`draws` where it is known already.

        Raises:
            DamagedSampleError: the image cannot be decoded.
        """
        if draws is None:
            draws = functools.partial(self._draws_of, epoch, index)
        for views in (sample.tokens, sample.latents):
            if views is not None:
                chosen = choose(draws()[0], len(views))
                features = None if sample.features is None else sample.features[chosen]
                return Prepared(sample, index, epoch, views[chosen], features=features)
        assert sample.image is not None
        if isinstance(sample.image, np.ndarray) and self._passes(sample.image):
            return Prepared(sample, index, epoch, sample.image)
        try:
            image = decode(sample.image)
        except DamagedSampleError as error:
            raise DamagedSampleError(f"{sample.key}: {error}") from error
        numbers = draws() if self.transform.draws else ()
        return Prepared(sample, index, epoch, np.asarray(self.transform(image, numbers)))

    def _passes(self, image: np.ndarray) -> bool:
        size = self.transform.size
        return isinstance(self.transform, Unchanged) and image.shape == (size, size, 3)

    def draws(self, epochs: Tensor, indices: Tensor) -> list[list[float]]:
        """Uniform random numbers in [0, 1) for B samples: one row each, as many as the transform uses, at least one."""
        count = max(1, self.transform.draws)
        return uniform(self.seed, "augmentation", epochs[:, None], indices[:, None], torch.arange(count)).tolist()

    def _draws_of(self, epoch: int, index: int) -> Sequence[float]:
        return self.draws(torch.tensor([epoch]), torch.tensor([index]))[0]


class SampleReader:
    """Reads samples of a source, transformed, as batches with uint8 images."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        seed: int,
        damaged: DamagePolicy = "fail",
        text: TextEncoder | None = None,
    ) -> None:
        """Read from ``source``; captions are encoded by ``text``, if there is one."""
        self.source = source
        self.text = text
        self.prepare = Preparation(transform, seed)
        self.seed = seed
        self.damaged = damaged

    def read(self, epochs: Tensor, indices: Tensor) -> Batch:
        """Read B samples.

        Args:
            epochs: int64 [B], selects the augmentation.
            indices: int64 [B].

        Returns:
            a batch whose images, if any, are uint8 [B, 3, H, W].
        """
        table = functools.cache(lambda: self.prepare.draws(epochs, indices))  # for all at once: much faster

        def of_row(row: int) -> Callable[[], Sequence[float]]:
            return lambda: table()[row]

        places = enumerate(zip(epochs.tolist(), indices.tolist()))
        return stack([self._read(epoch, index, of_row(row)) for row, (epoch, index) in places], self.text)

    def _read(self, epoch: int, index: int, draws: Callable[[], Sequence[float]]) -> Prepared:
        try:
            return self._load(epoch, index, draws)
        except DamagedSampleError as error:
            name = f"Sample {index} of {self.source.fingerprint} is damaged: {error}"
            kind = DataAccessError if isinstance(error, UnreadableSampleError) else DataError
        if self.damaged == "fail":
            raise kind(f"{name}. {REMEDY}")
        for attempt in range(STAND_IN_ATTEMPTS):
            stand_in = int(random_bits(self.seed, "stand_in", epoch, index, attempt) % len(self.source))
            try:
                found = self._load(epoch, stand_in)
            except DamagedSampleError:
                continue
            log.warning("%s. Sample %d (%s) stands in for it in epoch %d.", name, stand_in, found.sample.key, epoch)
            return replace(found, replaced=True)
        raise kind(
            f"{name}, and so are {STAND_IN_ATTEMPTS} others that were tried in its place. This source is damaged "
            f"throughout: check that its storage is mounted, and verify it."
        )

    def _load(self, epoch: int, index: int, draws: Callable[[], Sequence[float]] | None = None) -> Prepared:
        try:
            sample = self.source.read(index)
        except OSError as error:
            raise UnreadableSampleError(f"it cannot be read ({error})") from error
        return self.prepare(sample, epoch, index, draws)


def stack(prepared: list[Prepared], text: TextEncoder | None = None) -> Batch:
    """Stack samples; images stay uint8, captions are encoded by ``text``."""
    samples = [item.sample for item in prepared]
    content = torch.from_numpy(np.stack([item.content for item in prepared]))
    captions = [sample.caption for sample in samples]
    encoded = None if text is None else text.encode([caption or "" for caption in captions])
    features = [item.features for item in prepared if item.features is not None]
    return Batch(
        images=content.permute(0, 3, 1, 2).contiguous() if samples[0].image is not None else None,
        labels=torch.tensor([sample.label for sample in samples]),
        sample_ids=torch.tensor([item.index for item in prepared]),
        epochs=torch.tensor([item.epoch for item in prepared]),
        tokens=content.to(torch.int64) if samples[0].tokens is not None else None,
        latents=content.to(torch.float32) if samples[0].latents is not None else None,
        features=torch.from_numpy(np.stack(features)).to(torch.float32) if features else None,
        captions=tuple(c or "" for c in captions) if any(c is not None for c in captions) else None,
        text_ids=None if encoded is None else encoded.ids,
        text_mask=None if encoded is None else encoded.mask,
        replaced=torch.tensor([item.replaced for item in prepared]),
    )


def stored_images(
    source: Source, transform: Transform, indices: Sequence[int] | None = None, damaged: DamagePolicy = "fail"
) -> tuple[Tensor, Tensor]:
    """Read images of a source for evaluation, in the order of ``indices`` (default: all).

    Args:
        damaged: what a damaged sample means; scores take nothing but ``fail``.

    Returns:
        uint8 [N, 3, H, W] and labels int64 [N].
    """
    chosen = torch.arange(len(source)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
    batch = SampleReader(source, transform, seed=0, damaged=damaged).read(torch.zeros_like(chosen), chosen)
    return batch.require_images(), batch.labels
