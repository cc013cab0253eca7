"""Scales of vectors under supervision by latents or by images (SAR Fig. 2 and 3, section 3.3).

    target_k  = true map of scale k                    reduced latents, or latents of reduced images
    input_k   = what is read for it: target_{k-1}, enlarged
    teacher_k = drawn after true maps                  Fig. 3, top: what training sees
    student_k = drawn after own maps                   Fig. 3, bottom: inference

In numbers, as mean absolute differences of decoded images in [0, 1]: how much of a target its input shows already
(``change``), and how far both predictions are from the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from megavar.analysis.base import Analysis, Report, Subject
from megavar.assembly import build_sampler
from megavar.conditions import Condition
from megavar.config.analyses.scale_targets import ScaleTargetsAnalysis
from megavar.data.batch import Batch
from megavar.data.pixels import to_uint8
from megavar.errors import ConfigError
from megavar.run_samples import default_conditions
from megavar.sampling.base import FlowByScale
from megavar.sampling.noise import Noise

ROWS = ("targets", "inputs", "after true maps", "after own maps")


@runtime_checkable
class LearnsMaps(Protocol):
    """A recipe of maps of vectors."""

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the maps."""
        ...

    def truths(self, batch: Batch) -> list[Tensor]:
        """The true tokens of each scale, float32 [B, L_k, C], coarse to fine."""
        ...

    def features(self, truths: Sequence[Tensor]) -> Tensor:
        """What the scales after the first read, float32 [B, L - L_0, C]."""
        ...


@dataclass
class Seen:
    """Of one run."""

    sides: list[int]
    numbers: dict[str, list[float]] = field(default_factory=dict)
    """By name, a value per scale."""
    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """By row, a picture per scale: uint8 [h, w, 3]; inputs begin with the second scale."""


class ScaleTargets(Analysis[ScaleTargetsAnalysis]):
    """Runs beside each other."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Draw under both."""
        found = {run.name: self._see(run) for run in runs}
        values = {name: {f"{kind}_{side:02d}": value for kind, row in one.numbers.items()
                         for side, value in zip(one.sides, row)} for name, one in found.items()}  # fmt: skip
        arrays = {f"{name}/{row}/{number}": picture for name, one in found.items()
                  for row, pictures in one.pictures.items() for number, picture in enumerate(pictures)}  # fmt: skip
        lines = [f"{name}, {kind}: " + ", ".join(f"{value:.3f}" for value in row) for name, one in found.items()
                 for kind, row in one.numbers.items()]  # fmt: skip
        figures = {"": _draw(found), "-curves": _curves(found)}
        return Report(values[runs[0].name], values, arrays, figures, "\n".join(lines))

    @torch.no_grad()
    def _see(self, run: Subject) -> Seen:
        observer = run.observer()
        config, recipe, tokenizer = observer.config, observer.recipe, observer.tokenizer
        conditions = default_conditions(config)
        procedure = build_sampler(config, observer.generator, tokenizer, conditions, run.device).procedure
        if not isinstance(procedure, FlowByScale) or not isinstance(recipe, LearnsMaps):
            raise ConfigError(
                f"The recipe {config.recipe.name!r} of {run.name} learns no maps of vectors: this analysis is of those "
                f"(flowar). Of tokens with a vocabulary: student_forcing, trajectories."
            )
        sides = list(recipe.scales)
        result, sums, images = Seen(sides), torch.zeros(3, len(sides), dtype=torch.float64), 0
        for batch in observer.batches(self.choice.images, self.choice.batch):
            classes = -1 if conditions.classes is None else conditions.classes
            asked = (observer.generator, tokenizer, Condition(batch.labels, classes=classes))
            noise, true = Noise(config.sampling.seed, batch.sample_ids), recipe.truths(batch)
            read = recipe.features(true).split([side * side for side in sides[1:]], 1)
            maps = {
                "targets": true,
                "inputs": read,
                "after true maps": [step.tokens for step in procedure.steps(*asked, noise, true)],
                "after own maps": [step.tokens for step in procedure.steps(*asked, noise)],
            }
            shown = {row: [tokenizer.decode(one) / 2 + 0.5 for one in maps[row]] for row in ROWS}
            targets = shown["targets"]
            off = [[_off(a, b) for a, b in zip(targets[1:], shown["inputs"])]]
            off[0].insert(0, _off(targets[0], torch.full_like(targets[0], 0.5)))
            off += [[_off(a, b) for a, b in zip(targets, shown[row])] for row in ROWS[2:]]
            sums += torch.tensor(off, dtype=torch.float64) * len(batch)
            here = self.choice.shown - images
            if 0 <= here < len(batch):
                result.pictures = {row: [_picture(one[here]) for one in shown[row]] for row in ROWS}
            images += len(batch)
        names = ("change", "teacher", "student")
        result.numbers = dict(zip(names, (sums / images).tolist()))
        return result


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def _picture(image: Tensor) -> np.ndarray:
    picture: np.ndarray = to_uint8(2 * image[None] - 1)[0].permute(1, 2, 0).cpu().numpy()
    return picture


def _curves(found: dict[str, Seen]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, one) in enumerate(found.items()):
        for kind, style in (("teacher", "--"), ("student", "-")):
            words = {"teacher": "after true maps", "student": "after own maps"}[kind]
            axes.plot(one.sides, one.numbers[kind], style, marker="o", color=f"C{number}", label=f"{name}, {words}")
    axes.set(title="Distance of drawn maps from the targets", xlabel="side of the map", ylabel="mean pixel difference")
    axes.set_xticks(next(iter(found.values())).sides)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _draw(found: dict[str, Seen]) -> Figure:
    lines: list[tuple[str, list[Any]]] = []
    for name, one in found.items():
        for row in ROWS:
            blank = [None] * (len(one.sides) - len(one.pictures[row]))
            lines.append((f"{name}\n{row}", [*blank, *one.pictures[row]]))
    sides = next(iter(found.values())).sides
    figure = Figure(figsize=(1.4 * len(sides) + 1.8, 1.35 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), len(sides), squeeze=False)
    for number, (axes_of, (title, pictures)) in enumerate(zip(grid, lines)):
        for axes, side, picture in zip(axes_of, sides, pictures):
            axes.set(xticks=[], yticks=[])
            if picture is None:
                axes.set_visible(False)
            else:
                axes.imshow(picture)
            if number == 0:
                axes.set_title(f"{side}x{side}", fontsize=8)
        label = next(axes for axes, picture in zip(axes_of, pictures) if picture is not None)
        label.set_ylabel(title, fontsize=7, rotation=0, ha="right", va="center")
    return figure
