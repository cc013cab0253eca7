"""Sampling speed (reAR Fig. 5): images per second with the cache of keys and values, and the time of every step.

Time per token as decoding goes on shows that a step costs the work of its rows and an attention over those before them:
nothing that grows is copied.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.assembly import build_generator, build_sampler, load_tokenizer, require_generator_recipe
from megavar.config.analyses.throughput import ThroughputAnalysis
from megavar.config.recipes.base import GENERATOR_MODULE
from megavar.parallel.environment import device_name
from megavar.run_samples import default_conditions
from megavar.training.checkpoint.weights import load_weights


class Throughput(Analysis[ThroughputAnalysis]):
    """Drawing is timed on this device."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Draw, and read scores."""
        values, arrays, lines = {}, {}, []
        for run in runs:
            images, steps = self._drawing(run)
            found = {"images_per_second": images, "steps": float(len(steps))}
            found |= {f"seconds_at_step_{n}": float(steps[n - 1]) for n in self.choice.steps if n <= len(steps)}
            score = best_score(run.directory, self.choice.metric)
            values[run.name] = found | ({} if score is None else {self.choice.metric: score})
            arrays[f"{run.name}/seconds"] = steps
            words = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in values[run.name].items())
            lines.append(f"{run.name}, {self.choice.batch} images together on {device_name()}: {words}")
        figure = _draw(values, arrays, self.choice.metric, device_name())
        return Report(
            values[runs[0].name], values | {"device": device_name()}, arrays, {"": figure}, "\n".join(lines)
        )  # fmt: skip

    @torch.no_grad()
    def _drawing(self, run: Subject) -> tuple[float, np.ndarray]:
        """Images per second, and the seconds of every call of the generator, float64 [steps]; medians of repeats."""
        config, device, batch = run.config, run.device, self.choice.batch
        generator: Any = build_generator(config, None)
        load_weights(generator, run.directory, GENERATOR_MODULE, ema=config.sampling.weights == "ema")
        tokenizer = load_tokenizer(config.tokenizer, require_generator_recipe(config).tokenizer_weights, device)
        sampler = build_sampler(config, generator.to(device).eval(), tokenizer, default_conditions(config), device)
        step, seconds = generator.step, []

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = step(*arguments, **options)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
            return result

        generator.step = timed
        whole, each = [], []
        for repeat in range(self.choice.repeats + 1):
            seconds.clear()
            began = time.perf_counter()
            sampler.draw(torch.arange(repeat * batch, (repeat + 1) * batch))  # images on the CPU: all is done
            whole.append(time.perf_counter() - began)
            each.append(list(seconds))
        return batch / statistics.median(whole[1:]), np.median(np.array(each[1:]), axis=0)


def best_score(directory: Path, metric: str) -> float | None:
    """Of the run's newest scored checkpoint; None where none is scored by it."""
    found: dict[str, float] = {}
    for path in sorted(directory.glob("scores-*.json")):
        content = json.loads(path.read_text())
        for name, value in content["metrics"].items():
            if metric in (name, name.partition("@")[0]):
                found[str(content.get("checkpoint", {}).get("checkpoint"))] = value
    return found[max(found)] if found else None


def _draw(values: dict[str, dict[str, float]], arrays: dict[str, np.ndarray], metric: str, device: str) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    speed, steps = figure.subplots(1, 2)
    for name, found in values.items():
        speed.plot(found["images_per_second"], found.get(metric, 0.0), "o", label=name)
        steps.plot(np.arange(1, len(arrays[f"{name}/seconds"]) + 1), 1e3 * arrays[f"{name}/seconds"], label=name)
    speed.set(title=f"speed and score ({device})", xlabel="images per second", ylabel=metric, xscale="log")
    steps.set(title="time of each step of decoding", xlabel="step", ylabel="ms", ylim=(0, None))
    for axes in (speed, steps):
        axes.legend(fontsize=8)
    return figure
