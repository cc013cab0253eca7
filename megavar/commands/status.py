"""``megavar status [RUN ...]``: one line per run, from what it has written down and one look into Slurm's queue."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from megavar.errors import DataError, ExitCode
from megavar.paths import as_path
from megavar.records.jobs import QueuedJob, queue
from megavar.records.prometheus import exposition
from megavar.records.run import RunRecord
from megavar.storage import write_text_atomic
from megavar.wording import duration, size

SUBJECT = None
RUNS = Path("runs")
LEFT = ("run", "state", "job", "alerts")
"""Columns of words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and how to show them."""
    parser.add_argument("runs", nargs="*", type=as_path, metavar="RUN", help=f"directories (default: all in {RUNS})")
    parser.add_argument("--json", action="store_true", help="print values for programs")
    parser.add_argument("--prometheus", type=as_path, metavar="FILE", help="also write FILE for node_exporter")
    parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="again and again")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command.

    Raises:
        DataError: there are no runs, or a directory is none.
    """
    try:
        while True:
            _look(options)
            if options.watch is None:
                return ExitCode.FINISHED
            time.sleep(options.watch)
    except KeyboardInterrupt:
        return ExitCode.FINISHED


def _look(options: argparse.Namespace) -> None:
    paths = options.runs or sorted(path.parent for path in RUNS.glob("*/config.yaml"))
    if not paths:
        raise DataError(f"There are no runs in {RUNS.absolute()}. Name their directories: megavar status RUN ...")
    records = [RunRecord.read(path) for path in paths]
    jobs = queue() or {}
    rows = [values(record, next(iter(jobs.get(record.job_name, [])), None)) for record in records]
    if options.prometheus is not None:
        write_text_atomic(options.prometheus, exposition(rows))
    if options.watch is not None and sys.stdout.isatty():
        print("\033[H\033[2J" + time.strftime("%H:%M:%S"))
    print(json.dumps(rows, indent=2) if options.json else table(rows), flush=True)


def values(record: RunRecord, job: QueuedJob | None = None) -> dict[str, Any]:
    """Of one run, for programs: seconds, bytes, steps."""
    state, held_out = record.state_with(job), record.validation_points
    lives = state in ("running", "starting", "queued", "held")
    last = record.attempts[-1] if record.attempts else {}
    return {
        "run": record.name,
        "directory": str(record.path),
        "state": state,
        "job": job.number if job is not None else None,
        "nodes": [] if not lives else [job.nodes] if job is not None and job.nodes else last.get("nodes", []),
        "waits_for": job.reason if job is not None and job.state == "PENDING" else None,
        "step": record.step,
        "total_steps": record.total,
        "loss": record.loss,
        "trend": record.trend,
        "validation_loss": held_out[-1][1] if held_out else None,
        "reference": record.verdict,
        "images_per_second": record.images_per_second,
        "seconds_left": record.seconds_left,
        "restarts": record.restarts,
        "lost_steps": record.lost_steps,
        "disk_bytes": record.disk_bytes,
        "device_hours": record.device_hours,
        "planned_device_hours": record.planned_hours,
        "alerts": [{key: alert[key] for key in ("kind", "message", "step")} for alert in record.alerts],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For people: aligned, one line per run; columns in which no run has anything are left out."""
    cells = [_cells(row) for row in rows]
    if len({row["run"] for row in rows}) < len(rows):  # seeds of one run, say: their folders tell them apart
        cells = [line | {"run": f"{row['run']} ({Path(row['directory']).name})"} for line, row in zip(cells, rows)]
    names = [name for name in cells[0] if name in LEFT[:2] or any(row[name] not in ("", "-") for row in cells)]
    lines = [{name: name for name in names}, *cells]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    return "\n".join(
        "  ".join(
            line[name].ljust(widths[name]) if name in LEFT else line[name].rjust(widths[name]) for name in names
        ).rstrip()
        for line in lines
    )


def _cells(row: dict[str, Any]) -> dict[str, str]:
    total = "?" if row["total_steps"] is None else f"{row['total_steps']}"
    hours, plan = row["device_hours"], row["planned_device_hours"]
    nodes = row["nodes"] if len(row["nodes"]) < 3 else [f"{len(row['nodes'])} nodes"]
    place = " ".join(filter(None, [row["job"], *nodes, f"({row['waits_for']})" if row["waits_for"] else None]))
    held_out = "-" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
    return {
        "run": row["run"],
        "state": row["state"],
        "job": place or "-",
        "step": f"{row['step']}/{total}",
        "loss": "-" if row["loss"] is None else f"{row['loss']:.3f} {row['trend'] or ' '}",
        "held out": f"{held_out} {row['reference']}" if row["reference"] else held_out,
        "images/s": "-" if row["images_per_second"] is None else f"{row['images_per_second']:.4g}",
        "left": "-" if row["seconds_left"] is None else duration(row["seconds_left"]),
        "restarts": str(row["restarts"] or "-"),
        "lost": str(row["lost_steps"] or "-"),
        "disk": size(row["disk_bytes"]),
        "device h": f"{hours:.3g}" + (f" of {plan:.3g}" if plan is not None else ""),
        "alerts": ", ".join(alert["kind"] for alert in row["alerts"]) or "-",
    }
