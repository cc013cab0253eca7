"""W&B offline: each run of a process has a run of its own, with all its steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from megavar.config.logging import LoggingConfig, WandbConfig
from megavar.training.monitor import Monitor
from megavar.training.run_directory import RunDirectory


def test_two_runs_of_one_process_do_not_mix(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = LoggingConfig(progress="none", wandb=WandbConfig(mode="offline"))
    for name, steps in (("first", (100, 200)), ("second", (10, 20)), ("second", (30, 40))):  # the third is a restart
        monitor = Monitor(config, RunDirectory(tmp_path / name), name, 0, 200)
        (tmp_path / name).mkdir(exist_ok=True)
        monitor.open(0, {"name": name})
        for step in steps:
            monitor.log({"step": step, "loss": 1.0})
        monitor.close()
    assert "Tried to log to step" not in capfd.readouterr().err
    identities = {(tmp_path / name / "wandb_id").read_text() for name in ("first", "second")}
    assert len(identities) == 2
    for name, starts in (("first", 1), ("second", 2)):
        files = list((tmp_path / name).rglob("run-*.wandb"))
        assert len(files) == starts
        identity = (tmp_path / name / "wandb_id").read_text().strip()
        assert {file.stem for file in files} == {f"run-{identity}"}, "a restart continues the same run"


LOSES_ITS_SERVICE = """
import os, signal, sys, time
from pathlib import Path
from megavar.config.logging import LoggingConfig, WandbConfig
from megavar.training.monitor import Monitor
from megavar.training.run_directory import RunDirectory

config = LoggingConfig(progress="none", wandb=WandbConfig(mode="offline"))
monitor = Monitor(config, RunDirectory(Path(sys.argv[1])), "x", 0, 9)
monitor.open(0, {})
children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
services = [int(pid) for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
assert services
for pid in services:
    os.kill(pid, signal.SIGTERM)
    while " Z " not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.05)
for step in (1, 2, 3):
    monitor.log({"step": step, "loss": 1.0})
    time.sleep(0.1)
monitor.close()
"""


def test_a_service_that_dies_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a job is cancelled, before the checkpoint is saved: SIGTERM reaches all its processes."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of this process, if an earlier test has started it
    command = [sys.executable, "-c", LOSES_ITS_SERVICE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "W&B is lost" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text().count('"loss"') == 3


def test_a_failing_service_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp-localhost-1")  # nobody listens there
    code = (
        "import sys; from pathlib import Path; from megavar.training.monitor import Monitor\n"
        "from megavar.training.run_directory import RunDirectory; from megavar.config.logging import LoggingConfig\n"
        "monitor = Monitor(LoggingConfig(progress='none'), RunDirectory(Path(sys.argv[1])), 'x', 0, 9)\n"
        "monitor.open(0, {}); monitor.log({'step': 1, 'loss': 2.0}); monitor.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "W&B does not start" in done.stderr
    assert '"loss": 2.0' in (tmp_path / "metrics.jsonl").read_text()
