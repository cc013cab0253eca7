"""Where images to be scored come from: an npz file, a folder of PNGs, chunks of a sampler, or a data source."""

from __future__ import annotations

import hashlib
import math
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megavar.chunks import MANIFEST
from megavar.data.reading import stored_images
from megavar.data.shards.index import CLASSES
from megavar.data.skipping import is_no_data
from megavar.data.source import DamagedSampleError, Source, content_fingerprint
from megavar.data.transforms import Transform, decode, size_of
from megavar.errors import DataError
from megavar.storage import sha256_of_file

CHUNK_SIZE = 64
THREADS = 8
"""That read files."""


class ImageSet(Protocol):
    """Images in a fixed order, read in ranges."""

    identity: dict[str, Any]
    """What the images are, for manifests and result files: plain JSON values."""
    chunk_size: int
    """How many images are read, and go through a network, together."""
    notes: list[str]
    """What should be said beside numbers made from these images."""

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], or None if unknown."""
        ...

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> Tensor:
        """Images ``first`` to ``last - 1``: uint8 [n, 3, H, W]."""
        ...


class NpzImages:
    """``arr_0`` uint8 [N, H, W, 3] (and optionally ``arr_1`` labels) of an npz file, as ADM's scripts write it.

    An uncompressed member is mapped into memory rather than loaded: 50,000 images are 10 GB at 256 pixels.
    """

    chunk_size = CHUNK_SIZE

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        self._images = _npz_member(self.path, "arr_0")
        if self._images.dtype != np.uint8 or self._images.ndim != 4 or self._images.shape[-1] != 3:
            raise DataError(
                f"arr_0 of {path} is {self._images.dtype} {list(self._images.shape)}, but images are uint8 "
                f"[N, H, W, 3]: write it as ADM's scripts do, channels last, values 0..255"
            )
        self.labels: Tensor | None = _npz_labels(self.path, len(self._images))
        self.identity: dict[str, Any] = {"kind": "npz", "path": str(path), "sha256": sha256_of_file(self.path)}

    def __len__(self) -> int:
        return len(self._images)

    def read(self, first: int, last: int) -> Tensor:
        """Images ``first`` to ``last - 1``: uint8 [n, 3, H, W]."""
        return torch.from_numpy(np.array(self._images[first:last])).permute(0, 3, 1, 2).contiguous()


class PngFolder:
    """The PNG files directly in a folder, ordered by the numbers in their names (never by the file system).

    They are read once when the folder is opened: its identity is the content, because pictures that are drawn anew
    under the same names must not be scored by the features of the old ones.
    """

    chunk_size = CHUNK_SIZE

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"the image folder {path} does not exist: name a folder of PNG files")
        files = [file for file in path.iterdir() if file.is_file() and not is_no_data(file.name)]
        self._files = sorted((f for f in files if f.suffix.lower() == ".png"), key=_natural_key)
        lossy = [f for f in files if f.suffix.lower() in (".jpg", ".jpeg", ".webp")]
        if not self._files:
            hint = f" ({len(lossy)} JPEG or WebP files are there: compression changes FID)" if lossy else ""
            raise DataError(f"the image folder {path} holds no PNG files{hint}: write samples as PNG")
        self.labels: Tensor | None = None
        self.notes = [f"{len(lossy)} JPEG or WebP files beside the PNG files were not scored"] if lossy else []
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(_facts, self._files))
        self.size = self._one_size(path, [size for size, _ in found])
        listing = "".join(f"{file.name}\t{digest}\n" for file, (_, digest) in zip(self._files, found))
        self.identity: dict[str, Any] = {
            "kind": "folder",
            "path": str(path),
            "content_sha256": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
        }

    def _one_size(self, path: Path, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Width and height of all images."""
        counted = Counter(sizes)
        if len(counted) > 1:
            (usual, most), (other, fewer) = counted.most_common()[0], counted.most_common()[-1]
            example = self._files[sizes.index(other)].name
            raise DataError(
                f"{path} holds images of {len(counted)} sizes: {most} of {usual[0]}x{usual[1]} pixels, but {fewer} of "
                f"{other[0]}x{other[1]}, for example {example}. Scores compare images of one size: remove what does "
                f"not belong there, or write all samples in one size."
            )
        return sizes[0]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, first: int, last: int) -> Tensor:
        """Images ``first`` to ``last - 1``: uint8 [n, 3, H, W]."""
        return torch.stack([self._read(file) for file in self._files[first:last]])

    @staticmethod
    def _read(file: Path) -> Tensor:
        """As training decodes it: uint8 [3, H, W]."""
        try:
            return torch.from_numpy(np.array(decode(file.read_bytes()))).permute(2, 0, 1)
        except (OSError, DamagedSampleError) as error:
            raise DataError(f"{file} cannot be decoded ({error}): write it again or delete it") from error


