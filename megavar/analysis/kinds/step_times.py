"""Time of every step of decoding (reAR Fig. 5), with the cache of keys and values.

Time per token as decoding goes on shows that a step costs the work of its rows and an attention over those before them:
nothing that grows is copied.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.assembly import build_generator, build_sampler, load_tokenizer, require_generator_recipe
from megavar.config.analyses.step_times import StepTimesAnalysis
from megavar.config.recipes.base import GENERATOR_MODULE
from megavar.parallel.environment import device_name
from megavar.run_samples import default_conditions
from megavar.training.checkpoint.weights import load_weights


class StepTimes(Analysis[StepTimesAnalysis]):
    """Drawing is timed on this device."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Draw."""
        values, arrays, lines = {}, {}, []
        for run in runs:
            images, steps = self._drawing(run)
            found = {"images_per_second": images, "steps": float(len(steps))}
            found |= {f"seconds_at_step_{n}": float(steps[n - 1]) for n in self.choice.steps if n <= len(steps)}
            values[run.name], arrays[f"{run.name}/seconds"] = found, steps
            words = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in found.items())
            lines.append(f"{run.name}, {self.choice.batch} images together on {device_name()}: {words}")
        figures = {"": _draw(arrays, device_name())}
        return Report(values[runs[0].name], values | {"device": device_name()}, arrays, figures, "\n".join(lines))

    @torch.no_grad()
    def _drawing(self, run: Subject) -> tuple[float, np.ndarray]:
        """Images per second, and the seconds of every call of the generator, float64 [steps]; medians of repeats."""
        config, device, batch = run.config, run.device, self.choice.batch
        generator: Any = build_generator(config, None)
        load_weights(generator, run.directory, GENERATOR_MODULE, ema=config.sampling.weights == "ema")
        drawn = config.sampling.tokenizer_of(config.tokenizer)
        tokenizer = load_tokenizer(drawn, require_generator_recipe(config).tokenizer_weights, device)
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


def _draw(arrays: dict[str, np.ndarray], device: str) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, seconds in arrays.items():
        axes.plot(np.arange(1, len(seconds) + 1), 1e3 * seconds, label=name.removesuffix("/seconds"))
    axes.set(title=f"time of each step of decoding ({device})", xlabel="step", ylabel="ms", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure
