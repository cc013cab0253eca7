"""Scores as a table for people: which direction is better, which thresholds hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A metric: its ``key``, the ``better`` direction, and a ``threshold`` that a good model meets."""

    key: str
    better: Literal["lower", "higher"] | None = None
    threshold: float | None = None

    def heading(self) -> str:
        """The key with an arrow, and the threshold if there is one."""
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[self.better]
        if self.threshold is None:
            return self.key + arrow
        return f"{self.key}{arrow} {'≤' if self.better == 'lower' else '≥'}{self.threshold:g}"

    def met(self, value: float) -> bool:
        """Whether ``value`` meets the threshold (always, where there is none; NaN never does)."""
        if self.threshold is None or self.better is None:
            return True
        return value <= self.threshold if self.better == "lower" else value >= self.threshold


def format_table(rows: Mapping[str, Mapping[str, float]], metrics: Sequence[Metric] | None = None) -> str:
    """Lay out ``{name: {metric: value}}`` as text: metrics downwards, what is compared side by side.

    A value that meets the threshold of its metric is followed by ``✓``, one that misses it by ``✗``. Without
    ``metrics`` all metrics are shown in order of first appearance; a missing value shows ``-``.
    """
    if metrics is None:
        metrics = [Metric(key) for key in dict.fromkeys(key for row in rows.values() for key in row)]
    headings = [name.split() for name in rows]  # one word a line, so that long names do not widen the table
    height = max(len(words) for words in headings)
    head = [["", *(words[i - height] if i >= height - len(words) else "" for words in headings)] for i in range(height)]
    body = [[metric.heading(), *(_cell(metric, row.get(metric.key)) for row in rows.values())] for metric in metrics]
    widths = [max(len(line[i]) for line in head + body) for i in range(len(rows) + 1)]
    return "\n".join(
        [
            *(_line(line, widths) for line in head),
            "  ".join("-" * width for width in widths),
            *(_line(line, widths) for line in body),
        ]
    )


def thresholds_missed(row: Mapping[str, float], metrics: Sequence[Metric]) -> list[str]:
    """Keys of the metrics whose threshold ``row`` does not meet (a missing metric does not meet it)."""
    return [metric.key for metric in metrics if not metric.met(row.get(metric.key, float("nan")))]


def _cell(metric: Metric, value: float | None) -> str:
    if value is None:
        return "-"
    mark = "  " if metric.threshold is None else (" ✓" if metric.met(value) else " ✗")
    return f"{value:.3f}{mark}" if abs(value) < 10 else f"{value:.1f}{mark}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))
    return "  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()
