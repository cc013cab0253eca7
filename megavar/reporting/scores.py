"""Result files of runs (``megavar/evaluation/results.py``), and the tables that go into a paper."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARROWS = {"lower": "↓", "higher": "↑"}
_TEX = {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "≤": r"$\leq$", "≥": r"$\geq$"}
_TEX |= {character: "\\" + character for character in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\^{}"}
_TEX["\\"] = r"\textbackslash{}"


@dataclass(frozen=True)
class Metric:
    """A line of the table."""

    key: str
    better: str | None = None
    """``lower``, ``higher``, or None."""
    threshold: float | None = None

    @property
    def heading(self) -> str:
        """``fid ↓ ≤60``."""
        words = [self.key, ARROWS.get(self.better or "", "")]
        if self.threshold is not None:
            words.append(f"{'≤' if self.better == 'lower' else '≥'}{self.threshold:g}")
        return " ".join(word for word in words if word)

    def met(self, value: float | None) -> bool | None:
        """Whether ``value`` meets the threshold; None: there is none."""
        if self.threshold is None or self.better is None:
            return None
        if value is None:
            return False
        return value <= self.threshold if self.better == "lower" else value >= self.threshold


@dataclass(frozen=True)
class Scored:
    """One result file."""

    path: Path
    suite: str
    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    table: tuple[Metric, ...] = ()
    count: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    """Its name, such as ``step-00000800``."""
    notes: tuple[str, ...] = ()
    untrained: bool = False
    """Of the weights with which the run began."""

    @property
    def missed(self) -> list[str]:
        """Metrics whose threshold is not met."""
        return [metric.key for metric in self.table if metric.met(self.metrics.get(metric.key)) is False]

    @property
    def guidance(self) -> float | None:
        """With which it was drawn."""
        value = self.sampler.get("guidance")
        return float(value) if isinstance(value, int | float) else None


Scores = Mapping[str, Sequence[Scored]]
"""Result files by run."""


def scores_of(run: Path) -> list[Scored]:
    """All result files in a run's directory, the newest last; what cannot be read is left out."""
    found = []
    for path in run.glob("scores-*.json"):
        try:
            content = json.loads(path.read_text())
            weights = content.get("checkpoint", {})
            scored = Scored(
                path,
                str(content["suite"]),
                {key: float(value) for key, value in content["metrics"].items()},
                content.get("baselines", {}),
                tuple(Metric(**line) for line in content.get("table", [])),
                int(content["count"]),
                content.get("sampler", {}),
                str(weights.get("checkpoint", "")),
                tuple(content.get("notes", ())),
                weights.get("checkpoint") == "initial weights",
            )
            found.append(scored)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda scored: (not scored.untrained, scored.checkpoint, scored.path.stat().st_mtime))


def metrics_of(scores: Sequence[Scored]) -> list[Metric]:
    """The lines of a table of ``scores``: those that the files name, then all others."""
    named = {metric.key: metric for scored in scores for metric in scored.table}
    others = dict.fromkeys(key for scored in scores for key in scored.metrics)
    return [*named.values(), *(Metric(key) for key in others if key not in named)]


def number(value: float | None) -> str:
    """Four significant digits at most."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def latest(scores: Sequence[Scored]) -> list[Scored]:
    """The newest of every suite, of trained weights."""
    return list({scored.suite: scored for scored in scores if not scored.untrained}.values())


def columns(scored: Scores, suite: str) -> dict[str, dict[str, float]]:
    """Metrics by run, then by baseline of the first run that has them, of the newest files of a suite."""
    newest = {name: [s for s in latest(found) if s.suite == suite] for name, found in scored.items()}
    runs = {name: found[0].metrics for name, found in newest.items() if found}
    baselines = next((found[0].baselines for found in newest.values() if found and found[0].baselines), {})
    return runs | {name: metrics for name, metrics in baselines.items() if name not in runs}


def suites(scored: Scores) -> list[str]:
    """All that runs were scored by."""
    return list(dict.fromkeys(s.suite for found in scored.values() for s in latest(found)))


def as_csv(scored: Scores) -> str:
    """One line per run, result file and metric; baselines follow their run's."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("run", "row", "suite", "checkpoint", "guidance", "samples", "metric", "value", "better",
                     "threshold", "met"))  # fmt: skip
    for run, found in scored.items():
        for result in found:
            for row, metric, value in _values(run, result):
                met = {None: "", True: "yes", False: "no"}[metric.met(value)]
                threshold = "" if metric.threshold is None else repr(metric.threshold)
                guidance = "" if result.guidance is None else repr(result.guidance)
                writer.writerow((run, row, result.suite, result.checkpoint, guidance, result.count, metric.key,
                                 repr(value), metric.better or "", threshold, met))  # fmt: skip
    return buffer.getvalue()


def _values(run: str, result: Scored) -> Iterator[tuple[str, Metric, float]]:
    for row, metrics in ({run: result.metrics} | result.baselines).items():
        for metric in metrics_of([result]):
            if metric.key in metrics:
                yield row, metric, metrics[metric.key]


def as_tex(scored: Scores) -> str:
    """A ``booktabs`` table per suite: runs and baselines downwards, metrics across; the best run in bold."""
    parts = ["% \\usepackage{booktabs}"]
    for suite in suites(scored):
        rows = columns(scored, suite)
        metrics = metrics_of([s for found in scored.values() for s in latest(found) if s.suite == suite])
        runs = [name for name in rows if name in scored]
        parts += [
            f"% {suite}", rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}", r"\toprule",
            " & ".join(["", *(tex(f"{m.key} {ARROWS.get(m.better or '', '')}".strip()) for m in metrics)]) + r" \\",
            r"\midrule",
        ]  # fmt: skip
        for index, (name, values) in enumerate(rows.items()):
            if index == len(runs) and index:
                parts.append(r"\midrule")
            cells = [_tex_cell(metric, name, values, rows, runs) for metric in metrics]
            parts.append(" & ".join([tex(name), *cells]) + r" \\")
        parts += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts) + "\n"


def _tex_cell(
    metric: Metric, name: str, values: dict[str, float], rows: dict[str, dict[str, float]], runs: list[str]
) -> str:
    text = number(values[metric.key]) if metric.key in values else "--"
    known = [rows[run][metric.key] for run in runs if metric.key in rows[run]]
    if name not in runs or len(known) < 2 or metric.better is None or metric.key not in values:
        return text
    best = min(known) if metric.better == "lower" else max(known)
    return rf"\textbf{{{text}}}" if values[metric.key] == best else text


def tex(text: str) -> str:
    """``text`` with what LaTeX would read as commands written out."""
    return "".join(_TEX.get(character, character) for character in text)
