"""Throughput against a score (SAR Fig. 1b): a point per run, as large as its number of parameters."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.kinds.convergence import scores_by_step
from megavar.analysis.kinds.times import drawing_times
from megavar.config.analyses.throughput import ThroughputAnalysis
from megavar.errors import ConfigError
from megavar.parallel.environment import device_name


class Throughput(Analysis[ThroughputAnalysis]):
    """Drawing is timed on this device; the score is the run's last one with the same sampling."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Measure and read."""
        choice, device, values = self.choice, device_name(), {}
        for run in runs:
            score = last_score(run, choice.metric)
            if score is None:
                raise ConfigError(
                    f"{run.name} has no score {choice.metric!r} with this sampling: run `megavar evaluate` on it first."
                )
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


def last_score(run: Subject, metric: str) -> float | None:
    """Of the checkpoint with most steps that was scored."""
    found = scores_by_step(run, metric)
    return found[max(found)] if found else None


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
