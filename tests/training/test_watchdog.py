"""A step that hangs ends the process, in real processes."""

import pickle
import subprocess
import sys
import textwrap

import pytest

from megavar.config.train import WatchdogConfig
from megavar.errors import ExitCode
from megavar.training.watchdog import Watchdog

SCRIPT = """
import logging, sys, time
from megavar.config.train import WatchdogConfig
from megavar.training.watchdog import Watchdog

def stuck():
    time.sleep(60)

logging.basicConfig(handlers=[logging.FileHandler(sys.argv[1])])
with Watchdog(WatchdogConfig(factor=5.0, minimum_seconds=2.0, start_seconds=float(sys.argv[2]))) as watchdog:
"""


def run(body, log, start_seconds=2.0):
    script = SCRIPT + textwrap.indent(textwrap.dedent(body), "    ")
    command = [sys.executable, "-c", script, str(log), str(start_seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_hanging_step_leaves_stacks_and_the_exit_code(tmp_path, steps):
    body = f"""
    for step in range({steps}):
        time.sleep(0.01)
        watchdog.beat(step + 1)
    stuck()
    """
    ended = run(body, tmp_path / "rank.log")
    assert ended.returncode == ExitCode.HANG
    log = (tmp_path / "rank.log").read_text()
    assert f"after step {steps} " in log
    for place in (ended.stderr, log):
        assert "in stuck" in place, place


def test_a_hang_leaves_the_last_collectives(tmp_path, monkeypatch):
    """Where the batch script names the file, as NCCL's own watchdog would."""
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", f"{tmp_path}/rank_")
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    body = f"""
    import torch
    torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
    watchdog.beat(1)
    torch.distributed.all_reduce(torch.ones(3))
    watchdog.beat(2)
    stuck()
    """
    ended = run(body, tmp_path / "rank.log", start_seconds=60.0)
    assert ended.returncode == ExitCode.HANG, ended.stderr
    record = pickle.loads((tmp_path / "rank_0").read_bytes())
    assert [entry["profiling_name"] for entry in record["entries"]] == ["gloo:all_reduce"]


def test_a_run_that_moves_or_pauses_is_left_alone(tmp_path):
    body = """
    for step in range(20):
        time.sleep(0.01)
        watchdog.beat(step)
    with watchdog.pause():
        time.sleep(3)
    print("finished")
    """
    ended = run(body, tmp_path / "rank.log", start_seconds=30)
    assert (ended.returncode, ended.stdout) == (0, "finished\n"), ended.stderr


def test_the_first_step_is_not_typical():
    """It may compile for minutes; a hang of the second one must not be waited for twenty times as long."""
    watchdog = Watchdog(WatchdogConfig(factor=20.0, minimum_seconds=0.001, start_seconds=3600.0))
    watchdog._last -= 600.0
    watchdog.beat(1)
    assert watchdog.limit() == 3600.0
    watchdog._last -= 2.0
    watchdog.beat(2)
    assert watchdog.limit() == pytest.approx(40.0, abs=10.0)


def test_limits():
    watchdog = Watchdog(WatchdogConfig(factor=20.0, minimum_seconds=300.0, start_seconds=3600.0))
    assert watchdog.limit() == 3600.0
    watchdog._times.extend([1.0, 1.0, 500.0])
    assert watchdog.limit() == 300.0
    watchdog._times.extend([100.0] * 10)
    assert watchdog.limit() == 2000.0
    with watchdog.pause():
        assert watchdog.limit() == 3600.0
    assert watchdog.limit() == 2000.0
