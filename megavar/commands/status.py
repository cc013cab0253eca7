"""``megavar status [RUN ...]``: one line per run, from what the runs have written down."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from megavar.errors import DataError, ExitCode
from megavar.paths import as_path
from megavar.records.run import RunRecord

SUBJECT = None
RUNS = Path("runs")
HEAD = ("run", "state", "step", "loss", "images/s", "left", "starts", "events", "disk")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and how to show them."""
    parser.add_argument("runs", nargs="*", type=as_path, metavar="RUN", help=f"directories (default: all in {RUNS})")
    parser.add_argument("--json", action="store_true", help="print values for programs")
    parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="again and again")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command.

    Raises:
        DataError: there are no runs, or a directory is none.
    """
    while True:
        paths = options.runs or sorted(path.parent for path in RUNS.glob("*/config.yaml"))
        if not paths:
            raise DataError(f"There are no runs in {RUNS.absolute()}. Name their directories: megavar status RUN ...")
        rows = [values(RunRecord.read(path)) for path in paths]
        print(json.dumps(rows, indent=2) if options.json else table(rows), flush=True)
        if options.watch is None:
            return ExitCode.FINISHED
        time.sleep(options.watch)
        print(flush=True)


def values(record: RunRecord) -> dict[str, Any]:
    """Of one run, for programs: seconds, bytes, steps."""
    return {
        "run": record.name, "directory": str(record.path), "state": record.state, "step": record.step,
        "total_steps": record.total, "loss": record.loss, "trend": record.trend,
        "images_per_second": record.images_per_second, "seconds_left": record.seconds_left, "starts": record.starts,
        "events": len(record.events), "disk_bytes": record.disk_bytes,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """For people: aligned, one line per run."""
    cells = [HEAD, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    left = ("run", "state")
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in zip(HEAD, line, widths)
        ).rstrip()
        for line in cells
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    total = "?" if row["total_steps"] is None else f"{row['total_steps']}"
    return (
        row["run"], row["state"], f"{row['step']}/{total}",
        "-" if row["loss"] is None else f"{row['loss']:.3f} {row['trend'] or ' '}",
        "-" if row["images_per_second"] is None else f"{row['images_per_second']:.4g}",
        "-" if row["seconds_left"] is None else _duration(row["seconds_left"]),
        str(row["starts"]), str(row["events"]), f"{row['disk_bytes'] / 1e9:.2f} GB",
    )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"
