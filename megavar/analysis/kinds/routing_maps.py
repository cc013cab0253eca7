"""Routing heat maps (MEPA Fig. 4): P(expert is chosen | token at row y, column x of scale k), over images."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.observation import require_experts
from megavar.config.analyses.routing_maps import RoutingMapsAnalysis
from megavar.errors import ConfigError

Maps = dict[int, list[np.ndarray]]
"""By block: for each segment the frequencies [E, h, w]."""


class RoutingMaps(Analysis[RoutingMapsAnalysis]):
    """Maps of every block; one block is drawn place by place, all of them scale by scale."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Average over images."""
        values, figures, lines = {}, {}, []
        arrays: dict[str, np.ndarray] = {}
        for run in runs:
            maps = self._maps(run)
            block = self._block(maps)
            values[run.name] = map_metrics(maps[block]) | {"block": block}
            ending = "" if run is runs[0] else f"-{run.name}"
            figures[ending] = _draw_places(maps[block], f"{run.name}, block {block + 1} of {len(maps)}")
            figures[f"{ending}-blocks"] = _draw_scales(maps, run.name)
            for number, scales in maps.items():
                arrays |= {f"{run.name}/block_{number}/scale_{k}": found for k, found in enumerate(scales, 1)}
            found = values[run.name]
            lines.append(
                f"{run.name}, block {block + 1}: {found['experts_used']:.0f} experts used; the scale tells "
                f"{found['scale_bits']:.3f} bits about the expert; places within a scale differ by "
                f"{found['spatial_deviation']:.3f}"
            )
        return Report(values[runs[0].name], values, arrays, figures, "\n".join(lines))

    def _maps(self, run: Subject) -> Maps:
        sums: dict[int, list[torch.Tensor]] = {}
        images = 0
        for seen in run.observer().watch(self.choice.images, self.choice.batch):
            require_experts(seen, run.name)
            images += len(seen.labels)
            for block, chosen in seen.routing.items():
                parts = [part.sum(0, dtype=torch.float64) for part in seen.segments(chosen)]
                before = sums.get(block)
                sums[block] = parts if before is None else [a + b for a, b in zip(before, parts)]
        return {block: [as_map(part.numpy() / images) for part in parts] for block, parts in sorted(sums.items())}

    def _block(self, maps: Maps) -> int:
        blocks = list(maps)
        chosen = self.choice.block if self.choice.block is not None else blocks[max(len(blocks) - 2, 0)]
        if chosen not in maps:
            raise ConfigError(f"analysis.block={chosen} has no experts. Blocks with experts: {blocks}.")
        return chosen


def as_map(rows: np.ndarray) -> np.ndarray:
    """[n, E] of a square map (row by row) to [E, h, w]; of anything else to [E, 1, n]."""
    side = round(len(rows) ** 0.5)
    shape = (side, side) if side * side == len(rows) else (1, len(rows))
    return rows.T.reshape(-1, *shape)


def map_metrics(scales: Sequence[np.ndarray]) -> dict[str, float]:
    """Of one block: experts with at least 1 % of some scale, what the scale says of the expert, spread of places."""
    given = np.stack([found.mean((1, 2)) for found in scales])  # [K, E]
    share = given / given.sum(1, keepdims=True).clip(min=1e-12)
    marginal = share.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(share > 0, share * np.log2(share / marginal), 0.0)
    deviations = [found.std((1, 2)).mean() for found in scales if found.shape[1] * found.shape[2] > 1]
    return {
        "experts_used": float((given >= 0.01).any(0).sum()),
        "scale_bits": float(bits.sum(1).mean()),
        "spatial_deviation": float(np.mean(deviations)) if deviations else 0.0,
    }


def _draw_places(scales: Sequence[np.ndarray], title: str) -> Figure:
    experts = len(scales[0])
    figure = Figure(figsize=(1.1 * len(scales) + 1.6, 1.1 * experts + 1), layout="constrained")
    figure.suptitle(f"How often a token is sent to an expert, by its place in the token map\n{title}", fontsize=10)
    grid = figure.subplots(experts, len(scales), squeeze=False)
    for expert in range(experts):
        for k, found in enumerate(scales):
            axes = grid[expert][k]
            image = axes.imshow(found[expert], cmap="viridis", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if expert == 0:
                axes.set_title(f"scale {k + 1}\n{found.shape[1]}x{found.shape[2]}", fontsize=8)
            if k == 0:
                axes.set_ylabel(f"expert {expert + 1}", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.6, label="share of images")
    return figure


def _draw_scales(maps: Maps, name: str) -> Figure:
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(2.9 * columns + 1, 2.4 * rows + 0.8), layout="constrained")
    figure.suptitle(f"Which experts the tokens of a scale are sent to, block by block ({name})", fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (block, scales) in zip(grid.flat, maps.items()):
        axes.set_axis_on()
        given = np.stack([found.mean((1, 2)) for found in scales])
        image = axes.imshow(given, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set(title=f"block {block + 1}", xlabel="expert", ylabel="scale")
        axes.set_xticks(range(given.shape[1]), list(range(1, given.shape[1] + 1)), fontsize=7)
        axes.set_yticks(range(len(given)), list(range(1, len(given) + 1)), fontsize=7)
    figure.colorbar(image, ax=grid, shrink=0.6, label="share of tokens")
    return figure
