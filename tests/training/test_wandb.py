"""W&B offline: each run of a process has a run of its own, with all its steps."""

from pathlib import Path

import pytest

from megavar.config.logging import LoggingConfig, WandbConfig
from megavar.training.monitor import Monitor
from megavar.training.run_directory import RunDirectory


def test_two_runs_of_one_process_do_not_mix(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = LoggingConfig(progress="none", wandb=WandbConfig(mode="offline"))
    for name, steps in (("first", (100, 200)), ("second", (10, 20))):
        monitor = Monitor(config, RunDirectory(tmp_path / name), name, 0, 200)
        (tmp_path / name).mkdir()
        monitor.open(0, {"name": name})
        for step in steps:
            monitor.log({"step": step, "loss": 1.0})
        monitor.close()
    assert "Tried to log to step" not in capfd.readouterr().err
    identities = {(tmp_path / name / "wandb_id").read_text() for name in ("first", "second")}
    assert len(identities) == 2
    for name in ("first", "second"):
        assert len(list((tmp_path / name).rglob("run-*.wandb"))) == 1
