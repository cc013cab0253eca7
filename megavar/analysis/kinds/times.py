"""Inference and epoch time (MEPA Table 7)."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.assembly import build_generator, build_sampler, load_tokenizer, require_generator_recipe
from megavar.config.analyses.times import TimesAnalysis
from megavar.config.recipes.base import GENERATOR_MODULE
from megavar.parallel.environment import device_name
from megavar.records.reading import metric_lines
from megavar.run_samples import default_conditions
from megavar.training.checkpoint.weights import load_weights


class Times(Analysis[TimesAnalysis]):
    """Drawing is timed on this device; epochs as the run's own log says, on its devices."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Measure and read."""
        batch, repeats = self.choice.batch, self.choice.repeats
        values = {run.name: drawing_times(run, batch, repeats) | epoch_times(run.directory) for run in runs}
        device = device_name()
        lines = [f"{name}: {found['seconds_per_image']:.4f} s per image (batch {self.choice.batch}) on {device}, "
                 f"{found.get('epoch_minutes', float('nan')):.2f} min per epoch, {found['parameters_millions']:.1f} M "
                 f"parameters" for name, found in values.items()]  # fmt: skip
        return Report(
            values[runs[0].name], values | {"device": device}, {}, {"": _draw(values, device)}, "\n".join(lines)
        )


@torch.no_grad()
def drawing_times(run: Subject, batch: int, repeats: int) -> dict[str, float]:
    """Seconds per image drawn with ``batch`` others, the median of ``repeats`` after one that does not count."""
    config, device = run.config, run.device
    generator = build_generator(config, None)
    load_weights(generator, run.directory, GENERATOR_MODULE, ema=config.sampling.weights == "ema")
    count = sum(parameter.numel() for parameter in generator.parameters())
    drawn = config.sampling.tokenizer_of(config.tokenizer)
    tokenizer = load_tokenizer(drawn, require_generator_recipe(config).tokenizer_weights, device)
    sampler = build_sampler(config, generator.to(device).eval(), tokenizer, default_conditions(config), device)
    seconds = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        sampler.draw(torch.arange(repeat * batch, (repeat + 1) * batch))  # images on the CPU: all is done
        seconds.append(time.perf_counter() - began)
    return {"seconds_per_image": statistics.median(seconds[1:]) / batch, "parameters_millions": count / 1e6}


def epoch_times(directory: Path) -> dict[str, float]:
    """Minutes of an epoch of steps, from the log: the median of lines, without what lies between steps."""
    lines = [line for line in metric_lines(directory) if "step_seconds" in line and line.get("epoch")]
    if not lines:
        return {}
    steps = statistics.median(line["step"] / line["epoch"] for line in lines)
    return {"epoch_minutes": statistics.median(line["step_seconds"] for line in lines) * steps / 60}


def _draw(values: dict[str, dict[str, float]], device: str) -> Figure:
    shown = {"seconds_per_image": f"seconds per drawn image\n({device})", "epoch_minutes": "minutes per training epoch",
             "parameters_millions": "parameters, millions"}  # fmt: skip
    figure = Figure(figsize=(12, 1.4 + 0.5 * len(values)), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(shown)), shown.items()):
        bars = axes.barh(list(values), [found.get(name, 0.0) for found in values.values()], color="tab:blue")
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_title(title, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.2)
    return figure
