"""Checkpoints made by a hostile writer: nothing of theirs runs, nothing is read or written elsewhere."""

import dataclasses
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megavar.assembly import load_tokenizer
from megavar.config.checkpoint import CheckpointConfig
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.errors import CheckpointError
from megavar.training.checkpoint import Checkpointer, manifest, shards, store
from megavar.training.checkpoint.index import FILE_NAME, read_index
from megavar.training.checkpoint.manifest import Manifest, ModuleEntry
from megavar.training.checkpoint.weights import read_weights
from megavar.weight_file import read_state_dict
from tests.checkpoint.layered import Layout, Run
from tests.checkpoint.written import write_weights
from tests.distributed.harness import run_ranks

TENSORS = {"first.weight": torch.arange(12.0).view(3, 4), "second": torch.tensor([5.0])}


@pytest.fixture
def checkpoint(tmp_path):
    return write_weights(tmp_path / "checkpoints", "generator", TENSORS)


def sign(checkpoint, **changes):
    """Describe the files as they are now: the manifest's hashes are the hostile writer's own."""
    old = manifest.read(checkpoint) if not changes else changes.pop("old")
    names = [path.name for path in checkpoint.iterdir() if path.name != manifest.FILE_NAME]
    files = tuple(manifest.describe_file(checkpoint, name) for name in names)
    manifest.write(checkpoint, dataclasses.replace(old, files=files, **changes))


def replace_index(checkpoint, content: bytes):
    old = manifest.read(checkpoint)
    (checkpoint / FILE_NAME).write_bytes(content)
    sign(checkpoint, old=old)


def test_our_index_is_read_as_torch_reads_it(tmp_path):
    tensors = {"a/b": torch.randn(3, 4), "c": torch.zeros(2, dtype=torch.bfloat16), "s": torch.tensor(3)}
    shards.write_alone(tmp_path, tensors)
    ours, theirs = read_index(tmp_path), FileSystemReader(tmp_path).read_metadata()
    assert ours.storage_data == theirs.storage_data and ours.state_dict_metadata.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found, expected = ours.state_dict_metadata[name], theirs.state_dict_metadata[name]
        assert (found.size, found.chunks) == (expected.size, expected.chunks)
        assert found.properties.dtype == expected.properties.dtype == tensor.dtype
    templates = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    shards.read(tmp_path, templates)
    assert all(torch.equal(templates[name], tensors[name]) for name in tensors)


def test_an_index_of_an_older_python_is_read(tmp_path, monkeypatch):
    """Python 3.11.2 (Debian 12) pickles members of enumerations by ``getattr``, later ones by their value."""
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    shards.write_alone(tmp_path, TENSORS)
    assert b"getattr" in (tmp_path / FILE_NAME).read_bytes()
    assert read_index(tmp_path).state_dict_metadata.keys() == TENSORS.keys()


def test_getattr_of_an_index_looks_up_nothing(checkpoint, outside):
    payload = pickle.dumps(Metadata({}))[:-1] + b"0cbuiltins\ngetattr\n(ctorch\nSize\nV__subclasses__\ntR)R."
    replace_index(checkpoint, payload)
    with pytest.raises(CheckpointError, match="is not an index that megavar writes"):
        read_index(checkpoint)


def whole(metadata, payload):
    return payload


def in_planner_data(metadata, payload):
    return dataclasses.replace(metadata, planner_data={"first.weight": payload})


def as_a_key(metadata, payload):
    metadata.storage_data[payload] = None
    return metadata


def in_a_tensor(metadata, payload):
    next(iter(metadata.state_dict_metadata.values())).size = payload
    return metadata


@pytest.mark.parametrize("place", [whole, in_planner_data, as_a_key, in_a_tensor])
def test_a_payload_anywhere_in_the_index_does_not_run(checkpoint, outside, place):
    genuine = pickle.loads((checkpoint / FILE_NAME).read_bytes())
    replace_index(checkpoint, pickle.dumps(place(genuine, outside.payload)))
    with pytest.raises(CheckpointError, match=r"it names posix\.mkdir.*Nothing in it was run") as caught:
        read_weights(checkpoint)
    assert str(checkpoint / FILE_NAME) in str(caught.value)


@pytest.mark.parametrize(
    "stream",
    [
        # a name with dots climbs from an allowed module to the modules that it imports
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93\x8c\x04path\x85R.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.serialization\n_get_layout.__globals__\n.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02]q\x00.",  # a list
        b"",
        b"not a pickle",
        b"\x80\x04" + b"(" * 100_000,
        # BUILD on an allowed class would change the class itself
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\nN}U\x04evilK\x01s\x86b.",
    ],
)
def test_malformed_and_clever_indexes_are_one_error(checkpoint, outside, stream):
    replace_index(checkpoint, stream)
    with pytest.raises(CheckpointError, match="is not an index that megavar writes"):
        read_weights(checkpoint)
    assert not hasattr(TensorStorageMetadata, "evil")


