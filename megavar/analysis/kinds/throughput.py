"""Throughput against a score (SAR Fig. 1b): a point per run, as large as its number of parameters."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.kinds.times import drawing_times
from megavar.config.analyses.throughput import ThroughputAnalysis
from megavar.errors import ConfigError
from megavar.parallel.environment import device_name


class Throughput(Analysis[ThroughputAnalysis]):
    """Drawing is timed on this device; the score is the run's last one."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Measure and read."""
        choice, device, values = self.choice, device_name(), {}
        for run in runs:
            score = last_score(run.directory, choice.metric)
            if score is None:
                raise ConfigError(f"{run.name} has no score {choice.metric!r}: run `megavar evaluate` on it first.")
            times = drawing_times(run, choice.batch, choice.repeats)
            values[run.name] = {
                "images_per_second": 1 / times["seconds_per_image"],
                "parameters_millions": times["parameters_millions"],
                "score": score,
            }
        lines = [f"{name}: {found['images_per_second']:.1f} images/s (batch {choice.batch}) on {device}, "
                 f"{choice.metric} {found['score']:.4g}, {found['parameters_millions']:.1f} M parameters"
                 for name, found in values.items()]  # fmt: skip
        figure = _draw(values, choice.metric, f"images per second ({device}, batch {choice.batch})")
        return Report(values[runs[0].name], values | {"device": device}, {}, {"": figure}, "\n".join(lines))


def last_score(directory: Path, metric: str) -> float | None:
    """Of the checkpoint with most steps that was scored, by its name or by what stands before ``@``."""
    found: dict[str, float] = {}
    for path in sorted(directory.glob("scores-*.json")):
        content = json.loads(path.read_text())
        for key, value in content["metrics"].items():
            if metric in (key, key.partition("@")[0]):
                found[str(content["checkpoint"].get("checkpoint", ""))] = value
    steps = [name for name in found if name.startswith("step-")]
    return found[max(steps)] if steps else None


def _draw(values: dict[str, dict[str, float]], metric: str, label: str) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    largest = max(found["parameters_millions"] for found in values.values())
    for name, found in values.items():
        place = found["images_per_second"], found["score"]
        axes.scatter(*place, s=60 + 340 * found["parameters_millions"] / largest, alpha=0.6)
        axes.annotate(name, place, xytext=(8, 6), textcoords="offset points", fontsize=8)
    axes.set(title="Throughput and quality; area: parameters", xlabel=label, ylabel=metric)
    axes.margins(0.25)
    axes.grid(alpha=0.3)
    return figure
