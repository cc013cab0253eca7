"""``megavar compare``: settings, losses at equal steps, scores, and samples of equal seeds."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megavar.__main__ import main
from megavar.errors import ExitCode
from tests.reporting.written_runs import write_run


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"optimizer": {"lr": 0.002}, "run": {"name": "b"}}
    runs = [write_run(tmp_path / "a", slope=0.03, scores={"fid": 4.0}),
            write_run(tmp_path / "b", config=other, scores={"fid": 6.0})]  # fmt: skip
    words = [*map(str, runs), "--out", str(tmp_path / "out")]
    assert main(["compare", *words]) == ExitCode.FINISHED
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["optimizer.lr", "0.001", "0.002"] in lines and ["100", "1.0000", "3.0000"] in lines
    assert ["fid", "↓", "≤5", "4.000", "6.000"] in lines
    assert not any(line[:1] == ["run.name"] for line in lines)
    with Image.open(tmp_path / "out/samples.png") as picture:
        assert picture.size == (400, 2 * (160 + 24)) and picture.getpixel((200, 100)) == (100, 0, 0)
    assert main(["compare", *words, "--json"]) == ExitCode.FINISHED
    found = json.loads(capsys.readouterr().out)
    assert found["loss"]["10"] == {"a": pytest.approx(3.7), "b": pytest.approx(3.9)}
    assert found["differences"] == {"optimizer.lr": {"a": 0.001, "b": 0.002}}


def test_one_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == ExitCode.CONFIGURATION
    assert "at least one more run" in capsys.readouterr().err
