"""Tokens per expert (MEPA Table 1): c[l, e] of layer l and expert e, averaged over layers, normalized to 8 each."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.observation import require_experts
from megavar.config.analyses.expert_load import ExpertLoadAnalysis

FAIR = 8.0
"""What every expert would get with equal loads: the paper normalizes eight experts to 64."""


class ExpertLoad(Analysis[ExpertLoadAnalysis]):
    """Loads of one run, or of several beside each other."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Count and normalize."""
        counts = {run.name: self._counts(run) for run in runs}
        values = {name: load_metrics(count) for name, count in counts.items()}
        lines = [f"{name}: variance {found['variance']:.2f}, mean of the layers' {found['variance_of_a_layer']:.2f}, "
                 f"unused in some layer {found['unused']:.0f}" for name, found in values.items()]  # fmt: skip
        return Report(values[runs[0].name], values, counts, {"": _draw(counts)}, "\n".join(lines))

    def _counts(self, run: Subject) -> np.ndarray:
        """Tokens by layer and expert, int64 [layers, E]."""
        total = None
        for seen in run.observer().watch(self.choice.images, self.choice.batch):
            require_experts(seen, run.name)
            chosen = np.stack([seen.routing[block].sum((0, 1)).numpy() for block in sorted(seen.routing)])
            total = chosen if total is None else total + chosen
        assert total is not None
        return total


def normalized(counts: np.ndarray) -> np.ndarray:
    """Shares along the last axis, such that their mean is :data:`FAIR`."""
    return FAIR * counts.shape[-1] * counts / counts.sum(-1, keepdims=True)


def load_metrics(counts: np.ndarray) -> dict[str, float]:
    """Of counts [layers, E]: the load of each expert (mean over layers), its sample variance, and single layers."""
    load, layers = normalized(counts.mean(0)), normalized(counts)
    metrics = {f"expert_{number}": float(value) for number, value in enumerate(load, 1)}
    metrics["variance"] = float(load.var(ddof=1)) if len(load) > 1 else 0.0
    metrics["variance_of_a_layer"] = float(layers.var(-1, ddof=1).mean()) if len(load) > 1 else 0.0
    metrics["largest_in_a_layer"] = float(layers.max())
    metrics["smallest_in_a_layer"] = float(layers.min())
    metrics["unused"] = float((counts == 0).any(0).sum())
    return metrics


def _draw(counts: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(11, 3.2 * len(counts)), layout="constrained")
    figure.suptitle("How many tokens each expert gets (8 = its fair share)")
    grid = figure.subplots(len(counts), 2, squeeze=False, width_ratios=(1, 1.2))
    for (bars, map_), (name, count) in zip(grid, counts.items()):
        load, experts = normalized(count.mean(0)), range(1, count.shape[1] + 1)
        bars.bar(experts, load, color="tab:blue")
        bars.axhline(FAIR, color="black", linewidth=1, linestyle="--")
        variance = load_metrics(count)["variance"]
        bars.set(title=f"{name}: mean of all layers, variance {variance:.2f}", xlabel="expert", ylabel="load",
                 xticks=list(experts), ylim=(0, None))  # fmt: skip
        image = map_.imshow(normalized(count), aspect="auto", cmap="viridis", vmin=0)
        map_.set(title=f"{name}: layer by layer", xlabel="expert", ylabel="layer",
                 xticks=range(len(load)), xticklabels=list(experts))  # fmt: skip
        map_.set_yticks(range(len(count)), list(range(1, len(count) + 1)))
        figure.colorbar(image, ax=map_, label="load")
    return figure
