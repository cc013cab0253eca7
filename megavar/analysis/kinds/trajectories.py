"""Generation after the same coarse map (SAR Fig. 7, section 5.3.1): does a run mend errors, or amplify them?

distance_k = mean |image at scale k - the true maps' image at scale k|       errors, and whether they are mended
change_k   = mean |image at scale k - image at scale k-1, resized|           how abrupt a step is
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.continuation import Continuation
from megavar.config.analyses.trajectories import TrajectoriesAnalysis
from megavar.data.pixels import to_uint8
from megavar.errors import ConfigError

TRUE = "the image's own maps"


@dataclass
class Trajectory:
    """Of one run, or of true maps."""

    sides: list[int]
    """From the last given one on."""
    pictures: list[np.ndarray] = field(default_factory=list)
    """By side: uint8 [shown, h, w, 3]."""
    distance: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)


class Trajectories(Analysis[TrajectoriesAnalysis]):
    """Runs beside each other, and the images themselves."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Go on with every image."""
        found: dict[str, Trajectory] = {}
        for run in runs:
            own, true = self._follow(run)
            found.setdefault(TRUE, true)
            found[run.name] = own
            if own.sides != found[TRUE].sides:
                raise ConfigError(f"{run.name} is drawn at {own.sides}, the first run at {found[TRUE].sides}. Set "
                                  f"sampling.scales for all of them.")  # fmt: skip
        values = {name: _values(one) for name, one in found.items()}
        arrays = {f"{name}/{side}": pictures for name, one in found.items()
                  for side, pictures in zip(one.sides, one.pictures)}  # fmt: skip
        lines = [f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values[name].items()) for name in found]
        figures = {"": _draw(found), "-curves": _curves(found)}
        return Report(values[runs[0].name], values, arrays, figures, "\n".join(lines))

    def _follow(self, run: Subject) -> tuple[Trajectory, Trajectory]:
        model = Continuation(run)
        given = sum(side <= self.choice.given for side in model.sides)
        if not 0 < given < len(model.sides):
            raise ConfigError(
                f"analysis.given={self.choice.given}, but {run.name} is drawn at the sides {list(model.sides)}: give "
                f"one from {model.sides[0]} to {model.sides[-1] - 1}."
            )
        sums: dict[str, Tensor] = {}
        shown: dict[str, list[list[Tensor]]] = {TRUE: [], run.name: []}
        images = 0
        for batch in model.batches(self.choice.images, self.choice.batch):
            true = model.true(batch)
            drawn = [step.ids for step in model.steps(batch, true[:given])]
            scales = range(given - 1, len(model.sides))
            seen = {name: [model.image(maps, k) for k in scales] for name, maps in ((TRUE, true), (run.name, drawn))}
            for name, row in seen.items():
                both = torch.tensor([_distances(row, seen[TRUE]), _changes(row)], dtype=torch.float64) * len(batch)
                sums[name] = sums.get(name, torch.zeros_like(both)) + both
                if images == 0:
                    shown[name] = [[to_uint8(image[: self.choice.shown]).cpu()] for image in row]
            images += len(batch)
        sides = list(model.sides[given - 1 :])
        return tuple(  # type: ignore[return-value]
            Trajectory(
                sides,
                [torch.cat(parts).permute(0, 2, 3, 1).numpy() for parts in shown[name]],
                *((sums[name] / images).tolist()),
            )
            for name in (run.name, TRUE)
        )


def _distances(row: Sequence[Tensor], true: Sequence[Tensor]) -> list[float]:
    return [float((a - b).abs().mean()) for a, b in zip(row, true)]


def _changes(row: Sequence[Tensor]) -> list[float]:
    """0 for the first."""
    changes = [0.0]
    for before, after in itertools.pairwise(row):
        resized = F.interpolate(before, after.shape[-2:], mode="bicubic").clamp(-1, 1)
        changes.append(float((after - resized).abs().mean()))
    return changes


def _values(one: Trajectory) -> dict[str, float]:
    values = {f"distance_{side:02d}": value for side, value in zip(one.sides[1:], one.distance[1:])}
    return values | {f"change_{side:02d}": value for side, value in zip(one.sides[1:], one.change[1:])}


def _draw(found: dict[str, Trajectory]) -> Figure:
    sides, count = next(iter(found.values())).sides, len(next(iter(found.values())).pictures[0])
    rows = count * len(found)
    figure = Figure(figsize=(1.2 * len(sides) + 2.2, 1.15 * rows + 0.8), layout="constrained")
    figure.suptitle(f"Drawn after the image's own maps up to {sides[0]}x{sides[0]}", fontsize=10)
    grid = figure.subplots(rows, len(sides), squeeze=False)
    for image in range(count):
        for place, (name, one) in enumerate(found.items()):
            for column, side in enumerate(sides):
                axes = grid[image * len(found) + place][column]
                axes.imshow(one.pictures[column][image])
                axes.set(xticks=[], yticks=[])
                if image == 0 and place == 0:
                    axes.set_title(f"{side}x{side}", fontsize=8)
                if column == 0:
                    axes.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    return figure


def _curves(found: dict[str, Trajectory]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {"distance": "distance from the image at the same scale", "change": "change from the scale before"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items()):
        for number, (name, one) in enumerate(found.items()):
            style = {"linestyle": "--", "color": "gray"} if name == TRUE else {"color": f"C{number - 1}"}
            axes.plot(one.sides[1:], getattr(one, key)[1:], marker="o", label=name, **style)
        axes.set(title=title, xlabel="side of the map", xticks=next(iter(found.values())).sides[1:])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
