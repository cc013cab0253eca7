"""A new user by the README: from a folder of photographs to a report, a fork and a comparison."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.test_init import photographs
from tests.docs.commands import ROOT, commands, module_and_arguments

pytestmark = pytest.mark.end_to_end
SMALL = {"train.steps=2000": "train.steps=6"}
"""What stands for what, so that it takes a minute."""


def shrink(file: Path) -> None:
    """Four steps, few samples; everything else as ``init`` wrote it."""
    text = re.sub(r"\bsteps: \d+", "steps: 4", file.read_text())
    text = re.sub(r"global_batch_size: \d+", "global_batch_size: 8", text)
    text = re.sub(r"\b(interval|samples_interval): \d+", r"\1: 2", text)
    text = re.sub(r"warmup_steps: \d+", "warmup_steps: 1", text)
    text = re.sub(r"\bnumber: 100\b", "number: 20", text)  # of samples: all commands look at the same ones
    file.write_text(text)


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", {"cat": 30, "coffee": 30})
    (tmp_path / "photos/coffee").rename(tmp_path / "photos/dog")  # the README's classes
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    said = {}
    for words in commands(ROOT / "README.md", "## Your own photographs"):
        found = module_and_arguments(words)
        assert found is not None and found[0] == "megavar"
        arguments = [SMALL.get(word, word) for word in found[1]]
        done = subprocess.run(
            [sys.executable, "-m", "megavar", *arguments], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}:\n{done.stdout[-3000:]}"
        said[arguments[0]] = done.stdout
        if arguments[0] == "train":
            assert "label_accuracy" in done.stdout and "scores-classifier" in done.stdout, "it is scored by itself"
        if arguments[0] == "init":
            for file in tmp_path.glob("photos*.yaml"):
                shrink(file)
    assert "photos" in said["status"] and "4/4" in said["status"] and "finished" in said["status"]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3 * 8 + 1
    assert {path.name.split("-")[1] for path in (tmp_path / "out/guidance-4").glob("*.png")} == {"cat.png", "dog.png"}
    page = (tmp_path / "runs/photos/report/report.html").read_text()
    assert "finished at step 4 of 4" in page and "cat, dog" in page and "Samples by guidance" in page
    assert 'id="figure-experts"' in page and 'id="figure-routing"' in page and "label_accuracy" in page
    assert len(page) < 3e6
    assert "goes on from step 4" in said["fork"] and "train.steps: 4 -> 6" in said["fork"]
    assert "train.steps" in said["compare"]
