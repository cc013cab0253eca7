"""Feature spaces of scales (MEPA Fig. 1a): hidden states in two dimensions, and how far scales lie apart in numbers.

Pictures of t-SNE show what one wants to see; so beside them stand the share of variance that the scale explains, the
silhouette of scales, how often nearest neighbours are of the same scale, and linear CKA between scales (of each image's
mean over the scale).
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.embedding import in_two_dimensions, principal
from megavar.analysis.similarity import linear_cka_matrix
from megavar.config.analyses.scale_features import ScaleFeaturesAnalysis
from megavar.errors import ConfigError

NEIGHBOURS = 10


class ScaleFeatures(Analysis[ScaleFeaturesAnalysis]):
    """Hidden states of a block, scale by scale."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Collect, embed, measure."""
        values, panels, lines = {}, {}, []
        arrays: dict[str, np.ndarray] = {}
        for run in runs:
            states, pooled, block = self._states(run)
            points, scale = self._chosen(states)
            places = in_two_dimensions(points, self.choice.embedding, self.choice.seed)
            cka = linear_cka_matrix(pooled)
            values[run.name] = separation(points, scale) | {
                "cka_between_neighbours": _beside_diagonal(cka),
                "block": block,
            }
            arrays |= {f"{run.name}/points": points, f"{run.name}/scale": scale, f"{run.name}/places": places,
                       f"{run.name}/cka": cka}  # fmt: skip
            sides = [round(state.shape[1] ** 0.5) for state in states]
            panels[f"{run.name}, output of block {block + 1}"] = (places, scale, cka, sides)
            found = values[run.name]
            lines.append(
                f"{run.name}, block {block + 1}: the scale explains {found['explained']:.0%} of the variance, "
                f"silhouette {found['silhouette']:.2f}, nearest neighbours of the same scale "
                f"{found['same_scale_neighbours']:.0%}"
            )
        return Report(values[runs[0].name], values, arrays, {"": _draw(panels)}, "\n".join(lines))

    def _states(self, run: Subject) -> tuple[list[torch.Tensor], list[np.ndarray], int]:
        """Hidden states [B, n, C] of all images by scale, their means [B, C], and the block."""
        observer = run.observer()
        block = self.choice.block if self.choice.block is not None else max(len(observer.blocks) // 2 - 1, 0)
        if block not in observer.blocks:
            raise ConfigError(f"analysis.block={block} does not exist: {run.name} has {len(observer.blocks)} blocks.")
        seen = list(observer.watch(self.choice.images, self.choice.batch, hidden=(block,)))
        if len(seen[0].layout.sizes) < 2:
            raise ConfigError(f"The run {run.name} has one map of tokens: this analysis compares several scales.")
        parts = [one.segments(one.hidden[block]) for one in seen]
        states = [torch.cat(of_scale) for of_scale in zip(*parts)]
        return states, [state.mean(1).numpy() for state in states], block

    def _chosen(self, states: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """As many tokens of each scale: float32 [N, C], and the scale of each, from 1."""
        generator = torch.Generator().manual_seed(self.choice.seed)
        points, scale = [], []
        for number, state in enumerate(states, 1):
            rows = state.flatten(0, 1)
            chosen = torch.randperm(len(rows), generator=generator)[: self.choice.points]
            points.append(rows[chosen].numpy())
            scale.append(np.full(len(chosen), number))
        return np.concatenate(points), np.concatenate(scale)


def separation(points: np.ndarray, scale: np.ndarray) -> dict[str, float]:
    """How far scales lie apart, of points [N, C] and their scales [N]."""
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    mean, total = points.mean(0), ((points - points.mean(0)) ** 2).sum()
    between = sum((scale == one).sum() * ((points[scale == one].mean(0) - mean) ** 2).sum() for one in np.unique(scale))
    reduced = principal(points)
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(points))).fit(reduced).kneighbors(reduced)[1][:, 1:]
    return {
        "explained": float(between / total),
        "silhouette": float(silhouette_score(reduced, scale)),
        "same_scale_neighbours": float((scale[near] == scale[:, None]).mean()),
    }


def _beside_diagonal(matrix: np.ndarray) -> float:
    return float(np.diagonal(matrix, 1).mean())


def _draw(panels: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]]) -> Figure:
    figure = Figure(figsize=(11, 4.6 * len(panels)), layout="constrained")
    figure.suptitle("Hidden states of the scales: each point is a token")
    grid = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(1.35, 1))
    for (scatter, map_), (title, (places, scale, cka, sides)) in zip(grid, panels.items()):
        for number, side in enumerate(sides, 1):
            chosen = places[scale == number]
            color = ("viridis", (number - 1) / max(len(sides) - 1, 1))
            scatter.scatter(*chosen.T, s=7, color=_color(*color), label=f"scale {number}: {side}x{side}")
        scatter.set(title=title, xticks=[], yticks=[])
        scatter.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
        image = map_.imshow(cka, cmap="magma", vmin=0, vmax=1)
        map_.set(title="similarity of scales (linear CKA)", xlabel="scale", ylabel="scale")
        map_.set_xticks(range(len(sides)), list(range(1, len(sides) + 1)))
        map_.set_yticks(range(len(sides)), list(range(1, len(sides) + 1)))
        figure.colorbar(image, ax=map_, shrink=0.8)
    return figure


def _color(name: str, place: float) -> tuple[float, ...]:
    import matplotlib

    return matplotlib.colormaps[name](0.95 * place)
