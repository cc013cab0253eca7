"""``megavar report RUN [RUN ...]``: one page, its figures and tables, from what runs have written down."""

import argparse
from pathlib import Path

from megavar.errors import ExitCode
from megavar.paths import as_path

SUBJECT = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where the report goes."""
    parser.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help="run directories; several are compared")
    parser.add_argument("--out", type=as_path, help="folder of the report (default: report/ of the first run)")
    parser.add_argument(
        "--reference", action="append", default=[], type=as_path, metavar="CURVE",
        help="a curve to lay over: another run, or a file of configs/tables/curves; repeat",
    )  # fmt: skip


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command.

    Raises:
        DataError: a directory is no run, or a reference no curve.
    """
    from megavar.reporting.facts import RunFacts
    from megavar.reporting.reference import Reference
    from megavar.reporting.report import write

    runs = RunFacts.read(options.runs)
    references = [Reference.read(path) for path in options.reference]
    out: Path = options.out or runs[0].path / "report"
    page = write(runs, out, references)
    for facts in runs:
        print(f"{facts.name}: {facts.verdict[1]}")
    print(f"report: {page} ({page.stat().st_size / 1e6:.2f} MB); figures/*.pdf, table.tex and scores.csv beside it")
    return ExitCode.FINISHED
