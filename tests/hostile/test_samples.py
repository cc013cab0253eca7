"""Directories of samples made by a hostile writer, or damaged."""

import json

import pytest
import torch

from megavar.errors import CheckpointError, ConfigError, DataError
from megavar.frozen import identify
from megavar.run_samples import DECODER, stored_decoder

TOKENS = torch.zeros((1, 21), dtype=torch.int64)
WHOLE = {
    "tokenizer": {"name": "multiscale_vq"}, "weights": "w", "identity": {"kind": "file", "sha256": "0"},
    "rounding": "round", "plugins": [],
}  # fmt: skip


def decode(folder, described):
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    (folder / DECODER).write_bytes(text)
    return stored_decoder(folder, torch.device("cpu"))(TOKENS)


def test_modules_that_only_the_samples_ask_for_are_not_imported(tmp_path, outside, monkeypatch):
    (tmp_path / "evil_samples.py").write_text(f"import os; os.mkdir(r'{outside.canary}')")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"weight": torch.ones(1)}, tmp_path / "w.pth")
    identity = identify(tmp_path / "w.pth").to_json()
    described = WHOLE | {"weights": str(tmp_path / "w.pth"), "identity": identity, "plugins": ["evil_samples"]}
    with pytest.raises(ConfigError, match="evil_samples, and a file beside samples or weights is no reason"):
        decode(tmp_path, described)
    (tmp_path / "own_module.py").write_text("")
    monkeypatch.setenv("MEGAVAR_PLUGINS", "own_module")
    with pytest.raises(CheckpointError):  # asked for by the person, too: it goes on to the weights
        decode(tmp_path, described | {"plugins": ["own_module"]})


def test_a_payload_as_weights_does_not_run(tmp_path, outside):
    torch.save({"weight": outside.payload}, tmp_path / "w.pth")
    identity = identify(tmp_path / "w.pth").to_json()
    with pytest.raises(CheckpointError, match=r"objects \(.*mkdir\) that could run code"):
        decode(tmp_path, WHOLE | {"weights": str(tmp_path / "w.pth"), "identity": identity})


@pytest.mark.parametrize("key", [None, "tokenizer", "weights", "identity", "rounding"])
def test_a_damaged_description_is_named(tmp_path, key):
    cases = [b"", b"{", b"[]", b"5", b"\xff\xfe"]
    if key is not None:
        cases = [{name: value for name, value in WHOLE.items() if name != key}]
    for described in cases:
        with pytest.raises(DataError, match=r"decoder\.json cannot be read"):
            decode(tmp_path, described)
