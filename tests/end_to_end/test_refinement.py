"""Recipes of several passes as whole runs: experts, FlexVAR, SAR, guidance from one file; death between two passes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavar.__main__ import main
from megavar.commands.train import train
from megavar.config.loading import load_config
from megavar.errors import ExitCode
from megavar.evaluation import classes
from megavar.parallel.environment import environment
from megavar.recipes.masked_scales import MaskedScales
from megavar.recipes.sar import SAR
from megavar.tokenizers.llamagen_vq import LlamaGenVQ
from megavar.training.checkpoint.weights import find_checkpoint, read_weights
from tests.distributed.harness import RankFailure, run_ranks
from tests.end_to_end.conftest import metrics
from tests.tokenizers.public_files import save_public

pytestmark = pytest.mark.end_to_end
COMBINED, HYBRID = "configs/demo/combined.yaml", "configs/demo/hybrid.yaml"
SHORT = ("run.requires=[]", "train.steps=4", "train.checkpoint.interval=2", "train.global_batch_size=8",
         "logging.interval=1", "logging.samples_interval=1000", "optimizer.schedule.warmup_steps=1")  # fmt: skip
SMALL = ("generator.depth=2", "generator.width=16", "generator.heads=2", "evaluation.after_training=false")


def go(path: str, overrides: tuple[str, ...], die_at: int | None = None) -> int:
    """Runs on a rank: train to the end, or to a sudden death in step ``die_at``, after its first pass."""
    classes._STEPS = 20
    for kind in (SAR, MaskedScales):
        prepare, following = kind.prepare, kind.with_drawn

        def noted(self: Any, batch: Any, step: int, prepare: Any = prepare) -> Any:
            self.step_now = step
            return prepare(self, batch, step)

        def deadly(self: Any, *arguments: Any, following: Any = following, **named: Any) -> Any:
            if self.step_now == die_at:
                assert any(parameter.grad is not None for parameter in self.generator.parameters())
                os.kill(os.getpid(), signal.SIGKILL)
            return following(self, *arguments, **named)

        kind.prepare, kind.with_drawn = noted, deadly  # type: ignore[method-assign, assignment]
    return int(train(load_config(path, overrides), environment()))


def run(path: str, *overrides: str, die_at: int | None = None, ranks: int = 1) -> None:
    assert run_ranks(ranks, go, path, (*SHORT, *overrides), die_at) == [ExitCode.FINISHED] * ranks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of no use to the eye, but real: a tokenizer with random weights."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.pth"
    save_public(LlamaGenVQ(load_config(COMBINED).tokenizer), file)
    return f"recipe.tokenizer_weights={file}"


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> tuple[Path, tuple[str, ...]]:
    """A finished run of the file, and what it was given."""
    folder = tmp_path_factory.mktemp("combined")
    short = ("train.steps=1", "train.checkpoint.interval=1", f"run.directory={folder / 'teacher'}")
    run("configs/demo/teacher.yaml", *short)
    (term,) = load_config(COMBINED).recipe.model_dump(mode="json")["terms"]
    term["teacher"]["weights"] = str(folder / "teacher")
    given = (*SMALL, tokenizer, f"recipe.terms={json.dumps([term])}")
    run(COMBINED, *given, f"run.directory={folder / 'whole'}")
    return folder / "whole", given


def killed_between_passes(path: str, directory: Path, *given: str) -> dict[str, torch.Tensor]:
    """Weights of a run that died so in its third step, and went on."""
    with pytest.raises(RankFailure, match="exit code -9"):
        run(path, *given, f"run.directory={directory}", die_at=3)
    assert find_checkpoint(directory, verify=False)[1].step == 2
    run(path, *given, f"run.directory={directory}")
    return read_weights(directory)


def assert_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_sar_killed_between_passes_continues_bitwise(combined: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    whole, given = combined
    assert_equal(read_weights(whole), killed_between_passes(COMBINED, tmp_path / "killed", *given))


def test_the_hybrid_killed_between_calls_continues_bitwise(tokenizer: str, tmp_path: Path) -> None:
    given = (*SMALL, tokenizer, "recipe.schedule=interleave")
    run(HYBRID, *given, f"run.directory={tmp_path / 'whole'}")
    assert_equal(read_weights(tmp_path / "whole"), killed_between_passes(HYBRID, tmp_path / "killed", *given))


def test_experts_flexvar_sar_and_guidance_from_one_file(combined: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    """Trained: every part has a loss of its own. On two ranks: the same losses. Sampled and scored."""
    whole, given = combined
    more = ("evaluation.after_training=true", "sampling.number=60", "evaluation.suite.reference_images=64",
            f"evaluation.suite.extractor_cache={tmp_path / 'cache'}", "sampling.chunk_size=30")  # fmt: skip
    run(COMBINED, *given, *more, f"run.directory={tmp_path / 'two'}", ranks=2)
    one, two = metrics(whole), metrics(tmp_path / "two")
    for step in one:
        for name in ("loss", "loss/student", "balance", "gradient_norm", "expert_share/1"):
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-4), (step, name)
    assert len({tuple(name for name in values if "scale" in name and values[name]) for values in one.values()}) > 1
    assert any("cosine" in name for name in one[4])
    (scores,) = (tmp_path / "two").glob("scores-*.json")
    fid = json.loads(scores.read_text())["metrics"]["fid@shapes-cnn"]
    assert np.isfinite(fid)
    assert len(list((tmp_path / "two/generated").rglob("*.npz"))) == 2
    for kind in ("throughput", "trajectories", "student_forcing"):
        few = ("analysis.batch=2", *(("analysis.repeats=1",) if kind == "throughput" else ("analysis.images=4",)))
        assert run_ranks(1, main, ["analyze", kind, str(tmp_path / "two"), *few]) == [ExitCode.FINISHED]
    speed, drawn, forced = (
        json.loads((tmp_path / f"two/analysis/{kind}.json").read_text())["metrics"]
        for kind in ("throughput", "trajectories", "student_forcing")
    )
    assert speed["images_per_second"] > 0 and speed["score"] == pytest.approx(fid)
    assert {"distance_06", "change_08"} < drawn.keys() and forced["teacher_03"] == forced["student_03"]