def place_elsewhere(metadata: Metadata, path: str) -> Metadata:
    old = next(iter(metadata.storage_data.values()))
    key = next(iter(metadata.storage_data))
    metadata.storage_data[key] = _StorageInfo(path, old.offset, old.length, old.transform_descriptors)
    return metadata


def test_pieces_lie_in_the_checkpoint_and_nowhere_else(checkpoint, outside, tmp_path):
    """DCP itself would read any file that the index names."""
    shutil.copy(checkpoint / "__0_0.distcp", tmp_path / "elsewhere.distcp")
    for path in ("../../elsewhere.distcp", str(tmp_path / "elsewhere.distcp"), "/dev/zero"):
        genuine = pickle.loads((checkpoint / FILE_NAME).read_bytes())
        replace_index(checkpoint, pickle.dumps(place_elsewhere(genuine, path)))
        with pytest.raises(CheckpointError, match="no shard of this checkpoint"):
            read_weights(checkpoint)
        shutil.rmtree(checkpoint)
        write_weights(checkpoint.parent, "generator", TENSORS)


def test_bytes_entries_are_refused(checkpoint, outside):
    """DCP unpickles what is stored as bytes with everything Python can import."""
    payload = pickle.dumps(outside.payload)
    with (checkpoint / "__0_0.distcp").open("r+b") as file:
        file.write(payload)
    genuine = pickle.loads((checkpoint / FILE_NAME).read_bytes())
    genuine.state_dict_metadata = dict.fromkeys(genuine.state_dict_metadata, BytesStorageMetadata())
    old = Manifest(0, {"generator": ModuleEntry({name: list(v.shape) for name, v in TENSORS.items()}, 0)}, {})
    (checkpoint / FILE_NAME).write_bytes(pickle.dumps(genuine))
    sign(checkpoint, old=old)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata"):
        read_weights(checkpoint)


def test_a_payload_in_a_shard_does_not_run(checkpoint, outside):
    old = manifest.read(checkpoint)
    buffer = pickle.dumps(outside.payload)
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(buffer + bytes(path.stat().st_size - len(buffer)))
    sign(checkpoint, old=old)
    with pytest.raises(CheckpointError):
        read_weights(checkpoint)


def test_a_size_without_content_allocates_nothing(checkpoint):
    genuine = pickle.loads((checkpoint / FILE_NAME).read_bytes())
    genuine.state_dict_metadata["weight/generator/second"] = None
    for entry in genuine.state_dict_metadata.values():
        if entry is not None:
            entry.size = torch.Size([2**40, 2**20])
    genuine.state_dict_metadata = {k: v for k, v in genuine.state_dict_metadata.items() if v is not None}
    replace_index(checkpoint, pickle.dumps(genuine))
    with pytest.raises(CheckpointError, match="is not an index"):
        read_weights(checkpoint)


def test_files_of_a_manifest_lie_in_the_checkpoint(checkpoint, outside):
    old = manifest.read(checkpoint)
    entry = manifest.describe_file(checkpoint, f"../../{outside.root.name}/{outside.file.name}")
    manifest.write(checkpoint, dataclasses.replace(old, files=(entry,)))
    with pytest.raises(CheckpointError, match="no file of a checkpoint"):
        read_weights(checkpoint)


def test_a_tokenizer_of_a_run_directory_does_not_run_code(tmp_path, outside):
    checkpoint = write_weights(tmp_path / "run" / "checkpoints", "autoencoder", TENSORS)
    replace_index(checkpoint, pickle.dumps(outside.payload))
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        load_tokenizer(MultiScaleVQConfig(), str(tmp_path / "run"), torch.device("cpu"))


def resume(root):
    """On the ranks: continue a run from the newest checkpoint that can be used."""
    run = Run(Layout())
    with Checkpointer(root, CheckpointConfig()) as checkpointer:
        return checkpointer.load({"model": run.state})


def save_one(root, steps):
    run = Run(Layout())
    with Checkpointer(root, CheckpointConfig(keep_last=5)) as checkpointer:
        for step in steps:
            run.step(step)
            checkpointer.save(step + 1, {"model": run.state}, {"step": step + 1})


def test_a_run_continues_from_an_older_checkpoint_instead(tmp_path, outside):
    root = tmp_path / "checkpoints"
    run_ranks(1, save_one, root, range(2))
    replace_index(root / "step-00000002", pickle.dumps(outside.payload))
    [state] = run_ranks(1, resume, root)
    assert state == {"step": 1}
    assert [path.name for path in store.list_checkpoints(root)] == ["step-00000001"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_state_dict_file_does_not_run_code(tmp_path, outside, suffix):
    path = tmp_path / f"weights{suffix}"
    for write in (torch.save, lambda value, place: place.write_bytes(pickle.dumps(value))):
        write({"weight": outside.payload}, path)
        with pytest.raises(CheckpointError, match=str(path)):
            read_state_dict(path, "Weights")
