"""The doctor on the remains of runs that failed in known ways.

Logs are written in the formats of megavar/logs.py, Python, faulthandler and srun; the gloo and NCCL messages are those
that real runs printed.
"""

import json
from pathlib import Path

import pytest

from launchers import doctor
from launchers.diagnosis import diagnose
from launchers.run_logs import expand
from megavar.records.history import read_metrics, summarize

GLOO = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:52414: "
    "Connection reset by peer"
)
NCCL = (
    "torch.distributed.DistBackendError: NCCL communicator was aborted on rank 2. Original reason for failure was: "
    "[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=812, OpType=ALLREDUCE) ran for 600029 ms"
)


def stamp(seconds: float) -> str:
    return f"2026-08-22T12:{int(seconds // 60):02d}:{seconds % 60:06.3f}Z"


def line(rank: int, seconds: float, step: int | str, text: str, level: str = "INFO") -> str:
    return f"{stamp(seconds)} rank={rank} step={step} {level} {text}\n"


def traceback(exception: str, place: str = '  File "/code/megavar/training/trainer.py", line 90, in run') -> str:
    return f"Traceback (most recent call last):\n{place}\n    self._loop(stop)\n    ^^^^^^^^^^^^^^^^\n{exception}\n"


def crash(rank: int, seconds: float, step: int, exception: str) -> str:
    """As the trainer does: logged with its time, then printed once more by Python."""
    logged = line(rank, seconds, step, f"Ended by an exception after step {step}.", "CRITICAL")
    return logged + traceback(exception) + traceback(exception)


class Remains:
    """A run directory with one attempt."""

    def __init__(self, path: Path, outcome: str = "FAILED", nodes: tuple[str, ...] = ("n1", "n2"), per_node: int = 2,
                 action: str = "restart", ended: bool = True):  # fmt: skip
        self.path = path
        self.logs = path / "logs/attempt-0001"
        self.logs.mkdir(parents=True)
        entry = {"attempt": 1, "job": "7", "nodes": nodes, "tasks_per_node": per_node, "started": 0.0,
                 "steps_before": [-1]}  # fmt: skip
        if ended:
            entry |= {"ended": 60.0, "steps_after": [-1], "outcome": outcome, "action": action}
        (path / "restarts.json").write_text(json.dumps({"counted_from": 0, "attempts": [entry]}))

    def rank(self, number: int, text: str) -> None:
        (self.logs / f"rank-{number:04d}.log").write_text(text)

    def tasks(self, text: str) -> None:
        (self.logs / "tasks.txt").write_text(text)

    def diagnosis(self):
        (attempt,) = doctor.find_attempts(self.path)
        return diagnose(attempt)


def test_an_exception_and_the_timeouts_it_caused(tmp_path):
    remains = Remains(tmp_path)
    remains.rank(0, line(0, 1, "-", "Continuing after step 100 of 500.") + crash(0, 50, 120, GLOO))
    remains.rank(1, crash(1, 45, 120, NCCL))
    remains.rank(2, crash(2, 40.5, 120, NCCL))
    remains.rank(3, crash(3, 40.6, 120, "FileNotFoundError: [Errno 2] No such file or directory: '/data/shard-17.tar'"))
    remains.tasks("srun: error: n1: task 2: Exited with exit code 1\nsrun: error: n2: tasks 0-1,3: Terminated\n")
    found = remains.diagnosis()
    assert (found.rank, found.node, found.step) == (3, "n2", 120)
    assert "shard-17.tar" in found.cause
    assert found.consequences == 3
    assert "rank-0003.log" in found.evidence


def test_the_earliest_of_several_real_exceptions(tmp_path):
    remains = Remains(tmp_path)
    remains.rank(0, crash(0, 30, 12, "ValueError: the second"))
    remains.rank(1, crash(1, 29, 12, "OSError: [Errno 28] No space left on device"))
    found = remains.diagnosis()
    assert found.rank == 1
    assert "disk is full" in found.remedy


def test_the_first_of_chained_exceptions_is_the_cause(tmp_path):
    remains = Remains(tmp_path)
    because = "\nThe above exception was the direct cause of the following exception:\n\n"
    chained = traceback("KeyError: 'label'") + because + traceback(NCCL)
    remains.rank(0, line(0, 3, 5, "x") + chained)
    remains.rank(1, crash(1, 2, 5, GLOO))
    found = remains.diagnosis()
    assert (found.rank, found.cause) == (0, "KeyError: 'label'")


def test_a_killed_rank_that_said_nothing(tmp_path):
    remains = Remains(tmp_path)
    remains.rank(0, line(0, 5, 31, "x") + crash(0, 41, 33, GLOO))
    for rank in (1, 2):
        remains.rank(rank, crash(rank, 40, 33, GLOO))
    remains.rank(3, "")
    remains.tasks(
        "srun: error: n2: task 3: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=7.1\n"
        "srun: error: n1: tasks 0-1: Exited with exit code 1\nsrun: error: n2: task 2: Terminated\n"
    )
    found = remains.diagnosis()
    assert (found.rank, found.node, found.step) == (3, "n2", 33)
    assert "SIGKILL" in found.cause
    assert found.consequences == 3


