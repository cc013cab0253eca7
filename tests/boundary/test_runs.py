"""What the foreign family gets for nothing: exact resume, other layouts on the way, samples, scores, plans, exports."""

import json
from pathlib import Path

import pytest
import torch

from megavar import scoring
from megavar.errors import ConfigError, ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.planning.plan import plan
from tests.boundary.runs import load, tensors_of, write_run, write_tokenizer
from tests.boundary.toy import recipe
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.whole_runs import chunks, samples_of, train_until
from tools import benchmark, convert_checkpoint

pytestmark = pytest.mark.distributed
DENSE = {"generator": {"name": "toy_causal", "experts": None}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("toy") / "tokenizer.safetensors")


def go(path: Path, overrides: tuple[str, ...] = (), die_at: int | None = None) -> int:
    """Runs on every rank: train to the end, or to a sudden death while step ``die_at`` is prepared."""
    return train_until(recipe.SelfTaught, load(path, *overrides), die_at)


@pytest.fixture(scope="module")
def finished(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with experts on one process."""
    path = write_run(tmp_path_factory.mktemp("run") / "whole.yaml", tokenizer)
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    return path


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_killed_and_resumed_bitwise(finished: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path / "killed.yaml", tokenizer)
    with pytest.raises(RankFailure, match="exit code -9"):
        run_ranks(1, go, path, (), 6)
    assert [folder.name for folder in sorted((tmp_path / "killed/checkpoints").glob("step-*"))] == ["step-00000004"]
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    assert_equal(tensors_of(tmp_path / "killed", 8), tensors_of(finished.with_suffix(""), 8))


def test_resumed_under_other_layouts(tokenizer: Path, tmp_path: Path) -> None:
    """Tensor-parallel 1 to 2 and back; the gated feed-forward layer is stored by its parts.

    Steps are 3e-3 long, and where a gradient is nearly zero Adam makes a step of its rounding error.
    """
    whole = write_run(tmp_path / "dense.yaml", tokenizer, **DENSE)
    assert run_ranks(1, go, whole) == [ExitCode.FINISHED]
    assert any(name.endswith("linear_fc1_gate.weight") for name in tensors_of(tmp_path / "dense", 8)), "by parts"
    for name, first, second in (("there", 1, 2), ("back", 2, 1)):
        path = write_run(tmp_path / f"{name}.yaml", tokenizer, **DENSE)
        with pytest.raises(RankFailure, match="exit code -9"):
            run_ranks(first, go, path, (f"parallel.tensor={first}",), 6)
        results = run_ranks(second, go, path, (f"parallel.tensor={second}",))
        assert results == [ExitCode.FINISHED] * second
        assert_equal(tensors_of(tmp_path / name, 8), tensors_of(tmp_path / "dense", 8), tolerance=1e-4)


def test_samples_are_the_same_bytes_on_one_and_two_ranks(finished: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        drawn = samples_of(finished, ranks, tmp_path / f"of-{ranks}")
        found.append(chunks(drawn))
        manifest = json.loads((drawn / "manifest.json").read_text())
        assert manifest["space"]["kind"] == "line"
        assert manifest["conditions"] == {"kind": "class", "classes": 10}
    assert len(found[0]) == 4 and found[0] == found[1]


def scored(path: Path) -> dict[str, float]:
    """Runs on every rank."""
    place = environment()
    topology.initialize(load(path).parallel, place)
    return scoring.score(load(path), place)


def test_it_is_scored_by_its_own_suite(finished: Path) -> None:
    (scores,) = run_ranks(1, scored, finished)
    assert 0 < scores["class_mean_distance"] < 128
    (result,) = finished.with_suffix("").glob("scores-toy_class_means-*.json")
    assert json.loads(result.read_text())["metrics"] == scores
    with pytest.raises(ConfigError, match="scores digits, not 'photographs'"):
        scoring.check(load(finished, "data.source={name: photographs}"))


def test_it_is_planned(finished: Path) -> None:
    predicted = plan(load(finished, "parallel.expert=2"), 4, "h200", None, gpus_per_node=4, images=1000)
    whole = tensors_of(finished.with_suffix(""), 8)
    trained = sum(value.numel() for name, value in whole.items() if not name.startswith("heads."))
    assert predicted.workload.parameters.total == trained


def test_it_is_benchmarked(finished: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--parts", "train", "sampling", "--batch", "2", "--repeats", "1", "--json", str(figures)]
    assert run_ranks(1, benchmark.main, [str(finished), *options]) in ([0], [None])
    assert json.loads(figures.read_text())


@pytest.mark.parametrize("layout", ["megavar", "toy_causal"])
def test_it_is_exported_and_imported_again(layout: str, tokenizer: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.yaml", tokenizer, **DENSE, train={"steps": 2})
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    before = {name: value for name, value in tensors_of(tmp_path / "run", 2).items() if not name.startswith("heads.")}
    file = tmp_path / "weights.safetensors"
    assert convert_checkpoint.main([str(tmp_path / "run"), str(file), "--layout", layout]) == 0
    again = write_run(
        tmp_path / "again.yaml", tokenizer, **DENSE,
        train={"steps": 1, "initial_weights": {"path": str(file), "fresh": ["heads."]}}, optimizer={"lr": 1e-30},
    )  # fmt: skip
    assert run_ranks(1, go, again) == [ExitCode.FINISHED]
    after = tensors_of(tmp_path / "again", 1)
    assert_equal(before, {name: value for name, value in after.items() if not name.startswith("heads.")})
