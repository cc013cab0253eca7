"""Reconstructions from the maps up to each scale (FlexVAR: a map is an image by itself; VAR: it adds to the others).

image_k = decode(ids of scales 1 to k)
psnr_k  = PSNR of image_k and the original, reduced to its size by averaging; used_k = codes that scale k uses of all
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from megavar.analysis.base import Analysis, Report, Subject
from megavar.analysis.images import first_images
from megavar.assembly import load_tokenizer
from megavar.config.analyses.reconstructions import ReconstructionsAnalysis
from megavar.config.choice import resolve
from megavar.config.recipes.base import GeneratorRecipeChoice
from megavar.data.pixels import to_float, to_uint8
from megavar.errors import ConfigError
from megavar.evaluation.image_quality import psnr
from megavar.parallel.logical import initialize_parameters
from megavar.tokenizers.base import Pyramid
from megavar.transformer.defaults import usual_initial_value

UNTRAINED = "untrained"


@dataclass
class Reconstructed:
    """Of one tokenizer, by scale."""

    psnr: list[float] = field(default_factory=list)
    """Mean over the images, in dB."""
    used: list[float] = field(default_factory=list)
    """Share of the codes that occur."""
    pictures: list[np.ndarray] = field(default_factory=list)
    """uint8 [shown, h, w, 3]."""


class Reconstructions(Analysis[ReconstructionsAnalysis]):
    """Tokenizers of several runs beside each other, on the images of the first."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Reconstruct."""
        images, _ = first_images(runs[0].config, self.choice.images)
        tokenizers = {run.name: trained_tokenizer(run) for run in runs}
        tokenizers[UNTRAINED] = _untrained(runs[0])
        found = {name: self._reconstruct(one, images, runs[0].device) for name, one in tokenizers.items()}
        sides = tokenizers[runs[0].name].space.sides
        values = {name: _values(one, sides) for name, one in found.items()}
        arrays = {f"{name}/{side}": picture for name, one in found.items()
                  for side, picture in zip(sides, one.pictures)}  # fmt: skip
        lines = [f"{name}: " + ", ".join(f"{side}x{side} {value:.1f} dB" for side, value in zip(sides, one.psnr))
                 + f"; {one.used[-1]:.0%} of the codes at the last scale" for name, one in found.items()]  # fmt: skip
        figures = {"": _curves(found, sides), "-images": _draw(found, sides)}
        return Report(values[runs[0].name], values, arrays, figures, "\n".join(lines))

    @torch.no_grad()
    def _reconstruct(self, tokenizer: Any, images: Tensor, device: torch.device) -> Reconstructed:
        sizes = [side * side for side in tokenizer.space.sides]
        bounds = np.cumsum(sizes).tolist()
        result, seen = Reconstructed(), torch.zeros(len(sizes), tokenizer.space.vocabulary, dtype=torch.bool)
        sums = torch.zeros(len(sizes), dtype=torch.float64)
        for number, part in enumerate(images.split(self.choice.batch)):
            given = to_float(part).to(device)
            ids = tokenizer.tokens(tokenizer.encode(given))
            for k, stop in enumerate(bounds):
                image = tokenizer.decode(ids[:, :stop])
                original = F.interpolate(given, image.shape[-2:], mode="area")
                sums[k] += psnr(image / 2 + 0.5, original / 2 + 0.5).sum().cpu()
                seen[k, ids[:, stop - sizes[k] : stop].flatten().cpu()] = True
                if number == 0:
                    shown = to_uint8(image[: self.choice.shown]).cpu()
                    result.pictures.append(shown.permute(0, 2, 3, 1).numpy())
        result.psnr = (sums / len(images)).tolist()
        result.used = seen.double().mean(1).tolist()
        return result


def trained_tokenizer(run: Subject) -> Any:
    """The tokenizer that a run trained, or that its generator reads.

    Raises:
        ConfigError: it has no scales.
    """
    recipe = run.config.recipe
    weights = recipe.tokenizer_weights if isinstance(recipe, GeneratorRecipeChoice) else str(run.directory)
    tokenizer = load_tokenizer(run.config.tokenizer, weights, run.device)
    if not isinstance(tokenizer, Pyramid):
        raise ConfigError(
            f"The tokenizer of {run.name} ({run.config.tokenizer.name}) has no scales: `megavar evaluate` scores it."
        )
    return tokenizer


def _untrained(run: Subject) -> Any:
    network = resolve(run.config.tokenizer)(run.config.tokenizer)
    initialize_parameters(network, usual_initial_value, seed=0)
    return network.eval().requires_grad_(False).to(run.device)


def _values(one: Reconstructed, sides: Sequence[int]) -> dict[str, float]:
    values = {f"psnr_{side:02d}": value for side, value in zip(sides, one.psnr)}
    return values | {f"used_{side:02d}": value for side, value in zip(sides, one.used)}


def _curves(found: dict[str, Reconstructed], sides: Sequence[int]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, one in found.items():
        axes.plot(sides, one.psnr, marker="o", label=name)
    axes.set(title="Images from the maps up to a scale", xlabel="side of the map", ylabel="PSNR, dB")
    axes.set_xticks(list(sides))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _draw(found: dict[str, Reconstructed], sides: Sequence[int]) -> Figure:
    """A row per tokenizer and image, a column per scale."""
    rows = [(name, [picture[k] for picture in one.pictures]) for name, one in found.items()
            for k in range(len(one.pictures[0]))]  # fmt: skip
    figure = Figure(figsize=(1.2 * len(sides) + 1.2, 1.15 * len(rows)), layout="constrained")
    for number, (line, (name, pictures)) in enumerate(
        zip(figure.subplots(len(rows), len(sides), squeeze=False), rows)
    ):
        for axes, side, picture in zip(line, sides, pictures):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_title(f"{side}x{side}", fontsize=8)
        line[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    return figure
