"""Convergence of runs (MEPA Fig. 5, with and without semantic guidance): loss and scores over epochs, and speed-ups."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.config.analyses.convergence import ConvergenceAnalysis
from megavar.training.checkpoint.store import list_checkpoints, step_of

SMOOTHED = 0.05
"""Share of a run over which its logged curve is averaged before speeds are compared."""


@dataclass(frozen=True)
class Curve:
    """Values over training."""

    steps: np.ndarray
    epochs: np.ndarray
    values: np.ndarray


class Convergence(Analysis[ConvergenceAnalysis]):
    """Runs beside each other; the first one is compared with the others, which are its baselines."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Read logs and scores, measure checkpoints."""
        logged = {run.name: _logged(run.directory, self.choice.logged) for run in runs}
        held_out = {run.name: self._held_out(run, logged[run.name]) for run in runs}
        scores = {run.name: _scores(run.directory, self.choice.metric, logged[run.name]) for run in runs}
        curves = {
            f"{self.choice.logged} in training": logged,
            "loss on test images": held_out,
            self.choice.metric: scores,
        }
        shown = {
            title: found for title, found in curves.items() if any(len(curve.steps) > 1 for curve in found.values())
        }
        speed = {run.name: speed_up(logged[runs[0].name], logged[run.name]) for run in runs[1:]}
        metrics = {f"last_{self.choice.logged}": float(smoothed(logged[runs[0].name].values)[-1])}
        metrics |= {f"speed_up_over_{name}": factor for name, factor in speed.items() if math.isfinite(factor)}
        arrays = {f"{name}/{title}/{part}": getattr(curve, part) for title, found in curves.items()
                  for name, curve in found.items() for part in ("steps", "epochs", "values")}  # fmt: skip
        values = {name: {title: [float(value) for value in found[name].values] for title, found in curves.items()}
                  for name in logged}  # fmt: skip
        lines = [_compared(runs[0].name, name, factor) for name, factor in speed.items()]
        return Report(metrics, values, arrays, {"": _draw(shown)}, "\n".join(lines))

    def _held_out(self, run: Subject, logged: Curve) -> Curve:
        """Loss per token of every kept checkpoint on test images."""
        steps, values = [], []
        for checkpoint in reversed(list_checkpoints(run.directory / "checkpoints")):
            seen = list(run.observer(checkpoint).watch(self.choice.images, self.choice.batch))
            steps.append(step_of(checkpoint))
            values.append(sum(one.loss for one in seen) / sum(one.valid for one in seen))
        return _curve(steps, values, logged)


def _curve(steps: Sequence[int], values: Sequence[float], logged: Curve | None = None) -> Curve:
    """``logged``: says which epoch a step is."""
    at = np.array(steps, dtype=np.float64)
    epochs = at if logged is None or not len(logged.steps) else np.interp(at, logged.steps, logged.epochs)
    return Curve(at, epochs, np.array(values, dtype=np.float64))


def _logged(directory: Path, name: str) -> Curve:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if name in line and "epoch" in line]
    curve = _curve([line["step"] for line in lines], [line[name] for line in lines])
    return Curve(curve.steps, np.array([line["epoch"] for line in lines]), curve.values)


def _scores(directory: Path, metric: str, logged: Curve) -> Curve:
    """A score of every checkpoint that was scored, by its name or by what stands before ``@``."""
    found: dict[int, float] = {}
    for path in sorted(directory.glob("scores-*.json")):
        content = json.loads(path.read_text())
        name = str(content["checkpoint"].get("checkpoint", ""))
        value = next(
            (value for key, value in content["metrics"].items() if metric in (key, key.partition("@")[0])), None
        )
        if value is not None and name.startswith("step-"):
            found[step_of(Path(name))] = value
    return _curve(sorted(found), [found[step] for step in sorted(found)], logged)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over the last :data:`SMOOTHED` of the curve at every point."""
    width = max(1, round(SMOOTHED * len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def speed_up(run: Curve, baseline: Curve) -> float:
    """Steps of the baseline over those that ``run`` needs for its last value; infinite: it never gets there."""
    goal = smoothed(baseline.values)[-1]
    reached = np.flatnonzero(smoothed(run.values) <= goal)
    return float(baseline.steps[-1] / run.steps[reached[0]]) if len(reached) else math.inf


def _compared(run: str, baseline: str, factor: float) -> str:
    if math.isinf(factor):
        return f"{run} does not reach the last value of {baseline}"
    return f"{run} reaches the last value of {baseline} in 1/{factor:.2f} of its steps"


def _draw(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    figure = Figure(figsize=(5.2 * max(len(curves), 1), 4), layout="constrained")
    figure.suptitle("How fast the runs get better")
    grid = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axes, (title, found) in zip(grid, curves.items()):
        for number, (name, curve) in enumerate(found.items()):
            color = f"C{number}"
            if len(curve.steps) > 20:  # a log: faint as it is, strong as a mean
                axes.plot(curve.epochs, curve.values, color=color, alpha=0.25, linewidth=1)
                axes.plot(curve.epochs, smoothed(curve.values), color=color, label=name)
            else:
                axes.plot(curve.epochs, curve.values, marker="o", color=color, label=name)
        axes.set(title=title, xlabel="epochs", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
