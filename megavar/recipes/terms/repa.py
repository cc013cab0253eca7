"""REPA on the flow head (``vgt_internvl3.py``, ``_compute_repa_loss``; Yu et al. 2025, arXiv:2410.06940).

    m = MLP(output of the flow head's middle block)       one row per latent that is asked for
    g = teacher(image), resized to the map of latents     bilinear
    L = - mean over latents of cos(m, g)                  mean over images
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.config.terms.repa import FlowAlignmentConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.generators.base import Head
from megavar.recipes.base import Losses, Parts
from megavar.recipes.terms.semantic_guidance import projection, resize, xavier
from megavar.teachers.base import Teacher


class FlowAlignment:
    """A :class:`~megavar.recipes.terms.base.Term` for generators whose flow head can be tapped."""

    taps = ()

    def __init__(self, choice: FlowAlignmentConfig, teacher: Teacher, width: int, depth: int) -> None:
        """Align a flow head of ``depth`` blocks of ``width`` channels.

        Raises:
            ConfigError: it has no such block.
        """
        self.choice, self.teacher, self.width = choice, teacher, width
        self.name, self.weight = choice.name, choice.weight
        block = max(1, depth // 2) - 1 if choice.block is None else choice.block
        if block >= depth:
            raise ConfigError(
                f"recipe.terms, {choice.name}: block={block}, but the flow head has {depth} blocks. Choose one from 0 "
                f"to {depth - 1}, or raise generator.head.depth."
            )
        self.tap = f"head.{block}"

    @classmethod
    def build(cls, choice: FlowAlignmentConfig, parts: Parts) -> "FlowAlignment":
        """See :meth:`Term.build`.

        Raises:
            ConfigError: the generator has no flow head that can be tapped.
        """
        generator: Any = parts.config.generator
        sizes = getattr(generator, "head", None)
        if sizes is None:
            raise ConfigError(
                f"The term {choice.name!r} reads a flow head, but generator.name={generator.name} has none. Remove the "
                f"term from recipe.terms, or choose a generator with one."
            )
        return cls(choice, parts.teacher(choice.teacher), sizes.width, sizes.depth)

    def head(self, space: TokenSpace) -> Head:
        """The projection."""
        sizes, width, features = self.choice.projection, self.width, self.choice.teacher.width
        return Head((self.tap,), lambda _: projection(sizes, width, features), xavier)

    def prepare(self, batch: Batch, inputs: Any) -> Callable[[], Tensor]:
        """The teacher's features in the order of the queries; computed where (and if) the loss is.

        Args:
            inputs: of the recipe: ``order`` int64 [B, A] are the places of the queries.
        """
        order, stored = inputs.order, batch.features
        images = batch.require_images() if stored is None else stored

        @torch.no_grad()
        def features() -> Tensor:
            found = self.teacher.features(images) if stored is None else stored
            placed = resized(found, math.isqrt(order.shape[1]))
            return placed.gather(1, order[..., None].expand(-1, -1, placed.shape[-1]))

        return features

    def loss(self, tapped: dict[str, Tensor], output: Tensor, targets: Callable[[], Tensor]) -> Losses:
        """Of projected hidden states [B, A, D]; the mean cosine beside it."""
        cosine = F.cosine_similarity(output.float(), targets(), dim=-1).mean(1).sum()
        return Losses(-cosine, {"cosine": cosine.detach()})


def resized(features: Tensor, side: int) -> Tensor:
    """A teacher's map [B, N, D] as one of side x side places, bilinear both ways as released, float32."""
    grid = math.isqrt(features.shape[1])
    if grid <= side:
        return resize(features.float(), grid, side, "bilinear")
    square = features.float().transpose(1, 2).unflatten(2, (grid, grid))
    return F.interpolate(square, (side, side), mode="bilinear").flatten(2).transpose(1, 2)
