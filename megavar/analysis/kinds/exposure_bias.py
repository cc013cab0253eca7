"""Amplified exposure bias (reAR section 3.1, Fig. 3a, 7a to 7d).

perfect context:    the first r N tokens are true, the others drawn one after the other
imperfect context:  r N tokens at random places are true, and drawn ones stand among them from the beginning
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.sequences import Judge, means
from megavar.assembly import build_sampler
from megavar.conditions import Condition
from megavar.config.analyses.exposure_bias import ExposureBiasAnalysis
from megavar.errors import ConfigError
from megavar.parallel import seeds
from megavar.run_samples import default_conditions
from megavar.sampling.base import Completing, Known
from megavar.sampling.noise import Noise

PROTOCOLS = ("perfect", "imperfect")


class ExposureBias(Analysis[ExposureBiasAnalysis]):
    """Both protocols at every ratio."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Draw, decode, compare."""
        values = {run.name: self._measure(run) for run in runs}
        lines = []
        for name, found in values.items():
            for ratio in self.choice.ratios:
                both = [found[f"{protocol}_{ratio:g}"] for protocol in PROTOCOLS]
                words = ", ".join(f"{key} {both[0][key]:.4g} | {both[1][key]:.4g}" for key in both[0])
                lines.append(f"{name}, {ratio:.0%} true (perfect | imperfect context): {words}")
        first = {f"{key}_{name}": value for key, found in values[runs[0].name].items() for name, value in found.items()}
        return Report(first, values, {}, {"": draw(values, self.choice.ratios)}, "\n".join(lines))

    def _measure(self, run: Subject) -> dict[str, dict[str, float]]:
        judge = Judge(run, self.choice)
        config, generator = judge.observer.config, judge.observer.generator
        procedure = build_sampler(config, generator, judge.tokenizer, default_conditions(config), run.device).procedure
        if not isinstance(procedure, Completing):
            raise ConfigError(
                f"sampling.procedure={config.sampling.procedure} of {run.name} cannot continue given tokens: this "
                f"analysis is of procedures that draw token by token."
            )
        classes = -1 if config.generator is None else config.generator.class_count or -1
        parts: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
        for true in judge.sequences():
            condition = Condition(true.batch.labels, classes=classes)
            for ratio in self.choice.ratios:
                for protocol in PROTOCOLS:
                    given = given_places(protocol, ratio, true.batch.sample_ids, true.ids.shape[1], self.choice.seed)
                    noise = Noise(self.choice.seed, true.batch.sample_ids)
                    ids = procedure.complete(generator, judge.tokenizer, condition, noise, Known(true.ids, given))
                    parts.setdefault(f"{protocol}_{ratio:g}", []).append((len(ids), judge.measure(true, ids)))
        return {name: means(found) for name, found in parts.items()}


def given_places(protocol: str, ratio: float, samples: Tensor, length: int, seed: int) -> Tensor:
    """Which floor(r N) tokens of each sample are true: bool [B, N]."""
    places = torch.arange(length, device=samples.device)
    if protocol == "imperfect":
        places = seeds.random_bits(seed, "context", samples[:, None], places).argsort(1).argsort(1)
    return (places < int(ratio * length + 1e-9)).expand(len(samples), length)


def draw(values: dict[str, dict[str, dict[str, float]]], ratios: Sequence[float]) -> Figure:
    """Image quality over CTR, and over perplexity, under both protocols."""
    shown = [name for name in next(iter(next(iter(values.values())).values())) if name.startswith(("psnr", "lpips"))]
    figure = Figure(figsize=(5 * len(shown), 7), layout="constrained")
    for row, x in zip(figure.subplots(2, len(shown), squeeze=False), ("ctr", "perplexity")):
        for axes, y in zip(row, shown):
            for name, found in values.items():
                for protocol, style in zip(PROTOCOLS, ("o-", "s--")):
                    points = [found[f"{protocol}_{ratio:g}"] for ratio in ratios]
                    axes.plot([p[x] for p in points], [p[y] for p in points], style, label=f"{name}, {protocol}")
            axes.set(xlabel={"ctr": "correct token ratio"}.get(x, x), ylabel=y.upper())
            axes.legend(fontsize=7)
    figure.suptitle("Images decoded from tokens drawn after perfect and imperfect contexts")
    return figure
