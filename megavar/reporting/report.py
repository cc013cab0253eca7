"""A report as files: page, figures, tables."""

from collections.abc import Sequence
from pathlib import Path

from megavar import storage
from megavar.reporting.curves import figures, save_all
from megavar.reporting.facts import RunFacts
from megavar.reporting.page import render
from megavar.reporting.reference import Reference, named_by
from megavar.reporting.scores import as_csv, as_tex


def write(runs: Sequence[RunFacts], out: Path, references: Sequence[Reference] = ()) -> Path:
    """Write ``report.html``, ``figures/*.pdf``, ``table.tex`` and ``scores.csv`` into ``out``; return the page.

    Curves that runs name themselves (``validation.reference``) are laid over without being asked for.
    """
    drawn = figures(runs, [*references, *named_by(runs)])
    scored = {run.name: run.scores for run in runs}
    save_all(drawn, out / "figures", storage.write_bytes_atomic)
    storage.write_text_atomic(out / "table.tex", as_tex(scored))
    storage.write_text_atomic(out / "scores.csv", as_csv(scored))
    page = out / "report.html"
    storage.write_text_atomic(page, render(runs, drawn))
    return page
