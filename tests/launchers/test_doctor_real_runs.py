"""The doctor on what real programs wrote: two ranks over gloo with planted failures, and Python's own tracebacks."""

import socket
import subprocess
import sys

import pytest

from launchers import doctor, local, progress
from launchers.diagnosis import diagnose
from launchers.run_logs import read_rank_log
from megavar.errors import ExitCode
from tests.launchers.test_doctor import line

PLANTED = """
import os, signal, sys, time
from pathlib import Path

import torch.distributed as dist

from megavar import logs
from megavar.parallel.environment import environment
from megavar.training.trainer import Trainer
from tests.training import tiny

def read_a_sample():
    {failure}

class Planted(tiny.TinyRecipe):
    def prepare(self, batch, step):
        if step == 3 and dist.get_rank() == 1:
            read_a_sample()
        return batch

logs.configure(environment().rank)
watchdog = {{"minimum_seconds": 10.0, "start_seconds": 100.0}}
run = tiny.build_run(Path(sys.argv[1]), recipe=Planted(), steps=50, train={{"watchdog": watchdog}})
sys.exit(int(Trainer(run).run()))
"""


@pytest.mark.parametrize(
    ("failure", "cause", "outcome"),
    [
        ("raise KeyError('label')", "KeyError: 'label'", ExitCode.FAILED),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was killed (SIGKILL)", ExitCode.FAILED),
        ("time.sleep(600)", "rank 1 stands in", ExitCode.HANG),
    ],
)
def test_failures_that_were_planted_in_real_runs(tmp_path, failure, cause, outcome):
    """Two ranks over gloo; the second fails at its fourth step. All logs are what the real programs wrote."""
    _, attempt = progress.begin(tmp_path, maximum=3, tasks_per_node=2)
    logs = tmp_path / f"logs/attempt-{attempt:04d}"
    logs.mkdir(parents=True)
    command = [sys.executable, "-c", PLANTED.format(failure=failure), str(tmp_path)]
    with local.Ranks(command, 2, logs, {}) as ranks:
        status = ranks.wait()
    messages = (logs / "tasks.txt").read_text()
    found, _ = progress.end(tmp_path, maximum=3, attempt=attempt, status=status, task_messages=messages)
    assert found == outcome
    (remains,) = doctor.find_attempts(tmp_path)
    diagnosis = diagnose(remains)
    assert (diagnosis.rank, diagnosis.node) == (1, socket.gethostname())
    assert cause in diagnosis.cause, diagnosis
    assert diagnosis.step == 3


@pytest.mark.parametrize("prefix", ["", "[rank12]: "])
def test_real_tracebacks_are_parsed(tmp_path, prefix):
    """Not written by hand: Python's own output, with notes, carets and chains. torch.distributed prefixes it."""
    code = "def f():\n  try: {}['a']\n  except KeyError as e: raise ValueError('two\\nlines') from e\nf()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    path = tmp_path / "rank-0012.log"
    printed = "".join(prefix + text for text in result.stderr.splitlines(keepends=True))
    path.write_text("before\n" + printed + line(12, 5, 3, "after"))
    log = read_rank_log(path)
    assert log.rank == 12
    assert [failure.summary for failure in log.failures] == ["KeyError: 'a'"]
    assert log.last_step == 3


UNDER_NO_LAUNCHER = """
import sys

from megavar.__main__ import main
from megavar.training.trainer import Trainer

def fail(self):
    {failure}

Trainer.run = fail
sys.exit(main(["train", "configs/quickstart/tokenizer.yaml", "run.directory=" + sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("failure", "cause", "code"),
    [
        ("{}['label']", "KeyError: 'label'", 1),
        ("from megavar.errors import DataError; raise DataError('no image')", "megavar train: error: no image", 2),
        ("import os; os._exit(9)", "the run still goes on, or was killed", 9),
        ("open(sys.argv[1] + '/DONE', 'w'); return 0", "No attempt has failed.", 0),
    ],
)
def test_a_run_without_a_launcher(tmp_path, capsys, failure, cause, code):
    """``python -m megavar train`` on a laptop keeps its own log, which tells the doctor as much."""
    program = UNDER_NO_LAUNCHER.replace("{failure}", failure)
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert doctor.main([str(tmp_path)]) == 0
    assert cause in capsys.readouterr().out
