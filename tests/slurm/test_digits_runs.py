"""The quickstart's recipe (STMoE-VAR on digits) on a real Slurm: whatever happens to a run, it ends with the same bits.

All runs are submitted as people do, on two nodes with one rank each, whose names do not resolve.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from launchers import doctor
from launchers.diagnosis import diagnose
from megavar.training.checkpoint import find_checkpoint, read_weights
from megavar.training.checkpoint.fault import PHASES
from tests.launchers.stubs import OF_A_RANK
from tests.slurm.conftest import REPOSITORY, WatchedRun, slow_steps

STEPS = 160
LOGGING = {"interval": 25, "samples_interval": None, "wandb": {"mode": "disabled"}}

# One restart for each phase of a save: the fault kills rank 0 in the first save of the attempt, then everything of the
# step is killed.
DIE_AT_EVERY_PHASE = f"""\
phases=({" ".join(PHASES)})
export MEGAVAR_FAULT=${{phases[${{SLURM_RESTART_COUNT:-0}}]-}}"""
KILL_THE_OTHERS_TOO = """\
if [ "$3" = train ] && [ -n "$MEGAVAR_FAULT" ]; then
    trap '' TERM USR2
    "$python" "$@"
    status=$?
    if [ "$status" = 137 ]; then scancel --signal=KILL "$SLURM_JOB_ID.$SLURM_STEP_ID"; sleep 30; fi
    exit "$status"
fi"""

# Slow steps: on any machine the run lasts longer than its jobs of two minutes, which are told 45 to 75 s after they
# begin (Slurm looks every 30 s) that they must end.
LINGER = slow_steps(0.6)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short quickstart: its tokenizer is trained first, by the first job, and serves all runs."""
    folder = tmp_path_factory.mktemp("digits")
    tokenizer, generator = folder / "tokenizer.yaml", folder / "digits.yaml"
    tokenizer.write_text(yaml.safe_dump({
        "base": str(REPOSITORY / "configs/quickstart/tokenizer.yaml"),
        "run": {"name": "tokenizer", "directory": str(folder / "tokenizer")},
        "train": {"steps": 20},
        "logging": LOGGING,
    }))  # fmt: skip
    generator.write_text(yaml.safe_dump({
        "base": str(REPOSITORY / "configs/quickstart.yaml"),
        "run": {"requires": [str(tokenizer)]},
        "recipe": {"tokenizer_weights": str(folder / "tokenizer")},
        "generator": {"depth": 2, "width": 48, "heads": 2},
        "train": {"steps": STEPS, "global_batch_size": 16, "checkpoint": {"interval": 20}},
        "logging": LOGGING,
        "evaluation": {"after_training": False}, "validation": None,
    }))  # fmt: skip
    return generator


@pytest.fixture(scope="module")
def uninterrupted(cluster, config, tmp_path_factory) -> WatchedRun:
    """A run that nothing happens to, submitted from the shell of a rank of another run."""
    run = WatchedRun(cluster, tmp_path_factory.mktemp("uninterrupted"), config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OF_A_RANK.items():
            patch.setenv(name, value)
        run.submit()
    return run


@pytest.fixture(scope="module")
def unattended(cluster, config, uninterrupted, tmp_path_factory) -> dict[str, WatchedRun]:
    """Runs to which everything happens by itself. They go on beside each other and beside the tests.

    The first meets the uninterrupted run at the tokenizer: one of them trains it, the other waits for it.
    """
    folder = tmp_path_factory.mktemp("unattended")
    limited = WatchedRun(cluster, folder / "limited", config, time="2", signal_lead_seconds=45, before=LINGER,
                         maximum_attempts_without_progress=20)  # fmt: skip  # on a busy machine a start takes a minute
    limited.submit()
    limited.wait(lambda: (config.parent / "tokenizer/DONE").exists())
    killed = WatchedRun(cluster, folder / "killed", config, setup=DIE_AT_EVERY_PHASE.splitlines(),
                        maximum_attempts_without_progress=len(PHASES),
                        before=KILL_THE_OTHERS_TOO)  # fmt: skip
    killed.submit()
    return {"limited": limited, "killed": killed}


def assert_same_weights(run: WatchedRun, expected: WatchedRun) -> None:
    expected.wait_for_end()
    assert expected.outcomes == ["FINISHED"], expected.story()
    for module in find_checkpoint(expected.path)[1].modules:
        theirs, ours = (read_weights(one.path, module) for one in (expected, run))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), f"{module} differs"


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


