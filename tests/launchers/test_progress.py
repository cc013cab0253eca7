"""The ledger of attempts: what counts as progress, and what follows from each way in which an attempt may end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import progress
from launchers.progress import CANCEL, FINISH, HOLD, REPLACE, RESTART, STOP, Ledger, LedgerError, begin
from megavar.errors import ExitCode


def checkpoint(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def start(run: Path, maximum: int = 3) -> tuple[ExitCode, int]:
    return begin(run, maximum=maximum)


def end(run: Path, required: tuple[Path, ...] = (), **facts: object) -> tuple[ExitCode, str]:
    """End the newest attempt."""
    return progress.end(run, required, attempt=len(Ledger(run).attempts), **facts)


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
        assert begin(run, (tokenizer,), maximum=1)[0] == ExitCode.FINISHED
        checkpoint(tokenizer, step)
        assert end(run, (tokenizer,), maximum=1, status=ExitCode.PREEMPTED)[1] == RESTART
    begin(run, (tokenizer,), maximum=1)
    assert end(run, (tokenizer,), maximum=1, status=ExitCode.PREEMPTED)[1] == CANCEL


def test_a_fresh_start_makes_progress_below_the_steps_of_the_run_before(tmp_path):
    """``train.fresh`` moves the old checkpoints away."""
    checkpoint(tmp_path, 1000)
    for step in (10, 20):
        start(tmp_path, maximum=1)
        (tmp_path / "checkpoints").rename(tmp_path / f"checkpoints.before-{step}")
        checkpoint(tmp_path, step)
        assert end(tmp_path, maximum=1, status=ExitCode.PREEMPTED)[1] == RESTART
    start(tmp_path, maximum=1)
    (tmp_path / "checkpoints").rename(tmp_path / "checkpoints.before-none")
    assert end(tmp_path, maximum=1, status=1)[1] == CANCEL, "moved away, and nothing new"


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


def test_an_attempt_is_ended_under_its_own_number(tmp_path):
    """A second launch that the lock refuses is entered behind the attempt that is alive."""
    start(tmp_path)
    start(tmp_path)
    progress.end(tmp_path, maximum=3, attempt=1, status=ExitCode.PREEMPTED)
    assert [attempt.get("outcome") for attempt in Ledger(tmp_path).attempts] == ["PREEMPTED", None]


@pytest.mark.parametrize(
    ("status", "action"), [(1, HOLD), (ExitCode.PREEMPTED, HOLD), (ExitCode.CONFIGURATION, CANCEL)]
)
def test_an_attempt_that_cannot_be_recorded_holds_the_run(tmp_path, status, action):
    """On a full disk: the run neither vanishes nor goes on for ever, uncounted."""
    start(tmp_path)

    def without_space(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "launchers.progress", *arguments]
        limited = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *command]  # every write fails
        return subprocess.run(limited, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    facts = ["--maximum", "3", "--attempt", "1", "--status", str(int(status))]
    ended = without_space("end", str(tmp_path), *facts)
    assert (ended.returncode, ended.stdout) == (status, f"{action}\n")
    assert "cannot be recorded: [Errno 27] File too large" in ended.stderr
    begun = without_space("begin", str(tmp_path), "--maximum", "3")
    assert (begun.returncode, begun.stdout) == (ExitCode.PREFLIGHT, "")
    assert "cannot be counted" in begun.stderr
    assert len(Ledger(tmp_path).attempts) == 1


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
    facts = ["--maximum", "1", "--attempt", "1", "--status", "143", "--task-messages", str(messages)]
    last = call("end", str(tmp_path), *facts)
    assert (last.returncode, last.stdout) == (ExitCode.NO_PROGRESS, "cancel\n")
    (attempt,) = json.loads((tmp_path / "restarts.json").read_text())["attempts"]
    assert attempt["outcome"] == "NO_PROGRESS"


def test_a_failure_after_training_is_said(tmp_path, capsys):
    """``evaluation.after_training``: the run is done, its scores are not."""
    start(tmp_path)
    (tmp_path / "DONE").touch()
    assert progress.main(["end", str(tmp_path), "--maximum", "3", "--attempt", "1", "--status", "140"]) == 0
    output = capsys.readouterr()
    assert output.out == "finish\n"
    assert "what came after it ended with status 140" in output.err


def test_bookkeeping_needs_no_packages():
    """It runs on the host, outside the container that has torch."""
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); import launchers.progress, launchers.rendezvous"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
