"""Post-mortem of a run: ``python -m launchers.doctor RUN_DIRECTORY [--attempt N] [--json]``.

Names the rank, node and step at which the last attempt that failed went wrong, the likely remedy, and where the time of
the run went. Reads only files; what it relies on is described in launchers/run_logs.py, history.py and progress.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launchers.diagnosis import Attempt, Diagnosis, diagnose
from launchers.progress import Ledger, LedgerError, is_done, newest_checkpoint_step
from megavar.errors import DataError, ExitCode
from megavar.paths import as_path
from megavar.records.history import STATES, AttemptSummary, read_metrics, summarize
from megavar.records.run import RunRecord
from megavar.wording import clock, duration

_GOOD = ("FINISHED", "PREEMPTED")


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launchers.doctor", description=__doc__.split("\n")[0])
    parser.add_argument("run_directory", type=as_path)
    parser.add_argument("--attempt", type=int, help="explain this attempt instead of the last one that failed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    given = parser.parse_args(arguments)
    try:
        attempts = find_attempts(given.run_directory)
    except LedgerError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    if not attempts:
        print(
            f"{given.run_directory} holds no logs of a run. Give the directory that run.directory names.",
            file=sys.stderr,
        )
        return ExitCode.CONFIGURATION
    chosen = _choose(attempts, given.attempt, is_done(given.run_directory))
    if given.attempt is None and chosen is not None and "outcome" not in chosen.entry and _life(given.run_directory):
        chosen = None  # the attempt that trains now
    diagnosis = diagnose(chosen) if chosen is not None else None
    entries = [attempt.entry for attempt in attempts if attempt.entry]
    rows = summarize(entries, read_metrics(given.run_directory), time.time())
    life = _life(given.run_directory)
    if given.json:
        print(json.dumps(_as_json(chosen, diagnosis, rows) | {"lives": life}, indent=2))
    else:
        print(_report(given.run_directory, chosen, diagnosis, rows, life))
    return ExitCode.FINISHED


def find_attempts(run_directory: Path) -> list[Attempt]:
    """All attempts of a run, oldest first; a run that was started without a launcher has one, without an entry."""
    logs = run_directory / "logs"
    entries = Ledger(run_directory).attempts
    if not entries:
        return [Attempt({}, logs)] if list(logs.glob("rank-*.log")) else []
    return [Attempt(entry, logs / f"attempt-{entry['attempt']:04d}", _batch_log(logs, entry)) for entry in entries]


def _batch_log(logs: Path, entry: dict[str, Any]) -> str:
    """The part of the job's log that belongs to this attempt: jobs that were requeued append to one file."""
    path = logs / f"slurm-{entry.get('job')}.out"
    if not path.exists():
        return ""
    _, begin, rest = path.read_text(errors="replace").partition(f"begins attempt {entry['attempt']} ")
    return (begin + rest).partition(f"begins attempt {entry['attempt'] + 1} ")[0]


def _choose(attempts: list[Attempt], number: int | None, done: bool) -> Attempt | None:
    if number is not None:
        found = [attempt for attempt in attempts if attempt.entry.get("attempt") == number]
        if not found:
            raise SystemExit(f"There is no attempt {number}; the run has {len(attempts)}.")
        return found[0]
    last = attempts[-1]
    if done and not last.entry:
        return None
    failed = [attempt for attempt in attempts if attempt.entry.get("outcome") not in _GOOD]
    if failed and failed[-1] is last and "outcome" not in last.entry and last.entry and len(failed) > 1:
        return failed[-2] if not last.task_ends else last  # the last one still runs
    return failed[-1] if failed else None


def _report(
    run_directory: Path,
    attempt: Attempt | None,
    diagnosis: Diagnosis | None,
    rows: list[AttemptSummary],
    life: dict[str, Any] | None,
) -> str:
    lines = [f"{run_directory}: {_state(run_directory)}", *_living(life), ""]
    if diagnosis is None:
        lines.append("No attempt has failed.")
    else:
        number = attempt.entry.get("attempt") if attempt else None
        lines += [
            f"Cause{f' of the end of attempt {number}' if number else ''}: {diagnosis.cause}",
            f"  rank    {'all alike' if diagnosis.rank is None else diagnosis.rank}",
            f"  node    {diagnosis.node or '-'}",
            f"  step    {'before the first' if diagnosis.step is None else diagnosis.step}",
            f"  remedy  {diagnosis.remedy}",
        ]
        if diagnosis.consequences:
            lines.append(f"  ({diagnosis.consequences} failures on other ranks followed from it)")
        if diagnosis.evidence:
            lines += ["", diagnosis.evidence]
    return "\n".join([*lines, "", *_table(rows)])


def _life(run_directory: Path) -> dict[str, Any] | None:
    """What a living run does now; None of one that nobody trains, and of one that has no configuration yet."""
    try:
        record = RunRecord.read(run_directory)
    except DataError:
        return None
    if not record.alive or record.done:
        return None
    return {
        "step": record.step, "total_steps": record.total, "images_per_second": record.images_per_second,
        "seconds_left": record.seconds_left, "loss": record.loss, "trend": record.trend,
        "alerts": [alert["message"] for alert in record.alerts],
    }  # fmt: skip


def _living(life: dict[str, Any] | None) -> list[str]:
    if life is None:
        return []
    parts = [f"step {life['step']} of {life['total_steps'] or '?'}"]
    if life["loss"] is not None:
        parts.append(f"loss {life['loss']:.3f} {life['trend']}".strip())
    if life["images_per_second"] is not None:
        parts.append(f"{life['images_per_second']:.4g} images/s")
    if life["seconds_left"] is not None:
        parts.append(f"{duration(life['seconds_left'])} left")
    return [f"It lives: {', '.join(parts)}", *(f"  ALERT {message}" for message in life["alerts"])]


def _state(run_directory: Path) -> str:
    if is_done(run_directory):
        return "finished"
    step = newest_checkpoint_step(run_directory)
    return f"not finished; newest checkpoint: step {step}" if step >= 0 else "not finished; no checkpoint yet"


def _table(rows: list[AttemptSummary]) -> list[str]:
    if not rows:
        return []
    lines = [
        f"{'attempt':>7} {'job':>8} {'nodes':>5} {'outcome':<13} {'from':>8} {'kept':>8} {'lost':>6}  "
        + " ".join(f"{state:>9}" for state in STATES)
    ]
    for row in rows:
        lines.append(
            f"{row.attempt:>7} {row.job:>8} {row.nodes:>5} {row.outcome:<13} {row.first_step:>8} "
            f"{row.kept_step:>8} {row.lost_steps:>6}  "
            + " ".join(f"{clock(row.seconds[state]):>9}" for state in STATES)
        )
    totals = {state: sum(row.seconds[state] for row in rows) for state in STATES}
    total = sum(totals.values()) or 1.0
    lines += [
        "",
        f"{len(rows) - 1} restarts, {sum(row.lost_steps for row in rows)} steps lost. "
        + ", ".join(f"{state} {totals[state] / total:.0%}" for state in STATES),
    ]
    return lines


def _as_json(attempt: Attempt | None, diagnosis: Diagnosis | None, rows: list[AttemptSummary]) -> dict[str, Any]:
    return {
        "attempt": attempt.entry.get("attempt") if attempt else None,
        "diagnosis": asdict(diagnosis) if diagnosis else None,
        "attempts": [{**asdict(row), "lost_steps": row.lost_steps} for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
