"""A step that hangs ends the process, in real processes."""

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