def _facts(file: Path) -> tuple[tuple[int, int], str]:
    """Width and height as the header says, and the hash of the content."""
    try:
        content = file.read_bytes()
        return size_of(content), hashlib.sha256(content).hexdigest()
    except (OSError, DamagedSampleError) as error:
        raise DataError(f"{file} cannot be decoded ({error}): write it again or delete it") from error


class SourceImages:
    """The samples of a data source through a deterministic transform."""

    chunk_size = CHUNK_SIZE

    def __init__(self, source: Source, transform: Transform) -> None:
        self._source, self._transform = source, transform
        self.labels: Tensor | None = None
        self.notes: list[str] = []
        self.identity: dict[str, Any] = {
            "kind": "source",
            "fingerprint": content_fingerprint(source),
            "transform": repr(transform),
        }

    def __len__(self) -> int:
        return len(self._source)

    def read(self, first: int, last: int) -> Tensor:
        """Images ``first`` to ``last - 1``: uint8 [n, 3, H, W]."""
        return stored_images(self._source, self._transform, range(first, last))[0]


def open_images(path: Path, samples: Callable[[Path], ImageSet]) -> ImageSet:
    """Open ``path``: an npz file, a directory of samples (``megavar sample``), or a folder of PNG files.

    Args:
        samples: opens a directory of samples; whether it decodes the tokens of images that were not kept is its matter.
    """
    path = Path(path)
    if path.is_file():
        return NpzImages(path)
    if (path / MANIFEST).is_file() or next(path.glob("chunk_*.npz"), None) is not None:
        return samples(path)
    return PngFolder(path)


def _natural_key(file: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), part) if part.isdigit() else (0, 0, part) for part in parts]


def _npz_labels(path: Path, count: int) -> Tensor | None:
    """``arr_1`` as int64 [N], if there is one.

    Raises:
        DataError: it is not one class number per image.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_1" not in file.files:
                return None
            labels = file["arr_1"]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"arr_1 of {path} cannot be read ({error}): write it again, or leave it out") from error
    whole = labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and bool(np.all(labels == np.floor(labels))))
    if labels.shape != (count,) or not whole or (count and (labels.min() < 0 or labels.max() >= CLASSES)):
        found = f"{labels.dtype} {list(labels.shape)}"
        range_of = f" from {labels.min()} to {labels.max()}" if labels.size and labels.dtype.kind in "iuf" else ""
        raise DataError(
            f"arr_1 of {path} is {found}{range_of}, but labels are one class number from 0 per image: int64 [{count}]. "
            f"Write class numbers (of one-hot rows, their argmax), or leave arr_1 out."
        )
    return torch.from_numpy(labels.astype(np.int64))


def _npz_member(path: Path, name: str) -> np.ndarray:
    """Member ``name`` of an npz file, as a memory map where it is stored uncompressed and in C order."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                shape, fortran, dtype, header = _npy_header(member)
        if info.compress_type == zipfile.ZIP_STORED and not fortran:
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
            offset = info.header_offset + 30 + name_length + extra_length + header
            if offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
                raise DataError(f"{path} is truncated: write it again")
            return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
        with np.load(path, allow_pickle=False) as content:
            return content[name]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: name an npz file with images in arr_0") from error
    except KeyError as error:
        raise DataError(f"{path} has no member {name}: store uint8 images [N, H, W, 3] under that key") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable npz file ({error}): write it again") from error


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and length of the header of an npy stream."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return shape, fortran, dtype, member.tell()
