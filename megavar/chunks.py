"""Results of fixed chunks of an index space: the unit of work, of resuming, and of distribution over ranks.

Chunk c covers images ``[c * size, min((c + 1) * size, count))``, whatever the number of ranks. Each chunk is one file
that is whole or absent, and a reduction reads the files in chunk order: any assignment of chunks to ranks, and any
number of interruptions, give the same bytes in the end. So ranks divide what is missing, which keeps all of them busy
when work goes on with another number of ranks. Every file names the work that it belongs to: one of another model that
got into the directory is no result.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megavar.errors import DataError, MegavarError
from megavar.parallel.environment import Environment
from megavar.storage import remove_leftovers, write_bytes_atomic, write_json_atomic

MANIFEST = "manifest.json"
FORMAT = 2
"""1, without that key in the manifest: files do not name their work."""
_INDEX, _WORK = "index", "work"


@dataclass(frozen=True)
class ChunkStore:
    """A directory of ``chunk_000000.npz`` files for ``count`` images in chunks of ``size``."""

    directory: Path
    count: int
    size: int
    work: str
    """Hash of the manifest: the same for the same work, wherever it is done."""
    format: int = FORMAT

    @classmethod
    def _of(cls, directory: Path, manifest: Mapping[str, Any]) -> ChunkStore:
        described = json.dumps({key: value for key, value in manifest.items() if key != "format"}, sort_keys=True)
        work = hashlib.sha256(described.encode()).hexdigest()
        return cls(directory, int(manifest["count"]), int(manifest["chunk_size"]), work, int(manifest.get("format", 1)))

    @classmethod
    def open(cls, directory: Path, *, count: int, size: int, identity: Mapping[str, Any]) -> ChunkStore:
        """Open or create a store for one piece of work, described by ``identity`` (plain JSON values).

        Every rank may call this: the manifest has the same content from all of them.

        Raises:
            DataError: the directory holds chunks of other work.
        """
        if count < 1 or size < 1:
            raise DataError(f"there is nothing to do for {count} images in chunks of {size}: name at least one image")
        manifest = json.loads(json.dumps({"count": count, "chunk_size": size, **identity, "format": FORMAT}))
        path = directory / MANIFEST
        remove_leftovers(directory)
        try:
            present = _read_manifest(path)
        except FileNotFoundError:
            write_json_atomic(path, manifest)
            return cls._of(directory, manifest)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not readable ({error}): delete the directory to start again") from error
        differing = sorted(
            key for key in {*present, *manifest} - {"format"} if present.get(key) != manifest.get(key)
        )
        if differing:
            key = differing[0]
            raise DataError(
                f"{directory} holds the chunks of other work: {key} is {present.get(key)!r} there and "
                f"{manifest.get(key)!r} here. Use another directory, or delete it to start again."
            )
        return cls._of(directory, present)

    @classmethod
    def existing(cls, directory: Path) -> ChunkStore:
        """The store that ``directory`` holds.

        Raises:
            DataError: it holds none.
        """
        directory = Path(directory)
        try:
            return cls._of(directory, _read_manifest(directory / MANIFEST))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{directory} is not a directory of chunks: its {MANIFEST} is missing or unreadable ({error})"
            ) from error

    def manifest(self) -> dict[str, Any]:
        """Count, chunk size and identity of the work."""
        content = _read_manifest(self.directory / MANIFEST)
        return {key: value for key, value in content.items() if key != "format"}

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def range(self, chunk: int) -> tuple[int, int]:
        """First and one past the last image index of ``chunk``; the last chunk is simply shorter."""
        return chunk * self.size, min((chunk + 1) * self.size, self.count)

    def path(self, chunk: int) -> Path:
        """The file of ``chunk``."""
        return self.directory / f"chunk_{chunk:06d}.npz"

    def missing(self) -> list[int]:
        """Chunks that have no file yet."""
        return [chunk for chunk in range(len(self)) if not self.path(chunk).exists()]

    def write(self, chunk: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Store the results of ``chunk``: arrays whose first axis are its images."""
        first, last = self.range(chunk)
        wrong = [name for name, array in arrays.items() if len(array) != last - first]
        assert not wrong, f"{wrong} have another length than chunk {chunk} with {last - first} images"
        buffer = io.BytesIO()
        described: dict[str, Any] = {_INDEX: np.arange(first, last), _WORK: np.array(self.work)}
        np.savez(buffer, allow_pickle=False, **described, **arrays)
        write_bytes_atomic(self.path(chunk), buffer.getvalue())

    def names(self, chunk: int) -> set[str]:
        """Names of the arrays in the file of ``chunk``."""
        with self._open(chunk) as file:
            return set(file.files) - {_INDEX, _WORK}

    def read(self, chunk: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """The results of ``chunk``, or those of its arrays that ``names`` asks for.

        Raises:
            DataError: the file is absent, damaged, or of other images or other work.
        """
        first, last = self.range(chunk)
        with self._open(chunk) as file:
            index = file[_INDEX] if _INDEX in file.files else np.empty(0)
            work = str(file[_WORK]) if _WORK in file.files else None
            wanted = [name for name in file.files if name not in (_INDEX, _WORK) and (names is None or name in names)]
            arrays = {name: file[name] for name in wanted}
        if work != self.work and not (work is None and self.format < FORMAT):
            raise DataError(
                f"{self.path(chunk)} belongs to other work (another model, or other settings) than {MANIFEST} beside "
                f"it describes: delete it and run the same command again"
            )
        if not np.array_equal(index, np.arange(first, last)):
            raise DataError(
                f"{self.path(chunk)} does not hold images {first} to {last - 1}: delete it and run the same command "
                f"again"
            )
        short = [name for name, array in arrays.items() if array.shape[:1] != (last - first,)]
        if short:
            raise DataError(
                f"{self.path(chunk)} does not hold {short[0]} of {last - first} images: delete it and run the same "
                f"command again"
            )
        return arrays

    def read_all(self, names: Collection[str] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The results of all chunks, in order."""
        for chunk in range(len(self)):
            yield self.read(chunk, names)

    @contextmanager
    def _open(self, chunk: int) -> Iterator[Any]:
        path = self.path(chunk)
        try:
            with np.load(path, allow_pickle=False) as file:
                yield file
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing: run the same command again to make it") from error
        except MegavarError:
            raise
        except Exception as error:  # zipfile and numpy raise almost anything about a damaged file
            raise DataError(f"{path} is damaged ({error}): delete it and run the same command again") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_text())
    if not isinstance(manifest, dict) or min(int(manifest["count"]), int(manifest["chunk_size"])) < 1:
        raise ValueError("it does not say how many images there are")
    return manifest


def share(chunks: list[int], place: Environment) -> list[int]:
    """This rank's part of ``chunks``. Collective: rank 0's list counts, whatever the others saw of the file system."""
    agreed = [chunks]
    if place.world_size > 1:
        dist.broadcast_object_list(agreed, src=0)
    return agreed[0][place.rank :: place.world_size]
