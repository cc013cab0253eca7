"""The ledger of attempts: what counts as progress, and what follows from each way in which an attempt may end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import progress
from launchers.progress import CANCEL, FINISH, REPLACE, RESTART, STOP, Ledger, LedgerError, begin, end
from megavar.errors import ExitCode


def checkpoint(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def start(run: Path, maximum: int = 3) -> tuple[ExitCode, int]:
    return begin(run, maximum=maximum)


def test_newest_checkpoint_ignores_unfinished_ones(tmp_path):
    assert progress.newest_checkpoint_step(tmp_path) == progress.NO_CHECKPOINT
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 200)
    (tmp_path / "checkpoints/step-00000300").mkdir()
    (tmp_path / "checkpoints/step-00000400.tmp-ab").mkdir()
    (tmp_path / "checkpoints/step-00000400.tmp-ab/manifest.json").write_text("{}")
    assert progress.newest_checkpoint_step(tmp_path) == 200


def test_a_crash_loop_ends_with_the_last_allowed_attempt(tmp_path):
    outcomes = []
    for _ in range(3):
        assert start(tmp_path)[0] == ExitCode.FINISHED
        outcomes.append(end(tmp_path, maximum=3, status=1))
    assert outcomes == [(ExitCode.FAILED, RESTART), (ExitCode.FAILED, RESTART), (ExitCode.NO_PROGRESS, CANCEL)]


def test_attempts_that_vanish_count_too(tmp_path):
    """A node that loses power runs no code at the end of the attempt."""
    assert [start(tmp_path) for _ in range(3)] == [(ExitCode.FINISHED, number) for number in (1, 2, 3)]
    assert start(tmp_path) == (ExitCode.NO_PROGRESS, 0)
    assert start(tmp_path) == (ExitCode.FINISHED, 4), "who submits it again has looked at it"


def test_progress_resets_the_count(tmp_path):
    for step in (10, 20, 30, 40, 50):
        start(tmp_path, maximum=2)
        checkpoint(tmp_path, step)
        assert end(tmp_path, maximum=2, status=1)[1] == RESTART
    start(tmp_path, maximum=2)
    assert end(tmp_path, maximum=2, status=1)[1] == RESTART
    start(tmp_path, maximum=2)
    assert end(tmp_path, maximum=2, status=1) == (ExitCode.NO_PROGRESS, CANCEL)


def test_a_required_run_that_advances_is_progress(tmp_path):
    """``train`` first trains the tokenizer that a generator requires; that may take more than one job."""
    run, tokenizer = tmp_path / "generator", tmp_path / "tokenizer"
    run.mkdir()
    for step in (10, 20, 30):
        assert begin(run, [tokenizer], maximum=1)[0] == ExitCode.FINISHED
        checkpoint(tokenizer, step)
        assert end(run, [tokenizer], maximum=1, status=ExitCode.PREEMPTED)[1] == RESTART
    begin(run, [tokenizer], maximum=1)
    assert end(run, [tokenizer], maximum=1, status=ExitCode.PREEMPTED)[1] == CANCEL


def test_preemption_without_progress_counts(tmp_path):
    """A time limit shorter than the start-up would otherwise go on for ever."""
    actions = []
    for _ in range(3):
        start(tmp_path)
        actions.append(end(tmp_path, maximum=3, status=ExitCode.PREEMPTED, stop_requested=True)[1])
    assert actions == [RESTART, RESTART, CANCEL]


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (ExitCode.CONFIGURATION, CANCEL),
        (ExitCode.NON_FINITE, CANCEL),
        (ExitCode.HANG, RESTART),
        (ExitCode.PREEMPTED, RESTART),
        (ExitCode.FAILED, RESTART),
        (ExitCode.PREFLIGHT, RESTART),
    ],
)
def test_what_follows(tmp_path, code, action):
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=code) == (code, action)


def test_the_rank_that_failed_first_decides_not_the_ones_that_srun_terminated(tmp_path):
    """Measured: srun -K returns 143 whatever the failing rank's own exit code was."""
    messages = (
        "srun: error: n2: task 1: Exited with exit code 86\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=2.0\n"
        "srun: error: n1: task 0: Terminated\n"
    )
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=143, task_messages=messages) == (ExitCode.NON_FINITE, CANCEL)


def test_groups_of_tasks_in_sruns_messages():
    text = "srun: error: gpu-[3-4]: tasks 0-7,9: Exited with exit code 85\nsrun: error: n1: task 8: Killed\n"
    assert progress.exit_codes_of_tasks(text) == [85]


def test_done_wins_over_a_bad_exit(tmp_path):
    start(tmp_path)
    (tmp_path / "DONE").touch()
    assert end(tmp_path, maximum=3, status=139) == (ExitCode.FINISHED, FINISH)
    assert start(tmp_path) == (ExitCode.FINISHED, 0)


def test_a_silent_end_without_done_is_a_failure(tmp_path):
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=0) == (ExitCode.FAILED, RESTART)
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=0, stop_requested=True) == (ExitCode.PREEMPTED, RESTART)


def test_a_stop_before_the_trainer_listens_is_a_preemption(tmp_path):
    """USR2 ends a process that still imports."""
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=140, stop_requested=True) == (ExitCode.PREEMPTED, RESTART)
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=140) == (ExitCode.FAILED, RESTART)


def test_a_cancelled_job_stays_cancelled_but_one_at_its_time_limit_continues(tmp_path):
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=143, terminated=True)[1] == STOP
    start(tmp_path)
    assert end(tmp_path, maximum=3, status=143, terminated=True, stop_requested=True)[1] == RESTART


def test_bad_nodes_are_replaced_until_no_progress(tmp_path):
    start(tmp_path, maximum=2)
    assert end(tmp_path, maximum=2, status=90, bad_nodes=True) == (ExitCode.PREFLIGHT, REPLACE)
    start(tmp_path, maximum=2)
    assert end(tmp_path, maximum=2, status=90, bad_nodes=True) == (ExitCode.NO_PROGRESS, CANCEL)


def test_a_damaged_ledger_is_reported(tmp_path):
    (tmp_path / "restarts.json").write_text("{")
    with pytest.raises(LedgerError, match="move it away"):
        Ledger(tmp_path)


def test_command_line_prints_attempt_and_action(tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "launchers.progress", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    first = call("begin", str(tmp_path), "--maximum", "1")
    assert (first.returncode, first.stdout) == (0, "1\n")
    messages = tmp_path / "tasks.txt"
    messages.write_text("srun: error: n2: task 1: Exited with exit code 7\n")
    last = call("end", str(tmp_path), "--maximum", "1", "--status", "143", "--task-messages", str(messages))
    assert (last.returncode, last.stdout) == (ExitCode.NO_PROGRESS, "cancel\n")
    (attempt,) = json.loads((tmp_path / "restarts.json").read_text())["attempts"]
    assert attempt["outcome"] == "NO_PROGRESS"


def test_bookkeeping_needs_no_packages():
    """It runs on the host, outside the container that has torch."""
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); import launchers.progress, launchers.rendezvous"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
