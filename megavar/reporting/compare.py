"""Runs side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megavar import storage
from megavar.pictures import stacked
from megavar.reporting.curves import curve, validation
from megavar.reporting.facts import RunFacts, differences
from megavar.reporting.scores import columns, latest, metrics_of, number, suites

ROWS = 8
"""Steps at which losses are compared, at most."""


def compared(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Settings, losses and scores, for programs."""
    scored = {run.name: run.scores for run in runs}
    names = [run.name for run in runs]
    return {
        "runs": {run.name: str(run.path) for run in runs},
        "differences": {key: dict(zip(names, values)) for key, values in
                        differences({run.name: run.config for run in runs})},
        "loss": {step: dict(zip(names, losses)) for step, losses in equal_steps(runs)},
        "scores": {suite: columns(scored, suite) for suite in suites(scored)},
    }  # fmt: skip


def equal_steps(runs: Sequence[RunFacts]) -> list[tuple[int, list[float]]]:
    """Losses at steps that all runs have logged, evenly chosen, with the last such step."""
    losses = [{line["step"]: float(line["loss"]) for line in run.record.lines if "loss" in line} for run in runs]
    common = sorted(set(losses[0]).intersection(*losses[1:])) if losses else []
    if len(common) > ROWS:
        common = [common[round(index * (len(common) - 1) / (ROWS - 1))] for index in range(ROWS)]
    return [(step, [found[step] for found in losses]) for step in common]


def in_words(runs: Sequence[RunFacts]) -> str:
    """For the terminal."""
    names = [run.name for run in runs]
    parts = [_table("setting", names, [(key, [_short(value) for value in values]) for key, values in
                                      differences({run.name: run.config for run in runs})],
                    "Configurations are the same.")]  # fmt: skip
    parts.append(_table("loss at step", names, [(str(step), [f"{loss:.4f}" for loss in found]) for step, found in
                                                equal_steps(runs)], "No step was logged by all runs."))  # fmt: skip
    scored = {run.name: run.scores for run in runs}
    for suite in suites(scored):
        rows = columns(scored, suite)
        metrics = metrics_of([s for found in scored.values() for s in latest(found) if s.suite == suite])
        lines = [(metric.heading, [number(rows.get(name, {}).get(metric.key)) for name in names]) for metric in metrics]
        parts.append(_table(suite, names, lines, ""))
    return "\n\n".join(parts)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 36 else text[:33] + "..."


def _table(head: str, names: list[str], rows: list[tuple[str, list[str]]], empty: str) -> str:
    if not rows:
        return empty
    lines = [[head, *names], *([key, *cells] for key, cells in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def write(runs: Sequence[RunFacts], out: Path) -> list[Path]:
    """``compare.json``, ``curves.png`` and ``samples.png`` (of the last step of which all have a preview)."""
    paths = [out / "compare.json"]
    storage.write_json_atomic(paths[0], compared(runs))
    for name, figure in (("loss", curve(runs, "loss")), ("validation", validation(runs))):
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            paths.append(out / f"{name}.png")
            storage.write_bytes_atomic(paths[-1], buffer.getvalue())
    if (pictures := _previews(runs)) is not None:
        with storage.atomic_file(out / "samples.png") as file:
            stacked(pictures).save(file, "PNG")
        paths.append(out / "samples.png")
    return paths


def _previews(runs: Sequence[RunFacts]) -> list[tuple[str, Image.Image]] | None:
    """Previews of equal seeds at one step, or at each run's last where no step is common."""
    found = [dict(run.previews) for run in runs]
    if not all(found):
        return None
    common = set(found[0]).intersection(*found[1:])
    pictures = []
    for run, previews in zip(runs, found):
        step = max(common or previews)
        seed = (run.config.get("sampling") or {}).get("seed", 0)
        with Image.open(previews[step]) as opened:
            pictures.append((f"{run.name}, step {step}, seed {seed}", opened.convert("RGB")))
    return pictures
