"""Analyses of a real run through the command line: data, pictures, and what a router by scale must show."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavar.__main__ import main
from megavar.analysis.base import Subject
from megavar.analysis.kinds.convergence import began_at
from megavar.config.loading import load_config
from megavar.errors import ExitCode
from megavar.records.reading import metric_lines
from tests.end_to_end.conftest import ROOT, megavar, overrides

pytestmark = pytest.mark.end_to_end
SMALL = ("analysis.images=24", "analysis.batch=10")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def by_scale(tmp_path_factory: pytest.TempPathFactory, tokenizer_run: Path) -> Path:
    """A run whose tokens are routed by their scale alone."""
    directory = tmp_path_factory.mktemp("by_scale") / "run"
    more = ("generator.experts.router=scale", "train.steps=2", "run.name=by-scale")
    outcome = megavar("train", "configs/quickstart.yaml", *overrides(directory, tokenizer_run, *more))
    assert outcome.code == 0, outcome.output
    return directory


def analyze(kind: str, out: Path, *arguments: str) -> dict:
    assert main(["analyze", kind, *arguments, "--out", str(out)]) == ExitCode.FINISHED
    for picture in out.glob(f"{kind}*.png"):
        assert Image.open(picture).width > 300
    return json.loads((out / f"{kind}.json").read_text())


def test_loads_and_maps(tiny_run: Path, by_scale: Path, tmp_path: Path) -> None:
    loads = analyze("expert_load", tmp_path, str(tiny_run), "--beside", str(by_scale), *SMALL)
    assert sum(loads["metrics"][f"expert_{number}"] for number in range(1, 9)) == pytest.approx(64)
    counts = np.load(tmp_path / "expert_load.npz")
    assert {name: counts[name].sum(1).tolist() for name in counts} == {
        name: [24 * 21 * 3] * 2 for name in ("quickstart", "by-scale")
    }
    maps = analyze("routing_maps", tmp_path, str(by_scale), "--beside", str(tiny_run), *SMALL)["values"]
    assert maps["by-scale"]["spatial_deviation"] == 0 < maps["quickstart"]["spatial_deviation"]
    found = np.load(tmp_path / "routing_maps.npz")
    assert found["quickstart/block_1/scale_3"].shape == (8, 4, 4)
    assert found["quickstart/block_1/scale_3"].sum(0) == pytest.approx(np.full((4, 4), 3.0))  # top 3 everywhere
    totals = sum(24 * found[f"quickstart/block_0/scale_{scale}"].sum((1, 2)) for scale in (1, 2, 3))
    assert totals == pytest.approx(counts["quickstart"][0])
    assert len(list(tmp_path.glob("routing_maps*.png"))) == 4


def test_features_convergence_and_times(tiny_run: Path, by_scale: Path, tmp_path: Path) -> None:
    features = analyze("scale_features", tmp_path, str(tiny_run), "analysis.points=24", *SMALL)
    assert 0 < features["metrics"]["explained"] < 1
    assert len(np.load(tmp_path / "scale_features.npz")["quickstart/places"]) == 3 * 24
    scored = ("evaluate", str(tiny_run / "config.yaml"), "sampling.number=20", "--checkpoint")
    assert main([*scored, "all"]) == ExitCode.FINISHED
    more = ("--beside", f"others={by_scale}", "--beside", f"others={by_scale}", "analysis.metric=fd64")
    curves = analyze("convergence", tmp_path, str(tiny_run), *more, *SMALL)["values"]
    held_out = curves["quickstart"]["loss on test images"]
    assert len(held_out) == len(curves["quickstart"]["fd64"]) >= 2 and held_out[-1] < held_out[0]
    assert curves["quickstart"]["runs"] == 1 and curves["others"]["runs"] == 2
    last = max((tiny_run / "checkpoints").glob("step-*"))
    began = f"train.initial_weights={{path: {last}}}"
    continued = Subject(load_config(str(tiny_run), [began]), torch.device("cpu"))
    epochs = metric_lines(tiny_run)[-1]["epoch"]
    assert began_at(continued) == (int(last.name[5:]), pytest.approx(epochs))
    assert began_at(Subject(load_config(str(tiny_run)), torch.device("cpu"))) == (0, 0.0)
    assert main([*scored, "step-00000007"]) == ExitCode.CONFIGURATION
    times = analyze("times", tmp_path, str(tiny_run), "analysis.repeats=1")
    assert times["metrics"]["seconds_per_image"] > 0 and times["metrics"]["epoch_minutes"] > 0


@pytest.mark.parametrize("kind", ["trajectories", "student_forcing"])
def test_maps_drawn_after_true_ones(kind: str, tiny_run: Path, tmp_path: Path) -> None:
    """On VAR's residual scales; of three, the first is true."""
    key = {"trajectories": "given=1", "student_forcing": "first=2"}[kind]
    more = (f"analysis.{key}", "analysis.shown=1", *SMALL)
    found = analyze(kind, tmp_path, str(tiny_run), *more)["values"]["quickstart"]
    arrays = np.load(tmp_path / f"{kind}.npz")
    if kind == "trajectories":
        first, second = (arrays[f"{name}/1"] for name in ("quickstart", "the image's own maps"))
        assert np.array_equal(first, second) and found["distance_02"] > 0 < found["change_04"]
    else:
        assert found["teacher_02"] == found["student_02"] > 0, "the first drawn scale follows true ones in both"
        assert found["teacher_04"] != found["student_04"]
        assert arrays["quickstart/difference/4"].shape == (4, 4)


def test_images_from_coarser_maps(tiny_run: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    """Each residual map brings the image nearer; a generator's run is asked for the tokenizer that it reads."""
    more = ("--beside", f"tokenizer={tokenizer_run}", "analysis.shown=1", *SMALL)
    found = analyze("reconstructions", tmp_path, str(tiny_run), *more)["values"]
    own = found["quickstart"]
    assert own == found["tokenizer"] and own["psnr_01"] < own["psnr_02"] < own["psnr_04"]
    assert own["psnr_04"] > found["untrained"]["psnr_04"] and 0 < own["used_04"] <= 1
    shown = np.load(tmp_path / "reconstructions.npz")["quickstart/4"]
    assert shown.shape[0] == 1 and shown.std() > 0


def test_slips_are_named(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["analyze", "expert_lode", str(tiny_run)]) == ExitCode.CONFIGURATION
    assert "Did you mean 'expert_load'" in capsys.readouterr().err
    assert main(["analyze", "expert_load", str(tiny_run), "analysis.imags=3"]) == ExitCode.CONFIGURATION
    assert "Did you mean 'images'" in capsys.readouterr().err