def test_a_killed_rank_whose_victim_ended_first(tmp_path):
    """As a real Slurm said it: nodes report in any order, so SIGKILL may as well have been srun's own last word."""
    remains = Remains(tmp_path, per_node=1)
    remains.rank(0, line(0, 5, 31, "x"))
    remains.rank(1, crash(1, 41, 33, GLOO))
    remains.tasks(
        "srun: error: n2: task 1: Exited with exit code 1\nsrun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
        "srun: error: n1: task 0: Killed\nsrun: Force Terminated StepId=7.0\n"
    )
    found = remains.diagnosis()
    assert (found.rank, found.node) == (0, "n1")
    assert "rank 0: Killed" in found.cause


ABORT = """[rank{rank}]:[E822 12:10:29.5 ProcessGroupNCCL.cpp:632] [Rank {rank}] Watchdog caught collective timeout
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank {rank}] Process group watchdog thread terminated with exception: {why}
Exception raised from run at ProcessGroupNCCL.cpp:681 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x9d (0x7f3d6ff5c13d in libc10.so)
"""
TIMEOUT = "[Rank {rank}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=812, OpType=ALLREDUCE)"


def test_processes_that_nccl_aborts_are_not_the_cause(tmp_path):
    """The rank with the exception hung at its end; the others waited until NCCL's watchdog aborted them."""
    remains = Remains(tmp_path)
    for rank in (0, 1, 2):
        remains.rank(rank, ABORT.format(rank=rank, why=TIMEOUT.format(rank=rank)))
    remains.rank(3, crash(3, 28, 120, "KeyError: 'label'"))
    remains.tasks(
        "srun: error: n1: task 0: Aborted (core dumped)\nsrun: error: n1: task 1: Terminated\n"
        "srun: error: n2: task 2: Aborted (core dumped)\nsrun: error: n2: task 3: Killed\n"
    )
    found = remains.diagnosis()
    assert (found.rank, found.node, found.step, found.cause) == (3, "n2", 120, "KeyError: 'label'")
    assert found.consequences == 3


def test_a_rank_that_was_stuck_until_nccl_aborted_the_others(tmp_path):
    remains = Remains(tmp_path)
    for rank in (0, 1, 2):
        remains.rank(rank, ABORT.format(rank=rank, why=TIMEOUT.format(rank=rank)))
    remains.rank(3, line(3, 2, "-", "Continuing.", "WARNING"))
    remains.tasks("srun: error: n1: tasks 0-1: Aborted (core dumped)\nsrun: error: n2: task 3: Killed\n")
    found = remains.diagnosis()
    assert (found.rank, found.node) == (3, "n2")
    assert "OpType=ALLREDUCE" in found.cause


def test_a_gpu_that_fails_is_named_though_nccl_says_so(tmp_path):
    remains = Remains(tmp_path)
    for rank in (0, 1, 2):
        remains.rank(rank, ABORT.format(rank=rank, why=TIMEOUT.format(rank=rank)))
    remains.rank(3, ABORT.format(rank=3, why="CUDA error: uncorrectable ECC error encountered"))
    remains.tasks("srun: error: n1: tasks 0-1: Aborted (core dumped)\nsrun: error: n2: tasks 2-3: Aborted\n")
    found = remains.diagnosis()
    assert (found.rank, found.node) == (3, "n2")
    assert "exclude it" in found.remedy


@pytest.mark.parametrize(
    ("how", "log"), [("Out Of Memory", ""), ("Killed", "slurmstepd: error: Detected 1 oom_kill event")]
)
def test_a_rank_that_ran_out_of_memory(tmp_path, how, log):
    remains = Remains(tmp_path)
    remains.rank(0, crash(0, 40, 33, GLOO))
    remains.rank(1, log)
    remains.tasks(f"srun: error: n1: task 1: {how}\n")
    found = remains.diagnosis()
    assert found.rank == 1
    assert "out of memory" in found.cause
    assert "more memory" in found.remedy


def test_a_non_finite_stop_is_all_ranks_alike(tmp_path):
    remains = Remains(tmp_path, outcome="NON_FINITE")
    message = (
        "Loss or gradient of var-d16 was not finite in the last 4 steps up to 1203, and train.recovery.rollbacks=2"
    )
    for rank in range(4):
        skipped = line(rank, 20, 1203, "Step 1203 was not applied: its loss or gradient is not finite.", "WARNING")
        remains.rank(rank, skipped + f"megavar train: error: {message} are used up.\n")
    remains.tasks("srun: error: n1: task 1: Exited with exit code 86\nsrun: error: n2: tasks 2-3: Terminated\n")
    found = remains.diagnosis()
    assert (found.rank, found.node, found.step) == (None, None, 1203)
    assert "not finite" in found.cause
    assert "optimizer.lr" in found.remedy


