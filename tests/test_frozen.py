"""What weights are, wherever they lie."""

import os

import pytest
import torch

from megavar import frozen
from megavar.errors import CheckpointError
from megavar.frozen import Identity
from tests.checkpoint.written import write_weights


def test_a_checkpoint_is_itself_under_any_path(tmp_path):
    run = tmp_path / "run"
    written = write_weights(run / "checkpoints", "autoencoder", {"a": torch.ones(2)})
    identity = frozen.identify(run)
    assert identity == frozen.identify(written) and identity.name == "step-00000000"
    run.rename(tmp_path / "moved")
    assert frozen.identify(tmp_path / "moved") == identity
    other = write_weights(tmp_path / "other", "autoencoder", {"a": torch.zeros(2)})
    assert not frozen.identify(other).same(identity)


def test_identities_go_through_json():
    kinds = {"file": "vae.pth", "checkpoint": "step-00000007", "folder": "dinov2"}
    for identity in [Identity(kind, name, "12") for kind, name in kinds.items()]:
        assert Identity.from_json({"path": "x", **identity.to_json()}) == identity
    for record in ({"path": "x"}, "x", None):
        with pytest.raises(CheckpointError, match="does not identify weights"):
            Identity.from_json(record)


def test_files_are_hashed_once_until_they_change(tmp_path, monkeypatch):
    hashed = []

    def count(path):
        hashed.append(path)
        return hash_file(path)

    hash_file = frozen.sha256_of_file
    monkeypatch.setattr(frozen, "sha256_of_file", count)
    path = tmp_path / "vae.pth"
    path.write_bytes(b"one")
    first = frozen.identify(path)
    assert frozen.identify(path) == first and len(hashed) == 1
    status = path.stat()
    path.unlink()
    path.write_bytes(b"two")  # of the same size and, say, age: another file
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not frozen.identify(path).same(first)


def test_a_folder_of_a_network_is_its_files(tmp_path):
    folder = tmp_path / "dinov2"
    (folder / ".cache").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    first = frozen.identify(folder)
    assert (first.kind, first.name) == ("folder", "dinov2")
    (folder / ".cache" / "lock").touch()
    folder.rename(tmp_path / "moved")
    assert frozen.identify(tmp_path / "moved").same(first)
    (tmp_path / "moved" / "config.json").write_text('{"image_mean": 0}')
    assert not frozen.identify(tmp_path / "moved").same(first)
    (tmp_path / "moved" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint and holds none"):
        frozen.identify(tmp_path / "moved")


def test_what_is_no_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="none is not a checkpoint and holds none"):
        frozen.identify(tmp_path / "none")


def test_replaced_weights_are_named_with_both_hashes(tmp_path):
    before, now = Identity("file", "a.pth", "12ab"), Identity("file", "a.pth", "34cd")
    frozen.check_same({"tokenizer": before}, {"tokenizer": before, "teacher": now}, tmp_path, "stop.")
    with pytest.raises(CheckpointError, match=r"'tokenizer' were replaced.*12ab.*34cd.*or stop\."):
        frozen.check_same({"tokenizer": before}, {"tokenizer": now}, tmp_path, "stop.")