def test_a_killed_rank_and_a_signal(new_run, config, uninterrupted, unattended):
    """The step ends within ten seconds of the death of one of its ranks; the job requeues itself, then once more."""
    run = new_run("tried", config)
    run.submit()
    run.wait_for_progress(1)
    killed = time.time()
    os.kill(process_of(run.job, 1), signal.SIGKILL)
    run.wait_for_progress(2)
    ended = (run.path / "logs/attempt-0001/tasks.txt").stat().st_mtime  # srun's last word
    assert ended - killed < 10, run.story()
    run.cluster.run("scancel", "--signal=USR2", run.job)
    run.wait_for_end()
    assert run.outcomes == ["FAILED", "PREEMPTED", "FINISHED"], run.story()
    assert {attempt["job"] for attempt in run.attempts} == {run.job}
    assert_same_weights(run, uninterrupted)
    diagnosis = diagnose(doctor.find_attempts(run.path)[0])
    assert (diagnosis.rank, diagnosis.node) == (1, "n2") and "SIGKILL" in diagnosis.cause


def test_a_chain_of_three(new_run, config, uninterrupted, unattended):
    """One link is asked to stop through the batch script, one directly; the third finishes and cancels the fourth."""
    run = new_run("chain", config)
    run.submit("--chain", "4")
    assert len(run.jobs) == 4
    run.wait_for_progress(1)
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.jobs[0])
    run.wait_for_progress(2)
    run.cluster.run("scancel", "--signal=USR2", run.jobs[1])
    run.wait_for_end()
    assert run.outcomes == ["PREEMPTED", "PREEMPTED", "FINISHED"], run.story()
    assert [attempt["job"] for attempt in run.attempts] == run.jobs[:3]
    assert [run.cluster.state(job) for job in run.jobs] == ["FAILED", "FAILED", "COMPLETED", "CANCELLED"]
    assert (run.path / "DONE").exists()
    assert_same_weights(run, uninterrupted)


def test_death_between_any_two_phases_of_a_save(unattended, uninterrupted):
    run = unattended["killed"]
    run.wait_for_end()
    assert run.outcomes == ["FAILED"] * len(PHASES) + ["FINISHED"], run.story()
    starts = [attempt["steps_before"][-1] for attempt in run.attempts]
    complete = PHASES.index("before_latest")  # from this phase on the checkpoint counts
    assert starts == [-1] * (complete + 1) + [20] * (len(PHASES) - complete), run.story()
    for attempt in doctor.find_attempts(run.path)[: len(PHASES)]:
        diagnosis = diagnose(attempt)
        assert diagnosis.rank in (0, 1) and re.search("SIGKILL|rank 0: Killed", diagnosis.cause), diagnosis
    assert_same_weights(run, uninterrupted)


def test_a_time_limit_shorter_than_the_run(unattended, uninterrupted):
    run = unattended["limited"]
    run.wait_for_end()
    assert len(run.outcomes) > 1 and set(run.outcomes[:-1]) == {"PREEMPTED"}, run.story()
    assert run.outcomes[-1] == "FINISHED", run.story()
    assert {attempt["job"] for attempt in run.attempts} == {run.job}, "the job requeued itself"
    assert_same_weights(run, uninterrupted)


def test_a_run_that_two_others_require_is_trained_once(config, unattended):
    starts = (config.parent / "tokenizer/attempts.jsonl").read_text().splitlines()
    assert len(starts) == 1


def test_a_finished_run_and_a_bad_configuration(new_run, config, uninterrupted):
    """The real command line's exit codes reach the ledger; a finished run that is submitted again ends at once."""
    uninterrupted.wait_for_end()
    attempts = len(uninterrupted.attempts)
    uninterrupted.submit()
    uninterrupted.wait_for_end()
    assert uninterrupted.cluster.state(uninterrupted.jobs[-1]) == "COMPLETED"
    assert len(uninterrupted.attempts) == attempts
    run = new_run("bad", config)
    run.submit("train.global_batch_size=31")
    run.wait_for_end()
    assert run.outcomes == ["CONFIGURATION"], run.story()
    assert "cannot be split evenly" in diagnose(doctor.find_attempts(run.path)[0]).cause