STACK = """Thread 0x00007f1bf1dde6c0 (most recent call first):
  File "/code/megavar/training/watchdog.py", line 80 in _watch

Thread 0x00007f1bf2c26b80 (most recent call first):
{frames}
"""
WAITING = (
    '  File "/venv/torch/distributed/distributed_c10d.py", line 2810 in all_reduce\n  File "/code/x.py", line 2 in f'
)
READING = '  File "/code/megavar/data/reading.py", line 41 in read\n  File "/code/x.py", line 9 in f'


def test_a_hang_names_the_rank_that_does_not_wait(tmp_path):
    remains = Remains(tmp_path, outcome="HANG")
    for rank in range(4):
        hang = line(
            rank, 300 + rank, 77, "HANG: no step for 300 s after step 77 (limit 300 s). Stacks follow.", "CRITICAL"
        )
        remains.rank(rank, hang + STACK.format(frames=READING if rank == 2 else WAITING))
    found = remains.diagnosis()
    assert (found.rank, found.node, found.step) == (2, "n2", 77)
    assert "reading.py" in found.cause


def test_a_rank_without_stacks_is_the_one_that_hangs(tmp_path):
    """It stands in native code and holds the interpreter's lock, or its node is gone."""
    remains = Remains(tmp_path, outcome="HANG")
    for rank in range(3):
        hang = line(rank, 300, 77, "HANG: no step for 300 s.", "CRITICAL")
        remains.rank(rank, hang + STACK.format(frames=WAITING))
    remains.rank(3, line(3, 2, 5, "x", "WARNING"))
    remains.tasks("srun: error: n1: task 1: Exited with exit code 87\nsrun: error: n2: task 3: Killed\n")
    found = remains.diagnosis()
    assert (found.rank, found.node, found.step) == (3, "n2", 77)
    assert "left no stacks" in found.cause


def test_a_hang_that_held_the_interpreter_until_the_last_timer(tmp_path):
    remains = Remains(tmp_path, outcome="FAILED")
    remains.rank(0, line(0, 300, 77, "HANG: no step for 300 s.", "CRITICAL") + STACK.format(frames=WAITING))
    remains.rank(1, line(1, 3, 5, "x", "WARNING") + "Timeout (0:11:00)!\n" + STACK.format(frames=READING))
    remains.tasks("srun: error: n1: task 0: Exited with exit code 87\nsrun: error: n1: task 1: Killed\n")
    found = remains.diagnosis()
    assert (found.rank, found.node) == (1, "n1")
    assert "reading.py" in found.cause


def test_a_hang_of_all_in_one_collective_blames_nobody(tmp_path):
    remains = Remains(tmp_path, outcome="HANG")
    for rank in range(4):
        hang = line(rank, 300, 77, "HANG: no step for 300 s.", "CRITICAL")
        remains.rank(rank, hang + STACK.format(frames=WAITING))
    found = remains.diagnosis()
    assert found.rank is None
    assert "network" in found.remedy


def test_a_rank_that_is_silent_while_all_others_lose_it(tmp_path):
    remains = Remains(tmp_path)
    for rank in range(3):
        remains.rank(rank, crash(rank, 40 + rank, 9, GLOO))
    remains.rank(3, line(3, 2, "-", "Continuing.", "WARNING"))
    found = remains.diagnosis()
    assert (found.rank, found.node) == (3, "n2")


@pytest.mark.parametrize("spoke", [True, False])
def test_the_first_node_is_gone_and_with_it_the_batch_script(tmp_path, spoke):
    """Whether the other node's ranks still say that they lost it is a matter of luck."""
    remains = Remains(tmp_path, ended=False)
    remains.rank(0, line(0, 30, 14, "loss"))
    remains.rank(2, crash(2, 31, 14, GLOO) if spoke else line(2, 30, 14, "loss"))
    remains.tasks("")
    found = remains.diagnosis()
    assert "vanished" in found.cause
    assert (found.rank, found.node, found.step) == (None, "n1" if spoke else None, 14)
    assert found.consequences == spoke


def test_a_taken_port_is_the_masters_own_failure(tmp_path):
    """As torch 2.15 said it."""
    remains = Remains(tmp_path)
    taken = ("torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
             "port: 20002, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use")  # fmt: skip
    remains.rank(0, traceback(taken))
    remains.rank(1, "")
    remains.tasks("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 1: Terminated\n")
    found = remains.diagnosis()
    assert (found.rank, found.node) == (0, "n1")
    assert "port" in found.remedy


