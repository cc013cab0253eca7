"""Whole runs through the command line: world sizes, kills, repetitions, sampling."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megavar.training.checkpoint import read_weights
from tests.end_to_end.conftest import megavar, metrics, overrides, start

pytestmark = pytest.mark.end_to_end
CONFIG = "configs/quickstart.yaml"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_have_the_loss_curve_of_one(stage: int, tiny_run: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    more = (f"deepspeed=configs/deepspeed/zero{stage}.json",)
    outcome = megavar("train", CONFIG, *overrides(tmp_path / "run", tokenizer_run, *more), ranks=2)
    assert outcome.code == 0, outcome.output
    one, two = metrics(tiny_run), metrics(tmp_path / "run")
    assert sorted(one) == sorted(two) == list(range(1, 21))
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5), step
        assert two[step]["gradient_norm"] == pytest.approx(one[step]["gradient_norm"], rel=1e-4), step


def test_killed_at_a_random_step_it_continues_to_the_same_weights(
    tiny_run: Path, tokenizer_run: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    arguments = ("train", CONFIG, *overrides(directory, tokenizer_run))
    target = random.Random().randint(6, 18)
    process = start(arguments)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (directory / "metrics.jsonl").exists() and max(metrics(directory), default=0) >= target:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"the run ended before it could be killed at step {target}"
    outcome = megavar(*arguments)
    assert outcome.code == 0, outcome.output
    assert "Continuing after step" in outcome.output
    expected, actual = read_weights(tiny_run), read_weights(directory)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), f"{name} differs after a kill at step {target}"
    assert sorted(metrics(directory)) == list(range(1, 21))


def test_a_finished_run_ends_at_once(tiny_run: Path, tokenizer_run: Path) -> None:
    before = (tiny_run / "metrics.jsonl").read_bytes()
    outcome = megavar("train", CONFIG, *overrides(tiny_run, tokenizer_run))
    assert outcome.code == 0 and "is finished already" in outcome.output
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


def test_samples_are_the_same_on_one_and_two_ranks(tiny_run: Path, tokenizer_run: Path) -> None:
    arguments = ("sample", CONFIG, *overrides(tiny_run, tokenizer_run), "sampling.number=25", "sampling.chunk_size=4")
    assert megavar(*arguments).code == 0
    (directory,) = (tiny_run / "generated").iterdir()
    chunks = sorted(directory.glob("chunk_*.npz"))
    assert len(chunks) == 7 and (directory / "grid.png").exists()
    first = [dict(np.load(chunk)) for chunk in chunks]
    for chunk in chunks[::2]:  # what is there is kept, what is missing is drawn again
        chunk.unlink()
    for chunk in chunks[1::2]:
        chunk.unlink()
    assert megavar(*arguments, ranks=2).code == 0
    for chunk, expected in zip(chunks, first):
        again = dict(np.load(chunk))
        assert all(np.array_equal(again[name], value) for name, value in expected.items())
    labels = np.concatenate([chunk["labels"] for chunk in first])
    assert np.array_equal(labels, np.arange(25) % 10)


def test_the_run_directory_is_complete(tiny_run: Path) -> None:
    present = {path.name for path in tiny_run.iterdir()}
    assert {"config.yaml", "deepspeed.json", "metrics.jsonl", "logs", "samples", "checkpoints", "DONE"} <= present
    record = metrics(tiny_run)[20]
    for key in ("loss", "accuracy", "loss/scale_04", "accuracy/scale_01", "gradient_norm", "learning_rate",
                "expert_share/0", "balance", "images_per_second"):  # fmt: skip
        assert key in record, key
