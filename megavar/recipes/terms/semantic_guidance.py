"""Semantic guidance: early scales learn what the image means (MEPA section 4.3).

    m   = MLP(output of the middle block)                  one row per token, of the teacher's width
    z_j = sum over i <= j of Up(m of scale i)              Eq. 11: aggregated, on the teacher's grid
    g   = teacher(image)                                   frozen
    L   = - mean over patches of sum over j in F of cos(g, z_j)       Eq. 12, mean over images

Eq. 13 adds the recipe's cross entropy times ``cross_entropy_weight`` and its balance loss. A model with one map of
tokens has one scale: with ``scales: last`` and the projection ``repa`` this is REPA (Yu et al. 2025, arXiv:2410.06940).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.generators.base import GeneratorChoice
from megavar.config.terms.semantic_guidance import ProjectionConfig, SemanticGuidanceConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.generators.base import Head
from megavar.recipes.base import Count, Losses, Parts
from megavar.teachers.base import Teacher


class Targets:
    """A teacher's features of a micro-batch, which are computed where (and if) the loss is: on the last stage."""

    def __init__(self, sides: Sequence[int], compute: Callable[[], Tensor]) -> None:
        self.sides = tuple(sides)
        """Of the token maps."""
        self._compute = compute

    @functools.cached_property
    def features(self) -> Tensor:
        """float32 [B, N, D]; computed once, however many passes of a step ask."""
        with torch.no_grad():
            return self._compute()


class SemanticGuidance:
    """A :class:`~megavar.recipes.terms.base.Term`."""

    taps = ()

    def __init__(self, choice: SemanticGuidanceConfig, teacher: Teacher, space: TokenSpace, depth: int) -> None:
        """Guide a generator of ``depth`` blocks.

        Raises:
            ConfigError: its tokens have no places, or scales are asked for that it does not have.
        """
        self.choice, self.teacher, self.space = choice, teacher, space
        self.name, self.weight = choice.name, choice.weight
        self.tap = f"block.{choice.block_of(depth)}"
        if not space.sides:
            raise ConfigError(
                f"The term {choice.name!r} compares tokens with patches of the image, but the tokens of this tokenizer "
                f"({space.kind}) have no places in it. Remove the term, or choose a tokenizer of maps."
            )
        self._group(len(space.sides))

    @classmethod
    def build(cls, choice: SemanticGuidanceConfig, parts: Parts) -> "SemanticGuidance":
        """See :meth:`Term.build`.

        Raises:
            ConfigError: numbers of scales are asked for where scales change in every step.
        """
        config = parts.config
        assert config.generator is not None
        space, lists = config.tokenizer.space, getattr(config.recipe, "scale_lists", None)
        if not isinstance(choice.scales, str) and lists is not None and lists.varies:
            raise ConfigError(
                f"recipe.terms, {choice.name}: scales={list(choice.scales)} are numbers of scales, but with "
                f"recipe.scale_lists={lists.name} every step has other ones, and not always as many. Choose a group: "
                f"S, M, L or last."
            )
        return cls(choice, parts.teacher(choice.teacher), space, config.generator.limits(space).depth)

    @classmethod
    def head_of(cls, choice: SemanticGuidanceConfig, generator: GeneratorChoice, space: TokenSpace) -> Head:
        """The head on a generator, for plans."""
        return _head(choice, f"block.{choice.block_of(generator.limits(space).depth)}")

    def head(self, space: TokenSpace) -> Head:
        """m_phi on the middle block."""
        return _head(self.choice, self.tap)

    def prepare(self, batch: Batch, inputs: object) -> Targets:
        """The teacher's features of the images that the tokenizer sees, or those of a cache.

        Args:
            inputs: of the recipe; where scales change in every step (FlexVAR), ``inputs.model.sides`` says which.
        """
        sides = getattr(getattr(inputs, "model", None), "sides", None) or self.space.sides
        if batch.features is not None:
            stored = batch.features
            return Targets(sides, lambda: stored)
        images = batch.require_images()
        return Targets(sides, lambda: self.teacher.features(images))

    def loss(self, tapped: dict[str, Tensor], output: Tensor, targets: Targets) -> Losses:
        """Eq. 12 of projected hidden states [B, L, D]; the cosine of each aggregated feature beside it."""
        assert sum(side * side for side in targets.sides) == output.shape[1], f"{output.shape}: {targets.sides}"
        guide = F.normalize(targets.features, dim=-1)
        group = self._group(len(targets.sides))
        cosines = [
            (guide * F.normalize(aggregated, dim=-1)).sum(-1).mean(1).sum()
            for number, aggregated in enumerate(self._aggregate(output, targets.sides[: max(group)], guide.shape[1]), 1)
            if number in group
        ]
        total = -torch.stack(cosines).sum()
        return Losses(total, means=self._named(cosines, len(output)))

    def _named(self, cosines: list[Tensor], images: int) -> dict[str, tuple[Tensor, Count]]:
        """The cosines under the numbers that their scales have in the tokenizer's own pyramid: where scales change in
        every step, all ranks must have the same names."""
        named: dict[str, tuple[Tensor, Count]] = {}
        for place, number in enumerate(self._group(len(self.space.sides))):
            found = cosines[place].detach() if place < len(cosines) else cosines[0].new_zeros(())
            named[f"cosine/{number:02d}"] = (found, images if place < len(cosines) else 0)
        return named

    def _aggregate(self, projected: Tensor, sides: Sequence[int], patches: int) -> Iterator[Tensor]:
        """z_1, z_2, ... of the given scales: [B, N, D] (Eq. 11).

        In float32: norms of half-precision features overflow (REPA, issue 46).
        """
        grid, total, start = math.isqrt(patches), torch.zeros((), device=projected.device), 0
        for side in sides:
            rows = projected[:, start : start + side * side].float()
            total, start = total + resize(rows, side, grid, self.choice.upsampling), start + side * side
            yield total

    def _group(self, number: int) -> tuple[int, ...]:
        try:
            return self.choice.group(number)
        except ValueError as error:
            raise ConfigError(f"recipe.terms, {self.name}: {error}. Name scales from 1 to {number}.") from error


def _head(choice: SemanticGuidanceConfig, tap: str) -> Head:
    return Head((tap,), lambda width: projection(choice.projection, width, choice.teacher.width), xavier)


def resize(rows: Tensor, side: int, grid: int, mode: str) -> Tensor:
    """A map [B, side * side, D] on the teacher's grid, [B, grid * grid, D].

    A larger map is averaged over areas, as VAR's tokenizer does where it goes down.
    """
    if side == grid:
        return rows
    square = rows.transpose(1, 2).unflatten(2, (side, side))
    mode = mode if side < grid else "area"
    return F.interpolate(square, (grid, grid), mode=mode).flatten(2).transpose(1, 2)


def projection(config: ProjectionConfig, width: int, features: int) -> nn.Sequential:
    """The MLP from ``width`` to ``features`` channels (REPA's ``build_mlp`` for its preset)."""
    activation = {"silu": nn.SiLU, "gelu": nn.GELU}[config.activation]
    widths = (width, *config.hidden_widths, features)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def xavier(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Xavier's uniform weights and zero biases, REPA's initial values."""
    if name.endswith("bias"):
        value.zero_()
    else:
        nn.init.xavier_uniform_(value, generator=generator)
