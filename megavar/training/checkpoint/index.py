"""DCP's index of a checkpoint, read without running anything that it says.

torch writes the index (``.metadata``: which piece of which tensor lies where) as a pickle, and unpickles it with
everything Python can import: whoever wrote a checkpoint could run code in whoever reads it, and hashes do not help,
because they come from the same hand. Here the pickle may name only what DCP itself writes. Its classes are stood in for
by blank records, so not even their own methods run; what the records hold is checked and only then becomes DCP's index.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megavar.errors import CheckpointError

FILE_NAME = ".metadata"
_SHARD = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_RECORDS = {
    (_METADATA, "Metadata"), (_METADATA, "TensorStorageMetadata"), (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"), (_METADATA, "MetadataIndex"), (_METADATA, "StorageMeta"),
    (_FILES, "_StorageInfo"),
}  # fmt: skip
_VALUES = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("builtins", "getattr"),
}  # fmt: skip
"""Called with plain values in the pickle: sizes, and what is of no use here. Python 3.11.2 writes a member of an
enumeration (a tensor's memory format) as ``getattr(class, name)``; like all of these, the stand-in looks up nothing."""


class _Unpickler(pickle.Unpickler):
    """Knows the names that DCP writes, and gives a stand-in for each; the stand-ins die with it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name.

        Raises:
            pickle.UnpicklingError: DCP does not write this name.
        """
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _RECORDS | _VALUES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._known.setdefault((module, name), _record(name) if (module, name) in _RECORDS else _value())


def _record(kind: str) -> type:
    def restore(self: Any, state: Any) -> None:
        self.__dict__["state"] = state

    return type(kind, (), {"__setstate__": restore})


def _value() -> Any:
    return lambda *values: values[0] if len(values) == 1 else values


class IndexReader(dcp.FileSystemReader):
    """DCP's reader of a directory, with our way of reading the index.

    Raises:
        CheckpointError: as :func:`read_index`.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._index = read_index(directory)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index of the directory, read already. DCP would also look for one per rank."""
        return self._index


def read_index(directory: Path) -> Metadata:
    """The index of the checkpoint ``directory``; only tensors, and only in shards of that directory.

    Raises:
        CheckpointError: the index holds something else than DCP writes, or contradicts the files.
        OSError: it cannot be read.
    """
    path = directory / FILE_NAME
    content = path.read_bytes()
    try:
        return _to_metadata(_Unpickler(content).load(), _sizes_of_shards(directory))
    except Exception as error:  # malformed pickles raise almost anything
        raise CheckpointError(
            f"{path} is not an index that megavar writes: {error or type(error).__name__}. Nothing in it was run. Do "
            f"not use this checkpoint unless you know who made it; restore it from a backup if it is yours."
        ) from None


def _sizes_of_shards(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir() if _SHARD.fullmatch(path.name)}


def _state(record: Any, kind: str) -> dict[str, Any]:
    """The attributes of a record that must be of ``kind``."""
    state = vars(record)["state"] if type(record).__name__ == kind and hasattr(record, "__dict__") else None
    if not isinstance(state, dict):
        raise ValueError(f"a {type(record).__name__} stands where a {kind} belongs")
    return state


def _numbers(value: Any) -> torch.Size:
    """A tuple of numbers from 0."""
    if not isinstance(value, tuple) or not all(type(item) is int and 0 <= item < 2**62 for item in value):
        raise ValueError(f"{value!r:.80} is not a size")
    return torch.Size(value)


def _to_metadata(root: Any, shards: dict[str, int]) -> Metadata:
    top = _state(root, "Metadata")
    tensors = {_text(name): _tensor(entry) for name, entry in top["state_dict_metadata"].items()}
    places: dict[MetadataIndex, _StorageInfo] = {}
    stored = dict.fromkeys(tensors, 0)
    for key, value in top["storage_data"].items():
        index, place = _state(key, "MetadataIndex"), _place(value, shards)
        name, number = _text(index["fqn"]), index["index"]
        if name not in tensors or not (number is None or type(number) is int):
            raise ValueError(f"it places a piece {number!r:.20} of {name!r:.80}, which is no tensor of it")
        places[MetadataIndex(name, _numbers(index["offset"]), number)] = place
        stored[name] += place.length
    for name, entry in tensors.items():
        if math.prod(entry.size) * entry.properties.dtype.itemsize > stored[name]:
            raise ValueError(f"{name} has {list(entry.size)} values, but only {stored[name]} bytes are stored of it")
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())  # type: ignore[arg-type]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is not a name")
    return value


def _tensor(record: Any) -> TensorStorageMetadata:
    entry = _state(record, "TensorStorageMetadata")
    properties = entry["properties"]
    state = vars(properties)["state"] if type(properties).__name__ == "TensorProperties" else None
    if not isinstance(state, tuple) or not isinstance(state[0], torch.dtype):
        raise ValueError(f"{state!r:.80} does not describe a tensor")
    chunks = []
    for chunk in entry["chunks"]:
        parts = _state(chunk, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_numbers(parts["offsets"]), _numbers(parts["sizes"])))
    return TensorStorageMetadata(TensorProperties(dtype=state[0]), _numbers(entry["size"]), chunks)


def _place(record: Any, shards: dict[str, int]) -> _StorageInfo:
    """Where a piece is. DCP would follow any path, and decode it by any registered extension."""
    place = _state(record, "_StorageInfo")
    file = _text(place["relative_path"])
    if file not in shards:
        raise ValueError(f"it points at {file!r:.200}, which is no shard of this checkpoint")
    if place.get("transform_descriptors"):
        raise ValueError("its pieces want to be decoded by extensions")
    offset, length = _numbers((place["offset"], place["length"]))
    if offset + length > shards[file]:
        raise ValueError(f"it points behind the end of {file}")
    return _StorageInfo(file, offset, length)
