"""Teacher forcing against student forcing, scale by scale (SAR Fig. 8, section 5.4.2).

    teacher_k = latents drawn at scale k after the true maps                       Eq. 13
    student_k = latents drawn at scale k after true maps up to a scale, then own   Eq. 12
    Delta_k   = | true_k - student_k |                                             length of the difference

At the first drawn scale both are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.continuation import Continuation, Maps
from megavar.config.analyses.student_forcing import StudentForcingAnalysis
from megavar.data.batch import Batch
from megavar.errors import ConfigError


@dataclass
class Forced:
    """Of one run."""

    sides: tuple[int, ...]
    """Drawn ones."""
    teacher: list[float]
    """Mean difference from the true latents, by side."""
    student: list[float]
    rows: dict[str, list[np.ndarray]]
    """Of one image: title and a picture per side after the first."""


class StudentForcing(Analysis[StudentForcingAnalysis]):
    """Numbers over many images, a picture of one."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Draw under both."""
        found = {run.name: self._force(run) for run in runs}
        values = {name: _values(one) for name, one in found.items()}
        figures = {"": _curves(found)}
        for name, one in found.items():
            figures["-maps" if name == runs[0].name else f"-maps-{name}"] = _draw(name, one)
        arrays = {f"{name}/{title}/{side}": picture for name, one in found.items()
                  for title, row in one.rows.items() for side, picture in zip(one.sides[1:], row)}  # fmt: skip
        lines = [f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values[name].items()) for name in found]
        return Report(values[runs[0].name], values, arrays, figures, "\n".join(lines))

    def _first(self, name: str, sides: tuple[int, ...]) -> int:
        """Number of the first drawn scale."""
        if self.choice.first is None:
            return max(len(sides) - 4, 0)
        if self.choice.first not in sides[:-1]:
            raise ConfigError(
                f"analysis.first={self.choice.first}, but {name} is drawn at the sides {list(sides)}: choose one of "
                f"them, not the last (sampling.scales changes them)."
            )
        return sides.index(self.choice.first)

    def _force(self, run: Subject) -> Forced:
        model = Continuation(run)
        first = self._first(run.name, model.sides)
        sums, images = torch.zeros(2, len(model.sides) - first, dtype=torch.float64), 0
        rows: dict[str, list[np.ndarray]] = {}
        for batch in model.batches(self.choice.images, self.choice.batch):
            true = model.true(batch)
            teacher = [model.choose(batch, step, k) for k, step in enumerate(model.steps(batch, true))]
            student = [step.ids for step in model.steps(batch, true[:first])]
            for row, maps in enumerate((teacher, student)):
                off = [_off(model, true[k], maps[k]).mean() for k in range(first, len(model.sides))]
                sums[row] += torch.stack(off).double().cpu() * len(batch)
            here = self.choice.shown - images
            if 0 <= here < len(batch):
                rows = _pictures(model, batch, here, true, student, first)
            images += len(batch)
        means = (sums / images).tolist()
        return Forced(model.sides[first:], means[0], means[1], rows)


def _off(model: Continuation, true: Tensor, drawn: Tensor) -> Tensor:
    """Length of the difference of code vectors: [B, L_k]."""
    difference: Tensor = model.tokenizer.embed(true) - model.tokenizer.embed(drawn)
    return difference.norm(dim=-1)


def _pictures(
    model: Continuation, batch: Batch, which: int, true: Maps, student: Maps, first: int
) -> dict[str, list[np.ndarray]]:
    """The paper's five rows, and the images that the last of them stand for."""
    colours = _Colours(model.tokenizer)
    sides, embed = model.sides, model.tokenizer.embed
    inputs = {}
    for name, maps in (("teacher", true), ("student", student)):
        read = model.tokenizer.inputs(torch.cat(maps, 1), sides)[which]
        inputs[name] = read.split([side * side for side in sides[1:]])
    rows: dict[str, list[np.ndarray]] = {}

    def add(title: str, picture: np.ndarray) -> None:
        rows.setdefault(title, []).append(picture)

    for k in range(first + 1, len(sides)):
        add("true latents", colours.map(embed(true[k][which])))
        add("teacher-forced inputs", colours.map(inputs["teacher"][k - 1]))
        add("student-forced inputs", colours.map(inputs["student"][k - 1]))
        add("student-forced predictions", colours.map(embed(student[k][which])))
        off = _off(model, true[k], student[k])[which]
        add("difference", off.view(sides[k], sides[k]).cpu().numpy())
        for title, maps in (("image of true maps", true), ("image of predictions", student)):
            picture = model.image([ids[which : which + 1] for ids in maps], k)[0]
            add(title, (picture.permute(1, 2, 0) / 2 + 0.5).cpu().numpy())
    return rows


class _Colours:
    """Code vectors as colours: the three directions in which the codebook varies most, two deviations to each side."""

    def __init__(self, tokenizer: object) -> None:
        space, embed = tokenizer.space, tokenizer.embed  # type: ignore[attr-defined]
        codes = embed(torch.arange(space.vocabulary, device=next(tokenizer.parameters()).device))  # type: ignore[attr-defined]
        self.mean = codes.mean(0)
        _, size, directions = torch.linalg.svd(codes - self.mean, full_matrices=False)
        self.directions = directions[:3] / (size[:3, None] / len(codes) ** 0.5)

    def map(self, vectors: Tensor) -> np.ndarray:
        """[L, C] of a square map to [h, w, 3] in 0 to 1."""
        side = round(len(vectors) ** 0.5)
        levels = (vectors - self.mean) @ self.directions.T / 4 + 0.5
        levels = F.pad(levels, (0, 3 - levels.shape[1]), value=0.5).clamp(0, 1)
        return levels.view(side, side, 3).cpu().numpy()


def _values(one: Forced) -> dict[str, float]:
    values = {f"teacher_{side:02d}": value for side, value in zip(one.sides, one.teacher)}
    values |= {f"student_{side:02d}": value for side, value in zip(one.sides, one.student)}
    return values | {"amplification": one.student[-1] / max(one.teacher[-1], 1e-12)}


def _curves(found: dict[str, Forced]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, one) in enumerate(found.items()):
        axes.plot(one.sides, one.teacher, "--", marker="o", color=f"C{number}", label=f"{name}, after true maps")
        axes.plot(one.sides, one.student, marker="o", color=f"C{number}", label=f"{name}, after own maps")
    axes.set(title="Distance of drawn latents from the true ones", xlabel="side of the map", ylabel="mean length")
    axes.set_xticks(next(iter(found.values())).sides)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw(name: str, one: Forced) -> Figure:
    figure = Figure(figsize=(1.5 * len(one.sides) + 1.5, 1.4 * len(one.rows) + 0.8), layout="constrained")
    figure.suptitle(f"{name}: own maps from {one.sides[0]}x{one.sides[0]} on", fontsize=10)
    grid = figure.subplots(len(one.rows), len(one.sides) - 1, squeeze=False)
    top = max(float(picture.max()) for picture in one.rows["difference"])
    for number, (line, (title, pictures)) in enumerate(zip(grid, one.rows.items())):
        for axes, side, picture in zip(line, one.sides[1:], pictures):
            axes.imshow(picture, **({"cmap": "magma", "vmin": 0, "vmax": top} if picture.ndim == 2 else {}))
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_title(f"{side}x{side}", fontsize=8)
        line[0].set_ylabel(title, fontsize=7, rotation=0, ha="right", va="center")
    return figure
