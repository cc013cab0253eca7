"""Curves to compare with: another run's, or a stored one with a band over seeds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from megavar.errors import DataError
from megavar.paths import found
from megavar.records.run import RunRecord
from megavar.reporting.facts import RunFacts


@dataclass(frozen=True)
class Reference:
    """One curve; with a band where it is of several seeds."""

    name: str
    metric: str
    """``loss`` or ``validation/loss``."""
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @classmethod
    def read(cls, path: Path) -> "Reference":
        """Of a run directory (its training loss), or a file of ``configs/tables/curves``.

        Raises:
            DataError: it is neither.
        """
        path = found(path)
        if path.is_dir():
            record = RunRecord.read(path)
            pairs = [(line["step"], line["loss"]) for line in record.lines if "loss" in line]
            if not pairs:
                raise DataError(f"{path} has logged no loss. Name a run that was trained.")
            steps, values = np.array(pairs, dtype=float).T
            return cls(record.name, "loss", steps, values)
        try:
            stored = json.loads(path.read_text())
            arrays = [np.array(stored[key], dtype=float) for key in ("steps", "mean", "low", "high")]
            if len({len(array) for array in arrays}) != 1:
                raise ValueError("steps, mean, low and high differ in length")
            return cls(str(stored["name"]), str(stored["metric"]), *arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no reference curve ({type(error).__name__}: {error}). Give a run directory, or a JSON file "
                f"with name, metric, steps, mean, low and high."
            ) from None

    def draw(self, axes: Axes, metric: str) -> None:
        """Into a figure of ``metric``; nothing if it is another's."""
        if metric != self.metric:
            return
        axes.plot(self.steps, self.mean, color="0.5", linewidth=1, linestyle="--", label=self.name)
        if self.low is not None and self.high is not None:
            axes.fill_between(self.steps, self.low, self.high, color="0.5", alpha=0.2, linewidth=0)


def named_by(runs: Sequence[RunFacts]) -> list[Reference]:
    """Those that configurations name and that are still there."""
    names = dict.fromkeys((run.config.get("validation") or {}).get("reference") for run in runs)
    references = []
    for name in names:
        if name:
            try:
                references.append(Reference.read(Path(name)))
            except DataError:
                continue
    return references
