"""Embedding unawareness (reAR section 3.1, Fig. 3b, 6, 7e to 7g): wrong tokens are not equally wrong.

    x^_i predicted under teacher forcing; where it is wrong, with probability r' the code other than x_i whose vector is
    closest to that of x_i by cosine: the correct token ratio stays, the image gets closer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.sequences import Judge, means
from megavar.config.analyses.embedding_replacement import EmbeddingReplacementAnalysis
from megavar.parallel import seeds
from megavar.sampling.noise import Noise, pick

PICTURES = 6


class EmbeddingReplacement(Analysis[EmbeddingReplacementAnalysis]):
    """Every ratio of replaced tokens."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Predict, replace, decode, compare."""
        values, pictures = {}, {}
        for run in runs:
            values[run.name], pictures[run.name] = self._measure(run)
        lines = [f"{name}, {ratio} replaced: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items())
                 for name, by_ratio in values.items() for ratio, found in by_ratio.items()]  # fmt: skip
        first = {f"{key}_{name}": value for key, found in values[runs[0].name].items() for name, value in found.items()}
        shown = pictures[runs[0].name]
        figures = {"": _draw(values), "-images": _show(shown, [f"{ratio:.0%}" for ratio in self.choice.ratios])}
        return Report(first, values, {}, figures, "\n".join(lines))

    def _measure(self, run: Subject) -> tuple[dict[str, dict[str, float]], list[Tensor]]:
        """Numbers by ratio; the first images, decoded from the true tokens and from those of every ratio."""
        judge, choice = Judge(run, self.choice), self.choice
        vocabulary = judge.tokenizer.space.vocabulary
        assert vocabulary is not None
        codes = torch.arange(vocabulary, device=run.device)
        nearest = nearest_others(judge.tokenizer.embed(codes))
        parts: dict[str, list[tuple[int, dict[str, Tensor]]]] = {f"{ratio:g}": [] for ratio in choice.ratios}
        pictures: list[Tensor] = []
        for number, true in enumerate(judge.sequences()):
            samples, places = true.batch.sample_ids, torch.arange(true.ids.shape[1], device=run.device)
            uniform = Noise(choice.seed, samples).uniform(places) if choice.predicted == "drawn" else None
            predicted = pick(judge.observer.predict(true.batch, true.ids).float(), uniform)
            chance = seeds.uniform(choice.seed, "replaced", samples[:, None], places)
            for ratio in choice.ratios:
                ids = torch.where((predicted != true.ids) & (chance < ratio), nearest[true.ids], predicted)
                parts[f"{ratio:g}"].append((len(ids), judge.measure(true, ids)))
                if number == 0:
                    pictures.append(judge.tokenizer.decode(ids[:PICTURES]).cpu())
            if number == 0:
                pictures.insert(0, true.reference[:PICTURES].cpu())
        values = {ratio: means(found) for ratio, found in parts.items()}
        before = next(iter(values.values()))["perplexity"]
        for found in values.values():
            found["perplexity_increase"] = found["perplexity"] - before
        return values, pictures


def nearest_others(vectors: Tensor, at_once: int = 1024) -> Tensor:
    """For each of V vectors [V, D] the number of the other one with the largest cosine: int64 [V]."""
    unit, found = F.normalize(vectors.double(), dim=-1), []
    for first in range(0, len(unit), at_once):
        cosine = unit[first : first + at_once] @ unit.t()
        cosine.diagonal(first).fill_(-torch.inf)
        found.append(cosine.argmax(1))
    return torch.cat(found)


AXES = {None: "share of wrong tokens replaced", "cosine": "cosine of code vectors with the true ones",
        "perplexity_increase": "increase of perplexity"}  # fmt: skip


def _draw(values: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """Image quality over the share, over the cosine and over what replacing adds to perplexity (Fig. 7e to 7g)."""
    names = [name for name in next(iter(next(iter(values.values())).values())) if name.startswith(("psnr", "lpips"))]
    figure = Figure(figsize=(12, 3.4 * len(names)), layout="constrained")
    for row, metric in zip(figure.subplots(len(names), len(AXES), squeeze=False), names):
        for axes, (key, title) in zip(row, AXES.items()):
            for name, by_ratio in values.items():
                x = [float(ratio) if key is None else found[key] for ratio, found in by_ratio.items()]
                axes.plot(x, [found[metric] for found in by_ratio.values()], "o-", label=name)
            axes.set(xlabel=title, ylabel=metric.upper())
            axes.locator_params(axis="x", nbins=5)
            axes.legend(fontsize=7)
    return figure


def _show(pictures: list[Tensor], titles: list[str]) -> Figure:
    figure = Figure(figsize=(1.5 * len(pictures), 1.6 * len(pictures[0])), layout="constrained")
    grid = figure.subplots(len(pictures[0]), len(pictures), squeeze=False)
    for column, (images, title) in enumerate(zip(pictures, ["true", *titles])):
        grid[0][column].set_title(title, fontsize=9)
        for row, image in enumerate(images):
            grid[row][column].imshow(((image + 1) / 2).permute(1, 2, 0).clamp(0, 1).numpy())
            grid[row][column].set_axis_off()
    return figure
