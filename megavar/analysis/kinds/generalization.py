"""Trained against unseen images, clean against noisy contexts (reAR Fig. 8a, appendix C.1).

The correct token ratio (Eq. 8) is the share of tokens that are the likeliest ones under teacher forcing.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.config.analyses.generalization import GeneralizationAnalysis

SHOWN = {"trained": (True, False), "unseen": (False, False), "trained_noisy": (True, True),
         "unseen_noisy": (False, True)}  # fmt: skip
"""Name of a measurement: (training images?, noisy contexts?)."""


class Generalization(Analysis[GeneralizationAnalysis]):
    """One run, or several beside each other."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Predict all tokens four times."""
        values = {run.name: self._measure(run) for run in runs}
        lines = []
        for name, found in values.items():
            words = ", ".join(f"{key.replace('_', ' and ')} {found[key]:.4f}" for key in SHOWN)
            lines.append(f"{name}: correct tokens {words}")
        return Report(values[runs[0].name], values, {}, {"": _draw(values)}, "\n".join(lines))

    def _measure(self, run: Subject) -> dict[str, float]:
        observer, found = run.observer(), {}
        for name, (trained, noisy) in SHOWN.items():
            noise = self.choice.noise if noisy else 0.0
            seen = list(observer.watch(self.choice.images, self.choice.batch, trained=trained, noise=noise))
            tokens = sum(one.valid for one in seen)
            found[name] = sum(one.hits for one in seen) / tokens
            found[f"{name}_loss"] = sum(one.loss for one in seen) / tokens
        found["gap"] = found["trained"] - found["unseen"]
        found["gap_noisy"] = found["trained_noisy"] - found["unseen_noisy"]
        found["lost_to_noise"] = found["unseen"] - found["unseen_noisy"]
        return found


def _draw(values: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(8, 1.6 + 0.8 * len(values)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(SHOWN)
    for place, name in enumerate(SHOWN):
        rows = [row + place * height for row in range(len(values))]
        bars = axes.barh(rows, [found[name] for found in values.values()], height, label=name.replace("_", " and "))
        axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
    axes.set_yticks([row + 0.3 for row in range(len(values))], list(values))
    axes.set(title="correct token ratio under teacher forcing")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.legend(fontsize=8, loc="lower right")
    return figure
