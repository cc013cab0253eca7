"""Convergence of runs: loss and scores over epochs, and speed-ups (MEPA Fig. 5, with and without semantic guidance; SAR
Fig. 1a, from scratch and from a trained model)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.config.analyses.convergence import ConvergenceAnalysis
from megavar.config.loading import load_config
from megavar.errors import ConfigError
from megavar.records.reading import json_object, metric_lines
from megavar.training.checkpoint.store import is_checkpoint_name, list_checkpoints, step_of

SMOOTHED = 0.05
"""Share of a run over which its logged curve is averaged before speeds are compared."""


@dataclass(frozen=True)
class Curve:
    """Values over training, of one run or in the mean of several."""

    steps: np.ndarray
    epochs: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None
    """Standard errors of the means; None: of one run."""


class Convergence(Analysis[ConvergenceAnalysis]):
    """Runs beside each other; the first is compared with the others, which are its baselines. Runs of one name (seeds:
    ``LABEL=RUN``) are one curve, their mean."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Read logs and scores, measure checkpoints."""
        groups: dict[str, list[Subject]] = {}
        for run in runs:
            groups.setdefault(run.name, []).append(run)
        parts = {name: [self._curves(run) for run in group] for name, group in groups.items()}
        titles = list(next(iter(parts.values()))[0])
        curves = {title: {name: together([part[title] for part in found]) for name, found in parts.items()}
                  for title in titles}  # fmt: skip
        shown = {
            title: found for title, found in curves.items() if any(len(curve.steps) > 1 for curve in found.values())
        }
        first, *baselines = groups
        logged = curves[titles[0]]
        speed = {name: speed_up(logged[first], logged[name]) for name in baselines}
        metrics = {f"last_{self.choice.logged}": float(smoothed(logged[first].values)[-1])}
        metrics |= {f"speed_up_over_{name}": factor for name, factor in speed.items() if math.isfinite(factor)}
        scored, lines = curves[self.choice.metric], [_compared(first, name, factor) for name, factor in speed.items()]
        for name in baselines if self.choice.better == "lower" else ():
            if len(scored[first].steps) > 1 and len(scored[name].steps) > 1:
                factor = speed_up(scored[first], scored[name])
                lines.append(f"by {self.choice.metric}: {_compared(first, name, factor)}")
                metrics |= {f"{self.choice.metric}_speed_up_over_{name}": factor} if math.isfinite(factor) else {}
        arrays = {f"{name}/{title}/{part}": value for title, found in curves.items() for name, curve in found.items()
                  for part, value in vars(curve).items() if value is not None}  # fmt: skip
        values = {name: {title: [float(value) for value in found[name].values] for title, found in curves.items()}
                  | {"runs": len(groups[name])} for name in groups}  # fmt: skip
        return Report(metrics, values, arrays, {"": _draw(shown)}, "\n".join(lines))

    def _curves(self, run: Subject) -> dict[str, Curve]:
        """Of one run by title, the logged one first."""
        logged = _logged(run.directory, self.choice.logged)
        curves = {
            f"{self.choice.logged} in training": logged,
            "loss on test images": self._held_out(run, logged),
            self.choice.metric: _scores(run, self.choice.metric, logged),
        }
        if not self.choice.continued:
            return curves
        steps, epochs = began_at(run)
        return {title: replace(curve, steps=curve.steps + steps, epochs=curve.epochs + epochs)
                for title, curve in curves.items()}  # fmt: skip

    def _held_out(self, run: Subject, logged: Curve) -> Curve:
        """Loss per token of every kept checkpoint on test images."""
        steps, values = [], []
        for checkpoint in reversed(list_checkpoints(run.directory / "checkpoints")):
            seen = list(run.observer(checkpoint).watch(self.choice.images, self.choice.batch))
            steps.append(step_of(checkpoint))
            values.append(sum(one.loss for one in seen) / sum(one.valid for one in seen))
        return _curve(steps, values, logged)


def began_at(run: Subject) -> tuple[int, float]:
    """Steps and epochs of the checkpoint with whose weights a run began, over all runs before it; 0: it began anew.

    Raises:
        ConfigError: the run that the checkpoint is of is not here any more.
    """
    initial = run.config.train.initial_weights
    if initial is None or not is_checkpoint_name(Path(initial.path)):
        return 0, 0.0
    steps, directory = step_of(Path(initial.path)), Path(initial.path).parent.parent
    logged = _logged(directory, "epoch")
    if not len(logged.steps):
        raise ConfigError(f"analysis.continued: {run.name} began with {initial.path}, but {directory} has no log.")
    before = began_at(Subject(load_config(str(directory)), run.device))
    return steps + before[0], float(np.interp(steps, logged.steps, logged.epochs)) + before[1]


def together(curves: Sequence[Curve]) -> Curve:
    """Mean and standard error at the steps that all have."""
    if len(curves) == 1:
        return curves[0]
    common = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
    kept = [np.isin(curve.steps, common) for curve in curves]
    values = np.stack([curve.values[keep] for curve, keep in zip(curves, kept)])
    errors = values.std(0, ddof=1) / math.sqrt(len(values))
    return Curve(np.array(common), curves[0].epochs[kept[0]], values.mean(0), errors)


def _curve(steps: Sequence[int], values: Sequence[float], logged: Curve | None = None) -> Curve:
    """``logged``: says which epoch a step is."""
    at = np.array(steps, dtype=np.float64)
    epochs = at if logged is None or not len(logged.steps) else np.interp(at, logged.steps, logged.epochs)
    return Curve(at, epochs, np.array(values, dtype=np.float64))


def _logged(directory: Path, name: str) -> Curve:
    lines = [line for line in metric_lines(directory) if name in line and "epoch" in line]
    curve = _curve([line["step"] for line in lines], [line[name] for line in lines])
    return Curve(curve.steps, np.array([line["epoch"] for line in lines]), curve.values)


def _scores(run: Subject, metric: str, logged: Curve) -> Curve:
    found = scores_by_step(run, metric)
    return _curve(sorted(found), [found[step] for step in sorted(found)], logged)


def scores_by_step(run: Subject, metric: str) -> dict[int, float]:
    """Of every checkpoint that was scored with the run's sampling.

    Args:
        metric: its name, or what stands before ``@``.
    """
    found: dict[int, float] = {}
    for path in sorted(run.directory.glob("scores-*.json")):
        content = json_object(path)
        if not content or not run.config.sampling.drew(content["sampler"]):
            continue
        name = str(content["checkpoint"].get("checkpoint", ""))
        value = next(
            (value for key, value in content["metrics"].items() if metric in (key, key.partition("@")[0])), None
        )
        if value is not None and name.startswith("step-"):
            found[step_of(Path(name))] = value
    return found


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
                axes.errorbar(curve.epochs, curve.values, curve.errors, marker="o", capsize=3, color=color, label=name)
        axes.set(title=title, xlabel="epochs", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
