"""What is no file of weights is named for what it is, and nobody is advised to load it unsafely."""

import fractions
import gzip
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from megavar.errors import CheckpointError
from megavar.weight_file import read_state_dict, read_weights_file

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


def prefixed(prefix):
    return {prefix + name: value for name, value in STATE.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
WRAPPED = {
    "VAR's trainer": ({"trainer": {"var_wo_ddp": STATE, "var_opt": OPTIMIZER, "config": {}}, "args": {"bs": 1}},
                      ["'trainer.var_wo_ddp'"]),
    "data parallel": (prefixed("module."), ["without 'module.'"]),
    "compiled": (prefixed("_orig_mod."), ["without '_orig_mod.'"]),
    "compiled, data parallel": ({"model": prefixed("module._orig_mod."), "epoch": 3}, ["'model'", "'_orig_mod.' and"]),
    "compiled blocks": ({"a._orig_mod.weight": STATE["a.weight"], "b": STATE["b"]}, ["without '_orig_mod.'"]),
    "sharded": (prefixed("_fsdp_wrapped_module."), ["without '_fsdp_wrapped_module.'"]),
    "Lightning": ({"state_dict": STATE, "optimizer_states": [OPTIMIZER], "global_step": 7}, ["'state_dict'"]),
    "DeepSpeed": ({"module": STATE, "optimizer": None, "buffer_names": ["b"]}, ["'module'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_state_dicts_are_unwrapped_with_a_note(tmp_path, caplog, name):
    content, notes = WRAPPED[name]
    torch.save(content, tmp_path / "weights.pth")
    state = read_state_dict(tmp_path / "weights.pth", "The file")
    assert state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)
    (record,) = caplog.records
    assert all(note in record.getMessage() for note in ["weights.pth", *notes]), record.getMessage()


def test_names_that_only_look_wrapped_are_kept(tmp_path, caplog):
    """Not all begin with it; two would become one."""
    some = torch.ones(2)
    for state in ({"module.a": STATE["b"], "head": some}, {"a": STATE["b"], "_orig_mod.a": STATE["a.weight"]}):
        save_file(state, tmp_path / "a.safetensors")
        assert read_state_dict(tmp_path / "a.safetensors", "The file").keys() == state.keys()
    assert not caplog.records


def test_of_several_state_dicts_the_one_that_fits_is_taken(tmp_path):
    """VAR saves its tokenizer beside its transformer. A moving average beside the weights fits as well: say which."""
    expected = {name: tuple(value.shape) for name, value in STATE.items()}
    other = {"conv": torch.ones(3)}
    torch.save({"trainer": {"vae_local": other, "var_wo_ddp": prefixed("module.")}}, tmp_path / "var.pth")
    assert read_weights_file(tmp_path / "var.pth", expected, {}).keys() == STATE.keys()
    with pytest.raises(CheckpointError, match=r"holds 2 state dicts: trainer\.vae_local, trainer\.var_wo_ddp\. Save"):
        read_state_dict(tmp_path / "var.pth", "The file")
    torch.save({"model": STATE, "ema": STATE, "step": 3}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"holds 2 state dicts of this model: model, ema\. Save the one"):
        read_weights_file(tmp_path / "two.pth", expected, {})
    torch.save({"vae": other, "disc": {"x": torch.ones(1)}}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"In 'vae': .*keys missing from the file: a\.weight.* In 'disc': "):
        read_weights_file(tmp_path / "none.pth", expected, {})
