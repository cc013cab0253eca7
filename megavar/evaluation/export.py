"""Images as an npz file that ADM's official script reads, written as a stream."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megavar.errors import DataError
from megavar.evaluation.adm import interleaved_order, shuffled_order
from megavar.evaluation.images import ImageSet
from megavar.storage import atomic_file

ExportOrder = Literal["interleaved", "shuffled"]
_COPIED_TOGETHER = 2**24  # bytes


def export_npz(
    path: Path, images: ImageSet, order: ExportOrder, *, on_progress: Callable[[int], None] = lambda images: None
) -> None:
    """Write ``images`` as ``arr_0`` uint8 [N, H, W, 3] and their labels, if known, as ``arr_1`` int64 [N].

    The official script cuts the array into consecutive splits of 5,000 for the Inception score, so the order decides
    it: sorted by class, 50,000 good images score 56 instead of 277 (shuffled) or 297 (interleaved).

    The images are read once, in their own order, into a temporary array beside ``path`` (as large as the file itself):
    reading in the order of the export would open, or decode, a whole chunk for every image.

    Raises:
        DataError: the interleaved order is asked for but the classes are unknown.
    """
    sequence = export_order(images, order)
    places = torch.argsort(sequence).numpy()  # of every image in the file
    channels, height, width = images.read(0, 1).shape[1:]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".npy") as array:
        shape = (len(images), height, width, channels)
        pixels = np.lib.format.open_memmap(array.name, mode="w+", dtype=np.uint8, shape=shape)
        for first in range(0, len(images), images.chunk_size):
            last = min(first + images.chunk_size, len(images))
            pixels[places[first:last]] = images.read(first, last).permute(0, 2, 3, 1).numpy()
            on_progress(last - first)
        pixels.flush()
        with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                shutil.copyfileobj(array, member, _COPIED_TOGETHER)
            if images.labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, images.labels[sequence].numpy())


def export_order(images: ImageSet, order: ExportOrder) -> Tensor:
    """Indices int64 [N] in the order of the export; never sorted by class."""
    if order == "shuffled":
        return shuffled_order(len(images))
    if order != "interleaved":
        raise DataError(
            f"images cannot be exported in the order {order!r}: sorted by class, the official script's "
            f"Inception score is meaningless; use shuffled or interleaved"
        )
    if images.labels is None:
        raise DataError(
            "the interleaved order needs the class of every image, but these images have no labels: export "
            "from the sampler's chunks, or use the shuffled order"
        )
    return interleaved_order(images.labels)


def is_sorted_by_class(labels: Tensor) -> bool:
    """Whether images of several classes stand class after class, the order that ruins the Inception score."""
    changes = int((labels[1:] != labels[:-1]).sum())
    classes = len(labels.unique())
    return classes > 1 and changes == classes - 1 and len(labels) > classes
