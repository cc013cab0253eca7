"""A demo of a table through the command line: it continues where it was left, and says what it found."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TINY, megavar

pytestmark = pytest.mark.end_to_end


def test_a_demo_goes_on_and_compares(tokenizer_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.yaml"
    short = [*TINY, "train.steps=4", "logging.interval=1", f"recipe.tokenizer_weights={tokenizer_run}"]
    rows = {"experts": [], "dense": ["generator.experts=null"]}
    table = {
        "name": "t", "source": "a paper", "title": "t", "protocol": "p",
        "metrics": {"fid": {"heading": "FID", "better": "lower"}},
        "rows": [{"name": "dense", "paper": {"fid": 4.1}}, {"name": "experts", "paper": {"fid": 3.0}}],
        "demo": {"config": "configs/quickstart.yaml", "overrides": short, "rows": rows, "minutes": 1.0, "size": "tiny",
                 "metrics": {"loss": {"heading": "loss", "key": "log/loss", "better": "lower"}}},
    }  # fmt: skip
    file.write_text(json.dumps(table))
    command = ("reproduce", str(file), "--demo", "--folder", str(tmp_path / "runs"), "--seeds")
    first = megavar(*command, "1")
    assert first.code == 0, first.output
    again = megavar(*command, "2")
    assert again.code == 0, again.output
    assert "2 of 4 runs are done already" in again.output and "[2/2] dense, seed 1" in again.output
    assert "by loss: " in again.output and "paper's order" in again.output
    summary = json.loads((tmp_path / "runs/t.json").read_text())
    assert summary["done"] == 4 and summary["paper_order"] == ["experts", "dense"]
    assert summary["flops_per_image"]["experts"] > summary["flops_per_image"]["dense"] > 0
    for row in rows:
        losses = [run["values"]["loss"] for run in summary["runs"] if run["row"] == row]
        mean = summary["rows"][row]["loss"]
        assert losses[0] != losses[1] and mean["seeds"] == 2
        assert mean["mean"] == pytest.approx(sum(losses) / 2)
        assert mean["error"] == pytest.approx(abs(losses[0] - losses[1]) / 2)
