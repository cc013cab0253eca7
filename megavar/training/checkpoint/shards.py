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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megavar.errors import CheckpointAccessError, CheckpointError
from megavar.training.checkpoint import fault
from megavar.training.checkpoint.index import FILE_NAME as INDEX
from megavar.training.checkpoint.index import IndexReader, read_index
from megavar.training.checkpoint.ranks import Ranks


class _Files(FileSystem):
    """Keeps the error that a file system has raised: DCP reports another one, or a copy without its cause."""

    failure: OSError | None = None
    dies = False
    """In the middle of the first shard (tests only)."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        try:
            with super().create_stream(path, mode) as stream:
                yield fault.DyingStream(stream, limit=512) if self.dies and mode == "wb" else stream
        except Exception as error:
            self.failure = _innermost(error)
            raise


def _innermost(error: BaseException | None) -> OSError | None:
    """The OSError that an exception goes back to."""
    found = None
    while error is not None:
        found = error if isinstance(error, OSError) else found
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def _plain_errors(files: _Files, otherwise: type[CheckpointError]) -> Iterator[None]:
    """DCP raises a BaseException, which passes every handler: raise what it is about instead.

    Raises:
        OSError: a file system failed on this rank.
        CheckpointError: ``otherwise``: anything else, or on another rank.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise files.failure or _innermost(cause) or otherwise(
            f"{type(cause).__name__} on rank {rank}: {cause}"
        ) from error


def write(directory: Path, tensors: dict[str, Tensor], ranks: Ranks) -> list[str]:
    """Write every rank's ``tensors`` into ``directory``, synced to disk. Collective.

    Where several ranks hold the same tensor, one of them writes it.

    Returns:
        Names of the files that this rank wrote.

    Raises:
        OSError: a file system failed on this rank.
        CheckpointAccessError: another rank failed.
    """
    writer, files = dcp.FileSystemWriter(directory, sync_files=True), _Files()
    files.dies = fault.armed("inside_shard", ranks.rank)
    writer.fs = files
    with _plain_errors(files, CheckpointAccessError):
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
    mine = sorted(path.name for path in directory.glob(f"__{ranks.rank}_*"))
    return [*mine, INDEX] if ranks.rank == 0 else mine


def write_alone(directory: Path, tensors: dict[str, Tensor]) -> list[str]:
    """:func:`write` by a process without process groups."""
    writer, files = dcp.FileSystemWriter(directory, sync_files=True), _Files()
    writer.fs = files
    with warnings.catch_warnings(), _plain_errors(files, CheckpointAccessError):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    return sorted(path.name for path in directory.iterdir())


def read(directory: Path, templates: dict[str, Tensor]) -> None:
    """Fill ``templates`` in place, each with its part of the stored tensor. Not collective.

    Raises:
        CheckpointError: the index is not one that DCP writes, or the shards are not what it says.
        OSError: a file system failed.
    """
    if not templates:
        return
    reader, files = IndexReader(directory), _Files()
    reader.fs = files
    with warnings.catch_warnings(), _plain_errors(files, CheckpointError):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(templates, storage_reader=reader, no_dist=True)


def index(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every stored tensor by key.

    Raises:
        CheckpointError: the index is not one that DCP writes.
    """
    return {
        key: (entry.size, entry.properties.dtype)
        for key, entry in read_index(directory).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
