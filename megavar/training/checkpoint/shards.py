"""The tensor files of a checkpoint, written and read by torch's distributed checkpoint (DCP)."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megavar.training.checkpoint import fault
from megavar.training.checkpoint.ranks import Ranks

METADATA = ".metadata"
"""DCP's index: which tensor is where."""


class _FaultyFileSystem(FileSystem):
    """Dies in the middle of the first shard (tests only)."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            yield fault.DyingStream(stream, limit=512) if mode == "wb" else stream


def write(directory: Path, tensors: dict[str, Tensor], ranks: Ranks) -> list[str]:
    """Write every rank's ``tensors`` into ``directory``, synced to disk. Collective.

    Where several ranks hold the same tensor, one of them writes it.

    Returns:
        Names of the files that this rank wrote.
    """
    writer = dcp.FileSystemWriter(directory, sync_files=True)
    if fault.armed("inside_shard", ranks.rank):
        writer.fs = _FaultyFileSystem()
    dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
    mine = sorted(path.name for path in directory.glob(f"__{ranks.rank}_*"))
    return [*mine, METADATA] if ranks.rank == 0 else mine


def write_alone(directory: Path, tensors: dict[str, Tensor]) -> list[str]:
    """:func:`write` by a process without process groups."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(directory, sync_files=True), no_dist=True)
    return sorted(path.name for path in directory.iterdir())


def read(directory: Path, templates: dict[str, Tensor]) -> None:
    """Fill ``templates`` in place, each with its part of the stored tensor. Not collective."""
    if not templates:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(templates, checkpoint_id=directory, no_dist=True)


def index(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every stored tensor by key."""
    metadata: Metadata = dcp.FileSystemReader(directory).read_metadata()
    return {
        key: (entry.size, entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
