"""A teacher that a run distils guides another run: exact resume, identities, heads in checkpoints and exports."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megavar.__main__ import main
from megavar.assembly import load_teacher
from megavar.commands.train import train
from megavar.config.loading import load_config
from megavar.config.teachers.base import TeacherChoice
from megavar.errors import CheckpointError, ExitCode
from megavar.parallel.environment import environment
from megavar.recipes.next_scale import NextScale
from megavar.recipes.self_distillation import SelfDistillation
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from megavar.training.checkpoint.weights import find_checkpoint, read_weights
from megavar.weight_file import read_state_dict
from tests.distributed.harness import RankFailure, run_ranks
from tests.tokenizers.public_files import save_public
from tools import convert_checkpoint

pytestmark = pytest.mark.end_to_end
TEACHER, GUIDED = "configs/mepa/teacher_digits.yaml", "configs/mepa/guided_digits.yaml"
SHORT = ("train.steps=4", "train.checkpoint.interval=2", "train.global_batch_size=8", "logging.interval=1",
         "optimizer.schedule.warmup_steps=1")  # fmt: skip


def go(path: str, overrides: tuple[str, ...], die_at: int | None = None) -> int:
    """Runs on a rank: train to the end, or to a sudden death while step ``die_at`` is prepared."""
    for kind in (NextScale, SelfDistillation):
        prepare = kind.prepare

        def deadly(self: Any, batch: Any, step: int, prepare: Any = prepare) -> Any:
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return prepare(self, batch, step)

        kind.prepare = deadly  # type: ignore[method-assign, assignment]
    return int(train(load_config(path, overrides), environment()))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return read_weights(directory)


def whole_and_killed(path: str, folder: Path, overrides: tuple[str, ...]) -> tuple[Path, Path]:
    """An undisturbed run, and one that died on the way and went on."""
    for name in ("whole", "killed"):
        given = (path, (*SHORT, *overrides, f"run.directory={folder / name}"))
        if name == "killed":
            with pytest.raises(RankFailure, match="exit code -9"):
                run_ranks(1, go, *given, 3)
            assert find_checkpoint(folder / name, verify=False)[1].step == 2
        assert run_ranks(1, go, *given) == [ExitCode.FINISHED]
    return folder / "whole", folder / "killed"


def assert_equal(one: Path, other: Path) -> None:
    expected, found = weights_of(one), weights_of(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return whole_and_killed(TEACHER, tmp_path_factory.mktemp("teacher"), ())


def test_a_teacher_resumes_bitwise_and_is_its_average(teachers: tuple[Path, Path]) -> None:
    assert_equal(*teachers)
    stored = weights_of(teachers[0])
    teacher = load_teacher(
        TeacherChoice.make(name="self_distilled", weights=str(teachers[0])), torch.device("cpu")
    )
    for name, value in teacher.named_parameters():
        assert torch.equal(value, stored[name]) and not value.requires_grad
        assert name == "class_token" or not torch.equal(value, stored[f"heads.student.network.{name}"]), name


def test_an_exported_teacher_is_a_choice_too(teachers: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    assert convert_checkpoint.main([str(teachers[0]), str(file)]) == 0
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    features = [
        load_teacher(TeacherChoice.make(name="self_distilled", weights=str(path)), torch.device("cpu")).features(images)
        for path in (teachers[0], file)
    ]
    assert features[0].shape == (2, 16, 64) and torch.equal(*features)
    with pytest.raises(CheckpointError, match=r"do not exist\. Give a local file"):
        load_teacher(TeacherChoice.make(name="dinov3", weights="nowhere.pth"), torch.device("cpu"))


def test_what_a_teacher_knows_is_measured(
    teachers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ("analysis.train_images=300", "analysis.test_images=200", "--out", str(tmp_path))
    assert main(["analyze", "teacher_probe", f"own={teachers[0]}", *few]) == ExitCode.FINISHED
    values = json.loads((tmp_path / "teacher_probe.json").read_text())["values"]
    assert (values["train_images"], values["test_images"], values["classes"]) == (300, 200, 10)
    assert values["pixels"]["knn"] > 0.8 and values["own"] != values["random weights"]
    assert min(values["own"].values()) > 0.15
    assert (tmp_path / "teacher_probe.png").exists()
    assert main(["analyze", "teacher_probe", "configs/quickstart.yaml", *few]) == ExitCode.CONFIGURATION
    assert "neither distils a teacher" in capsys.readouterr().err


def test_a_guided_run(teachers: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.pth"
    torch.manual_seed(0)
    save_public(MultiScaleVQ(load_config(GUIDED).tokenizer), tokenizer)
    common = ("run.requires=[]", f"recipe.tokenizer_weights={tokenizer}", "evaluation.after_training=false",
              "generator.depth=2", "generator.width=16")  # fmt: skip

    def by(teacher: Path) -> tuple[str, ...]:
        term = f"{{name: semantic_guidance, teacher: {{name: self_distilled, weights: {teacher}}}, "
        return (*common, f"recipe.terms=[{term}projection: {{hidden: [8]}}}}]")

    whole, killed = whole_and_killed(GUIDED, tmp_path, by(teachers[0]))
    assert_equal(whole, killed)
    _, manifest = find_checkpoint(whole, verify=False)
    assert manifest.frozen.keys() == {"tokenizer", "semantic_guidance.teacher"}
    heads = {name for name in weights_of(whole) if name.startswith("heads.")}
    assert heads == {f"heads.semantic_guidance.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}

    exported = tmp_path / "export.safetensors"
    assert convert_checkpoint.main([str(whole), str(exported)]) == 0
    own = {name for name in read_state_dict(exported, "it") if not name.startswith("tokenizer/")}
    assert own == weights_of(whole).keys() - heads

    (killed / "DONE").unlink()
    other = tmp_path / "other"
    assert run_ranks(1, go, TEACHER, (*SHORT, "train.seed=1", f"run.directory={other}")) == [ExitCode.FINISHED]
    with pytest.raises(RankFailure, match=r"weights of 'semantic_guidance\.teacher' were replaced"):
        run_ranks(1, go, GUIDED, (*SHORT, *by(other), f"run.directory={killed}"))
