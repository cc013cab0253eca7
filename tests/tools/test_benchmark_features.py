"""The benchmark of feature extraction prints and writes its figures."""

import json
from pathlib import Path

import pytest

from tools.benchmark_features import main


def test_figures_of_both_extractors(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEGAVAR_CACHE", str(tmp_path / "cache"))
    arguments = ["--size", "32", "--batch-size", "1", "--seconds", "0.1", "--json", str(tmp_path / "figures.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["speeds"]) == {"inception 32", "digits-cnn 16"}
    assert all(value > 0 for speed in figures["speeds"].values() for value in speed.values())
    assert printed.count("images/s per core") == 2


def test_missing_weights_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inception-weights", str(tmp_path / "none.pth")]) == 2
    assert "do not exist" in capsys.readouterr().err
