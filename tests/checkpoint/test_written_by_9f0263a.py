"""Runs begun by commit 9f0263a go on, and their checkpoints are read (data/9f0263a/README.md says what they are)."""

import hashlib
import json

import numpy as np
import pytest

from megavar.frozen import identify
from megavar.training.checkpoint import find_checkpoint, read_weights
from tests.checkpoint.old_runs import command, unpack
from tests.distributed.harness import run_ranks

TOLERANCE = 1e-5


@pytest.fixture
def runs(tmp_path):
    return unpack(tmp_path)


def curve(run):
    """Loss and gradient norm of the autoencoder or generator by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    norm = "gradient_norm" if "gradient_norm" in lines[0] else "gradient_norm/autoencoder"
    return {line["step"]: (line["loss"], line[norm]) for line in lines if "loss" in line}


def digest(tensors):
    result = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        result.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        result.update(value.numpy().tobytes())
    return result.hexdigest()


def test_weights_are_read(runs):
    expected = json.loads((runs / "weights.json").read_text())
    assert digest(read_weights(runs / "generator")) == expected["generator"]
    assert digest(read_weights(runs / "generator", ema=True)) == expected["generator average"]
    for module in ("autoencoder", "discriminator"):
        assert digest(read_weights(runs / "tokenizer", module)) == expected[module]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tokenizer", "generator"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_as_it_would_have_done(name, ranks, runs):
    run = runs / name
    expected = curve(run)
    (run / "metrics.jsonl").unlink()
    assert run_ranks(ranks, command, runs, "train", f"{name}/config.yaml") == [0] * ranks
    actual = curve(run)
    assert sorted(actual) == [4, 5, 6]
    for step, values in actual.items():
        assert values == pytest.approx(expected[step], rel=TOLERANCE), step
    manifest = find_checkpoint(run)[1]
    assert manifest.step == 6
    tokenizer = identify(runs / "tokenizer").to_json()
    assert manifest.frozen == ({"tokenizer": tokenizer} if name == "generator" else {})


@pytest.mark.distributed
def test_samples_are_drawn(runs):
    arguments = ("sample", "generator/config.yaml", "sampling.number=20", "sampling.chunk_size=10")
    assert run_ranks(1, command, runs, *arguments, "sampling.weights=ema") == [0]
    chunks = sorted((runs / "generator" / "generated").glob("step-00000003-*/chunk_*.npz"))
    assert len(chunks) == 2
    tokens = np.concatenate([np.load(chunk)["tokens"] for chunk in chunks])
    assert tokens.shape == (20, 21) and tokens.max() < 32 and len(np.unique(tokens)) > 4


@pytest.mark.distributed
def test_a_replaced_tokenizer_is_refused_by_all_ranks(runs):
    """The generator's run is resumed, which writes down its tokenizer; then the tokenizer is trained on."""
    assert run_ranks(1, command, runs, "train", "generator/config.yaml") == [0]
    (runs / "generator" / "DONE").unlink()
    assert run_ranks(1, command, runs, "train", "tokenizer/config.yaml") == [0]
    assert run_ranks(2, command, runs, "train", "generator/config.yaml") == [2, 2]
    assert run_ranks(2, command, runs, "sample", "generator/config.yaml", "sampling.number=4") == [2, 2]
    record = runs / "generator" / "weights.json"
    record.unlink()  # the checkpoint knows it, too
    assert run_ranks(2, command, runs, "train", "generator/config.yaml") == [2, 2]
    assert not record.exists()
