"""A run with compiled blocks, through the command line and with the real compiler."""

import shutil
from pathlib import Path

import pytest
import torch

from megavar.training.checkpoint import read_weights
from tests.end_to_end.conftest import megavar, metrics, overrides

pytestmark = pytest.mark.end_to_end
CONFIG = "configs/quickstart.yaml"


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for CPUs needs g++")
def test_a_compiled_run_learns_the_same_and_continues_bitwise(
    tiny_run: Path, tokenizer_run: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    more = ("generator.experts.backend=grouped", "train.compile=blocks")
    arguments = ("train", CONFIG, *overrides(directory, tokenizer_run, *more))
    outcome = megavar(*arguments)
    assert outcome.code == 0, outcome.output
    expected, found = metrics(tiny_run), metrics(directory)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step]["loss"] == pytest.approx(values["loss"], rel=1e-4), step
    plain, weights = read_weights(tiny_run), read_weights(directory)
    assert any(not torch.equal(value, weights[name]) for name, value in plain.items()), "compiled code rounds otherwise"

    shutil.rmtree(directory / "checkpoints" / "step-00000020")
    (directory / "DONE").unlink()
    outcome = megavar(*arguments)
    assert outcome.code == 0 and "Continuing after step 15" in outcome.output, outcome.output
    for name, value in read_weights(directory).items():
        assert torch.equal(value, weights[name]), name
