"""The real trainer on a real Slurm: one run that everything happens to ends like one that nothing happens to."""

import os
import signal
import time
from pathlib import Path

import torch

from launchers import doctor
from launchers.diagnosis import diagnose
from megavar.training.checkpoint import find_checkpoint, read_weights
from tests.slurm.conftest import WatchedRun

OVERRIDES = ("train.steps=500", "train.checkpoint.interval=25", "logging.interval=25", "logging.wandb.mode=disabled")
DIE_IN_THE_FIRST_SAVE = 'if [ -z "${SLURM_RESTART_COUNT-}" ]; then export MEGAVAR_FAULT=before_rename; fi'


def process_of(job: str, rank: int) -> int:
    """The trainer's process of ``rank`` in the step of ``job``."""
    marks = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            if marks <= environment and b"megavar" in (folder / "cmdline").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    raise LookupError(f"no process of rank {rank} of job {job}")


def shorten_time_limit(run: WatchedRun) -> None:
    """Let the job end in one to two minutes: less than its lead time of 125 s, so Slurm signals at its next look."""
    elapsed = time.time() - run.attempts[-1]["started"]
    run.cluster.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={int(elapsed // 60) + 2}")


def test_a_run_that_everything_happens_to(new_run):
    """Killed inside a save, a rank killed, signalled, cut off by its time limit; beside it another job, undisturbed."""
    whole = new_run("whole")
    whole.submit(*OVERRIDES)
    run = new_run("tried", signal_lead_seconds=125, setup=[DIE_IN_THE_FIRST_SAVE])
    run.submit(*OVERRIDES)

    run.wait_for_progress(2)  # attempt 1 dies before the first checkpoint is in place
    assert run.outcomes[0] == "FAILED" and run.attempts[1]["steps_before"] == [-1], run.story()
    killed = time.time()
    os.kill(process_of(run.job, 1), signal.SIGKILL)
    run.wait_for_progress(3)
    ended = (run.path / "logs/attempt-0002/tasks.txt").stat().st_mtime  # srun's last word
    assert ended - killed < 10, run.story()
    run.cluster.run("scancel", "--signal=USR2", run.job)
    run.wait_for_progress(4)
    shorten_time_limit(run)
    run.wait(lambda: run.outcomes[3:] == ["PREEMPTED"])
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    run.wait_for_end()

    assert run.outcomes == ["FAILED", "FAILED", "PREEMPTED", "PREEMPTED", "FINISHED"], run.story()
    assert {attempt["job"] for attempt in run.attempts} == {run.job}
    whole.wait_for_end()
    assert whole.outcomes == ["FINISHED"], whole.story()
    for module in find_checkpoint(run.path)[1].modules:
        expected, found = (read_weights(one.path, module) for one in (whole, run))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), f"{module} differs"

    attempts = doctor.find_attempts(run.path)
    first, second = diagnose(attempts[0]), diagnose(attempts[1])
    assert (first.rank, first.node) == (0, "n1") and "SIGKILL" in first.cause
    assert (second.rank, second.node) == (1, "n2") and "SIGKILL" in second.cause


def test_a_finished_run_and_a_bad_configuration(new_run):
    """The real command line's exit codes reach the ledger."""
    run = new_run("bad")
    run.submit("train.steps=5", "train.global_batch_size=31")
    run.wait_for_end()
    assert run.outcomes == ["CONFIGURATION"], run.story()
    assert "cannot be split evenly" in diagnose(doctor.find_attempts(run.path)[0]).cause
