"""What is no file of weights is named for what it is, and nobody is advised to load it unsafely."""

import fractions
import gzip
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from megavar.errors import CheckpointError
from megavar.weight_file import read_state_dict

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1024\n"
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}


def truncated(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])


def with_objects(path):
    torch.save({"model": STATE, "args": fractions.Fraction(1, 2)}, path)


WRITERS = {
    "empty": (lambda path: path.touch(), "it is empty"),
    "a Git LFS pointer": (lambda path: path.write_bytes(LFS), "git lfs pull"),
    "a web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>sign in</html>"), "web page"),
    "JSON": (lambda path: path.write_bytes(b'{"error": "not found, try again"}'), "it is JSON"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(pickle.dumps({}))), "compressed with gzip"),
    "truncated": (truncated, "truncated PyTorch file"),
    "objects": (with_objects, r"objects \(fractions\.Fraction\) that could run code"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 8), "damaged or not a state dict"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "not a plain state dict"),
    "a list": (lambda path: torch.save([torch.ones(3)], path), "not a plain state dict"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_it_is_instead_is_said(tmp_path, name, suffix):
    write, expected = WRITERS[name]
    path = tmp_path / f"weights{suffix}"
    write(path)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path, "The file of weights")
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert "weights_only" not in message and "add_safe_globals" not in message and "can still be loaded" not in message
    if suffix == ".pth":
        assert re.search(expected, message), message


def test_valid_files_of_every_format_are_read(tmp_path):
    torch.save(STATE, tmp_path / "new.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "renamed.pth")
    for path in tmp_path.iterdir():
        found = read_state_dict(path, "The file of weights")
        assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE), path
