"""``fork`` and ``sample`` on runs of real training (an STMoE-VAR with a moving average, and its tokenizer)."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megavar
from megavar.__main__ import main
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.training.checkpoint import read_weights
from tests.checkpoint.old_runs import ROOT, command, unpack
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TABLE = "embedding.classes.weight"
DEEPSPEED = f"deepspeed={ROOT / 'configs/deepspeed/zero1.json'}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place, here = unpack(tmp_path_factory.mktemp("runs")), Path.cwd()
    described = json.loads((place / "generator/data.json").read_text())
    (place / "generator/data.json").write_text(json.dumps(described | {"class_names": NAMES}))
    os.chdir(place)  # relative to which the runs name each other
    yield place
    os.chdir(here)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    topology.shutdown()


def train(runs: Path, *arguments: str) -> int:
    """In a process of its own; its exit code."""
    (code,) = run_ranks(1, command, runs, "train", *arguments)
    return int(code)


def test_a_longer_run_goes_on_with_everything(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (runs / "generator").rglob("*") if path.is_file()}
    assert main(["fork", "generator", "longer", "train.steps=8", "optimizer.lr=1e-4", DEEPSPEED]) == ExitCode.FINISHED
    said = capfd.readouterr().out
    assert "goes on from step 3" in said and "optimizer" in said and "train.steps: 6 -> 8" in said
    parent = json.loads((runs / "longer/parent.json").read_text())
    assert parent["run"] == "old-generator" and parent["step"] == 3 and parent["differences"]["train.steps"] == [6, 8]
    assert train(runs, "longer", "evaluation.after_training=false") == ExitCode.FINISHED
    lines = [json.loads(line) for line in (runs / "longer/metrics.jsonl").read_text().splitlines()]
    assert min(line["step"] for line in lines) > 3 and (runs / "longer/DONE").exists()
    assert {path: path.read_bytes() for path in before} == before, "the parent is as it was"
    assert train(runs, "generator", "optimizer.lr=5e-5", "train.seed=9") == ExitCode.CONFIGURATION
    refused = capfd.readouterr().err
    assert "megavar fork generator NEW" in refused and "optimizer.lr" in refused and "train.seed" in refused


def test_other_classes_are_matched_by_name(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for name in ("seven", "cat", "two"):
        (runs / "photos" / name).mkdir(parents=True)
        for number in range(16):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(runs / "photos" / name / f"{number}.png")
    source = json.dumps({"name": "image_folder", "path": "photos"})
    words = [f"data.source={source}", "train.steps=1", "train.global_batch_size=4", "evaluation.after_training=false"]
    assert main(["fork", "generator", "photographs", "--step", "3", DEEPSPEED, *words]) == ExitCode.FINISHED
    said = capfd.readouterr().out
    assert "and of classes seven, two" in said and "new      classes cat" in said
    assert "dropped  classes zero, one, three" in said
    old = read_weights(runs / "generator")[TABLE]
    model = json.loads((runs / "photographs/parent.json").read_text())["classes"]
    assert model == {"kept": ["seven", "two"], "new": ["cat"],
                     "dropped": [n for n in NAMES if n not in ("seven", "two")]}  # fmt: skip
    from safetensors.torch import load_file

    new = load_file(runs / "photographs/initial.safetensors")[TABLE]
    assert torch.equal(new, torch.stack([old[10], old[7], old[2], old[10]]))  # cat, seven, two, "no class"
    assert train(runs, "photographs") == ExitCode.FINISHED
    drawn = megavar.load(runs / "photographs").sample(classes=["two"], number=2)
    assert drawn.asked == ("two", "two")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.steps=3"], "would end at step 3"),
        (["generator.depth=3"], "generator.depth would make another model"),
        (["--step", "2"], "no checkpoint of step 2"),
        (["train.stps=9"], "Did you mean 'steps'"),
    ],
)
def test_what_cannot_be_forked_is_refused_and_leaves_nothing(
    runs: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fork", "generator", "refused", *words]) == ExitCode.CONFIGURATION
    assert problem in capsys.readouterr().err and not (runs / "refused").exists()


def test_a_sweep_for_people_shows_what_the_library_draws(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--guidance", "0", "2.5", "--classes", "two", "7", "--number", "4", "--png", "out", DEEPSPEED]
    assert main(["sample", "generator", *words]) == ExitCode.FINISHED
    assert "guidance 2.5: 4 images" in capsys.readouterr().out
    topology.shutdown()
    drawn = megavar.load(runs / "generator").sample(classes=["two", "seven"], number=4, guidance=2.5)
    files = sorted((runs / "out/guidance-2.5").glob("*.png"))
    assert [file.name for file in files] == ["0000-two.png", "0001-seven.png", "0002-two.png", "0003-seven.png"]
    for file, image in zip(files, drawn.images):
        assert Image.open(file).convert("RGB").tobytes() == image.tobytes()
    assert len(list((runs / "out/guidance-0").glob("*.png"))) == 4
    with Image.open(runs / "out/sweep.png") as sweep:
        assert sweep.width > 4 * 64 and 2 * 64 < sweep.height < 4 * 64  # four columns, two rows, words around
    (directory,) = (runs / "generator/generated").glob("step-00000003*guidance_2.5*")
    assert "classes_2_7" in directory.name
    assert main(["sample", "generator", "--classes", "tow", DEEPSPEED]) == ExitCode.CONFIGURATION
    assert "Did you mean 'two'" in capsys.readouterr().err


def test_an_empty_run_directory_does_not_block_its_own_correction(
    runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "generator", runs / "corrected", ignore=shutil.ignore_patterns("checkpoints", "DONE"))
    for name in ("metrics.jsonl", "metrics.discarded.jsonl"):
        (runs / "corrected" / name).unlink(missing_ok=True)
    words = ["train.seed=5", "train.steps=1", "evaluation.after_training=false"]
    assert train(runs, "corrected", *words) == ExitCode.FINISHED  # another seed than the stored one
    assert train(runs, "corrected", "train.seed=6") == ExitCode.CONFIGURATION  # now it is trained
    assert "train.seed is 5 there and 6 here" in capfd.readouterr().err