def test_slurm_ended_it(tmp_path):
    remains = Remains(tmp_path)
    remains.rank(0, line(0, 30, 14, "x"))
    (tmp_path / "logs/slurm-7.out").write_text(
        "Z job 7: begins attempt 1 on n[1-2]\nslurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-08-22T12:00:00 "
        "DUE TO TIME LIMIT ***\n"
    )
    remains.tasks("srun: error: n1: task 0: Killed\nsrun: error: n2: task 1: Terminated\n")  # as Slurm does then
    found = remains.diagnosis()
    assert "time limit" in found.cause
    assert found.step == 14


def test_a_requeue_is_not_the_cause_of_itself(tmp_path):
    remains = Remains(tmp_path)
    remains.rank(0, line(0, 30, 14, "x"))
    (tmp_path / "logs/slurm-7.out").write_text(
        "Z job 7: begins attempt 1 on n[1-2]\nZ job 7: ends attempt 1: srun status 139\n"
        "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-08-22T12:00:00 DUE TO JOB REQUEUE ***\n"
    )
    remains.tasks("srun: error: n2: task 1: Segmentation fault\n")
    assert "Segmentation fault" in remains.diagnosis().cause


def test_a_person_ended_it(tmp_path):
    remains = Remains(tmp_path, action="stop")
    remains.rank(0, line(0, 30, 14, "x"))
    remains.tasks("srun: error: n1: task 0: Killed\n")
    found = remains.diagnosis()
    assert (found.rank, found.step, found.cause) == (None, 14, "the job was cancelled (scancel)")


def test_preflight_ended_it(tmp_path):
    remains = Remains(tmp_path, outcome="PREFLIGHT")
    report = {
        "n1": [{"check": "gpus", "status": "pass", "detail": "8 idle GPUs"}],
        "n2": [{"check": "gpus", "status": "fail", "detail": "7 GPUs are visible, 8 are expected"}],
    }
    (remains.logs / "preflight.json").write_text(json.dumps(report))
    remains.tasks("srun: error: n1: task 0: Exited with exit code 90\nsrun: error: n2: task 1: Terminated\n")
    found = remains.diagnosis()
    assert (found.rank, found.node) == (None, "n2"), "the tasks of preflight are no ranks"
    assert "7 GPUs are visible" in found.cause
    assert "Exclude the nodes" in found.remedy


def test_a_configuration_error_before_the_first_step(tmp_path):
    remains = Remains(tmp_path, outcome="CONFIGURATION")
    for rank in range(2):
        remains.rank(rank, "megavar train: error: train.global_batch_size=7 cannot be split evenly over 2 ranks.\n")
    found = remains.diagnosis()
    assert found.rank is None
    assert "global_batch_size=7" in found.cause
    assert found.step is None


def test_groups_of_tasks():
    assert expand("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]


def test_history_counts_restarts_lost_steps_and_time(tmp_path):
    attempts = [
        {"attempt": 1, "job": "7", "nodes": ["n1"], "started": 0.0, "ended": 100.0, "steps_before": [-1],
         "steps_after": [30], "outcome": "FAILED"},
        {"attempt": 2, "job": "7", "nodes": ["n1"], "started": 130.0, "ended": 200.0, "steps_before": [30],
         "steps_after": [60], "outcome": "FINISHED"},
    ]  # fmt: skip
    kept = [{"time": 20.0, "step": 10}, {"time": 40.0, "step": 20},
            {"time": 60.0, "step": 30, "checkpoint_seconds": 5.0}, {"time": 150.0, "step": 40},
            {"time": 190.0, "step": 60, "checkpoint_seconds": 5.0}]  # fmt: skip
    discarded = [{"time": 80.0, "step": 40}, {"time": 95.0, "step": 48}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept) + '{"time": 1')
    (tmp_path / "metrics.discarded.jsonl").write_text("".join(json.dumps(record) + "\n" for record in discarded))
    first, second = summarize(attempts, read_metrics(tmp_path), now=300.0)
    assert (first.first_step, first.kept_step, first.reached_step, first.lost_steps) == (0, 30, 48, 18)
    assert first.seconds == {"waiting": 0, "starting": 20, "training": 35, "saving": 5, "repeated": 35, "stopping": 5}
    assert second.seconds == {"waiting": 30, "starting": 20, "training": 35, "saving": 5, "repeated": 0, "stopping": 10}
    assert second.lost_steps == 0


def test_report(tmp_path, capsys):
    remains = Remains(tmp_path)
    remains.rank(1, crash(1, 29, 12, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert doctor.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "rank    1" in text and "node    n1" in text and "step    12" in text and "micro_batch_size" in text
    assert doctor.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["diagnosis"]["rank"] == 1
    assert doctor.main([str(tmp_path / "nothing")]) == 2
    assert "holds no logs" in capsys.readouterr().err
