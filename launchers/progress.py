"""Counts attempts of a run and decides what follows when one ends.

The batch script (and ``launchers.local``) calls ``begin`` before the ranks start and ``end`` after they stopped, so
that attempts which die while importing count too. The ledger ``restarts.json`` in the run directory lists every
attempt; progress means that the newest checkpoint (``checkpoints/step-*/manifest.json``), of the run itself or of a run
that it requires and trains first, is newer than when the attempt began.

Runs on the host outside any container: standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavar.errors import ExitCode
from megavar.notify import HURRY, PATIENCE, notify
from megavar.storage import write_json_atomic

NO_CHECKPOINT = -1

FINISH, RESTART, REPLACE, CANCEL, STOP, HOLD = "finish", "restart", "replace", "cancel", "stop", "hold"
"""What the batch script does next: nothing is left; start again; start again without the bad nodes; cancel the queued
jobs of this run because starting again cannot help; leave everything as it is (an operator cancelled the job); hold the
run in the queue, because attempts that cannot be counted might go on for ever."""

_DECISIVE = (ExitCode.NO_PROGRESS, ExitCode.CONFIGURATION, ExitCode.NON_FINITE, ExitCode.PREFLIGHT, ExitCode.HANG)
_TASK_EXIT = re.compile(r"error: \S+: tasks? [\d,-]+: Exited with exit code (\d+)")
_CHECKPOINT_NAME = re.compile(r"step-(\d+)")


class Ledger:
    """The attempts of one run, kept in ``restarts.json``."""

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self.path = run_directory / "restarts.json"
        self.attempts: list[dict[str, Any]] = []
        self.counted_from = 0
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text())
                self.attempts, self.counted_from = content["attempts"], content["counted_from"]
            except (ValueError, KeyError, TypeError) as error:
                raise LedgerError(
                    f"{self.path} is damaged ({error}). It only counts attempts: move it away and start again."
                ) from error

    def save(self) -> None:
        """Write the ledger atomically."""
        write_json_atomic(self.path, {"counted_from": self.counted_from, "attempts": self.attempts})

    def without_progress(self, steps_now: list[int]) -> int:
        """Attempts at the end of the list that ended without another newest checkpoint than they began with.

        ``steps_now`` are the newest checkpointed steps at this moment. After a fresh start (``train.fresh``) they are
        below those of the run before, but they are progress.
        """
        count, after = 0, steps_now
        for attempt in reversed(self.attempts[self.counted_from :]):
            before = attempt["steps_before"]
            if len(after) != len(before) or any(new not in (old, NO_CHECKPOINT) for new, old in zip(after, before)):
                break
            count, after = count + 1, before
        return count

    def forgive(self) -> None:
        """Count from here on: whoever starts the run again after it was stopped has looked at it."""
        self.counted_from = len(self.attempts)


class LedgerError(ValueError):
    """The ledger cannot be read."""


def newest_checkpoint_step(run_directory: Path) -> int:
    """The highest step of which a checkpoint with a manifest exists, or ``NO_CHECKPOINT``."""
    steps = [NO_CHECKPOINT]
    for manifest in (run_directory / "checkpoints").glob("step-*/manifest.json"):
        match = _CHECKPOINT_NAME.fullmatch(manifest.parent.name)
        if match:
            steps.append(int(match[1]))
    return max(steps)


def is_done(run_directory: Path) -> bool:
    """Whether the run has reached and saved its last step."""
    return (run_directory / "DONE").exists()


def begin(
    run_directory: Path,
    required: Sequence[Path] = (),
    *,
    maximum: int,
    job: str = "",
    nodes: Sequence[str] = (),
    tasks_per_node: int = 1,
) -> tuple[ExitCode, int]:
    """Enter a new attempt.

    Args:
        run_directory: the run.
        required: directories of the runs that are trained first where they are not finished yet.
        maximum: attempts allowed in a row without a newer checkpoint.
        job: number of the Slurm job.
        nodes: names of the nodes, in the order of their ranks.
        tasks_per_node: consecutive ranks on each of them.

    Returns the exit code the batch script must leave with (``FINISHED`` also means: go on) and the attempt's number,
    0 where no attempt may start because the run is done or makes no progress.
    """
    if is_done(run_directory):
        return ExitCode.FINISHED, 0
    ledger = Ledger(run_directory)
    steps = [newest_checkpoint_step(path) for path in (*required, run_directory)]
    if ledger.without_progress(steps) >= maximum:
        ledger.forgive()
        ledger.save()
        return ExitCode.NO_PROGRESS, 0
    number = len(ledger.attempts) + 1
    ledger.attempts.append(
        {
            "attempt": number,
            "job": job,
            "nodes": list(nodes) or [socket.gethostname()],
            "tasks_per_node": tasks_per_node,
            "started": time.time(),
            "steps_before": steps,
        }
    )
    ledger.save()
    return ExitCode.FINISHED, number


def end(
    run_directory: Path,
    required: Sequence[Path] = (),
    *,
    maximum: int,
    attempt: int,
    status: int,
    task_messages: str = "",
    stop_requested: bool = False,
    terminated: bool = False,
    bad_nodes: bool = False,
) -> tuple[ExitCode, str]:
    """Close an attempt.

    Args:
        run_directory: the run.
        required: as for :func:`begin`.
        maximum: as for :func:`begin`.
        attempt: the number that :func:`begin` gave.
        status: exit status of srun.
        task_messages: what srun printed; it names the exit code of each task, which ``status`` may hide.
        stop_requested: the scheduler announced the time limit or a preemption.
        terminated: the job was cancelled.
        bad_nodes: preflight named nodes that must be replaced.

    Returns the exit code of the job and the next action. Where the ledger cannot be written (the disk is full), the run
    is held instead of started again.
    """
    outcome = classify(
        status, exit_codes_of_tasks(task_messages), done=is_done(run_directory), stop_requested=stop_requested
    )
    action = _action(outcome, terminated=terminated and not stop_requested, bad_nodes=bad_nodes)
    steps = [newest_checkpoint_step(path) for path in (*required, run_directory)]
    try:
        ledger = Ledger(run_directory)
        if action in (RESTART, REPLACE) and ledger.without_progress(steps) >= maximum:
            outcome, action = ExitCode.NO_PROGRESS, CANCEL
        for entry in ledger.attempts:
            if entry["attempt"] == attempt:
                entry.update(ended=time.time(), steps_after=steps, status=status, outcome=outcome.name, action=action)
        if action in (CANCEL, STOP):
            ledger.forgive()
        ledger.save()
    except (OSError, LedgerError) as error:
        print(f"{run_directory}: attempt {attempt} cannot be recorded: {error}", file=sys.stderr)
        action = HOLD if action in (RESTART, REPLACE) else action
    return outcome, action


def tell(run_directory: Path, attempt: int, code: ExitCode, action: str, *, hurry: bool = False) -> None:
    """Let the operator's command know how an attempt ended, if there is one (``notify`` of the cluster file).

    It may be slow, so nothing waits for it: ``action`` is under way already. With ``hurry`` it gets a few seconds only.
    """
    kind = "finished" if code == ExitCode.FINISHED else "stopped" if action in (CANCEL, STOP, HOLD) else (
        "preempted" if code == ExitCode.PREEMPTED else "failed"
    )  # fmt: skip
    step = newest_checkpoint_step(run_directory)
    words = {
        "finished": "the run is trained",
        "preempted": "asked to stop and saved",
        "failed": f"goes on from step {max(step, 0)}, its last checkpoint",
        "stopped": f"waits for a person: python -m launchers.doctor {run_directory}",
    }
    message = f"attempt {attempt}: {code.name}; {words[kind]}"
    notify(
        _name_of(run_directory), str(run_directory), kind, message, attempt=attempt, outcome=code.name, step=step,
        patience=HURRY if hurry else PATIENCE,
    )  # fmt: skip


def _name_of(run_directory: Path) -> str:
    """``run.name`` of its configuration, read without a YAML library; the folder's name where there is none."""
    try:
        match = re.search(r"^run:\n +name: (\S+)$", (run_directory / "config.yaml").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else run_directory.name


def classify(status: int, tasks: list[int], *, done: bool, stop_requested: bool) -> ExitCode:
    """The meaning of an attempt's end.

    ``srun -K`` terminates the other ranks as soon as one has failed and returns the highest status, usually 143 from
    SIGTERM. A rank that left with one of our codes therefore decides, whatever srun returned.
    """
    if done:
        return ExitCode.FINISHED
    codes = {status, *tasks}
    for code in _DECISIVE:
        if code in codes:
            return code
    if ExitCode.PREEMPTED in codes:
        return ExitCode.PREEMPTED
    if stop_requested and status in (0, 128 + signal.SIGUSR2):  # the latter: asked while it still imported
        return ExitCode.PREEMPTED
    return ExitCode.FAILED


def _action(outcome: ExitCode, *, terminated: bool, bad_nodes: bool) -> str:
    if outcome == ExitCode.FINISHED:
        return FINISH
    if outcome in (ExitCode.CONFIGURATION, ExitCode.NON_FINITE, ExitCode.NO_PROGRESS):
        return CANCEL
    if terminated:
        return STOP
    return REPLACE if outcome == ExitCode.PREFLIGHT and bad_nodes else RESTART


def exit_codes_of_tasks(task_messages: str) -> list[int]:
    """Exit codes in srun's messages such as ``srun: error: n2: task 1: Exited with exit code 7``."""
    return [int(code) for code in _TASK_EXIT.findall(task_messages)]


def main(arguments: list[str]) -> int:
    """``begin`` prints the attempt's number (nothing where none may start), ``end`` the next action; ``tell`` lets the
    operator know when that has been taken.
    """
    parser = argparse.ArgumentParser(prog="launchers.progress", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("run_directory", type=Path)
        command.add_argument("required", type=Path, nargs="*")
        command.add_argument("--maximum", type=int, required=True)
    commands.choices["end"].add_argument("--attempt", type=int, required=True)
    commands.choices["end"].add_argument("--status", type=int, required=True)
    commands.choices["end"].add_argument("--task-messages", type=Path)
    commands.choices["end"].add_argument("--stop-requested", type=int, choices=(0, 1), default=0)
    commands.choices["end"].add_argument("--terminated", type=int, choices=(0, 1), default=0)
    commands.choices["end"].add_argument("--bad-nodes", type=Path)
    command = commands.add_parser("tell")
    command.add_argument("run_directory", type=Path)
    command.add_argument("--attempt", type=int, required=True)
    command.add_argument("--code", type=lambda text: ExitCode(int(text)), required=True)
    command.add_argument("--action", required=True)
    given = parser.parse_args(arguments)
    try:
        if given.command == "tell":
            tell(given.run_directory, given.attempt, given.code, given.action)
            return ExitCode.FINISHED
        if given.command == "begin":
            code, number = begin(
                given.run_directory,
                given.required,
                maximum=given.maximum,
                job=os.environ.get("SLURM_JOB_ID", ""),
                nodes=_nodes_of_job(),
                tasks_per_node=int(os.environ.get("SLURM_NTASKS_PER_NODE", "").strip() or 1),
            )
            if number:
                print(number)
            elif code == ExitCode.NO_PROGRESS:
                print(
                    f"{given.maximum} attempts in a row ended without a newer checkpoint. Find the cause with: "
                    f"python -m launchers.doctor {given.run_directory}",
                    file=sys.stderr,
                )
            return code
        code, action = end(
            given.run_directory,
            given.required,
            maximum=given.maximum,
            attempt=given.attempt,
            status=given.status,
            task_messages=_text_of(given.task_messages),
            stop_requested=bool(given.stop_requested),
            terminated=bool(given.terminated),
            bad_nodes=bool(_text_of(given.bad_nodes).strip()),
        )
        print(action)
        if code == ExitCode.FINISHED and given.status:
            print(
                f"The run is trained, but what came after it ended with status {given.status}. To score it: "
                f"python -m launchers.slurm evaluate {given.run_directory}/config.yaml --nodes N",
                file=sys.stderr,
            )
        return code
    except LedgerError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    except OSError as error:
        print(f"This attempt cannot be counted: {error}. Mend the file system of the run directory.", file=sys.stderr)
        return ExitCode.PREFLIGHT


def _nodes_of_job() -> list[str]:
    """Names of the job's nodes; Slurm's own shorthand for them where scontrol does not answer; none outside a job."""
    shorthand = os.environ.get("SLURM_JOB_NODELIST", "")
    if not shorthand:
        return []
    try:
        command = ["scontrol", "show", "hostnames", shorthand]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return [shorthand]
    return result.stdout.split() or [shorthand]


def _text_of(path: Path | None) -> str:
    return path.read_text(errors="replace") if path is not None and path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
