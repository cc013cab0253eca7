"""What recipes share that train one class-conditional generator on the tokens of a frozen tokenizer."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from megavar.data.batch import Batch
from megavar.parallel import seeds
from megavar.recipes.base import BaseRecipe, Parts
from megavar.recipes.terms.base import Term, heads_of, taps_of


class OneGenerator(BaseRecipe):
    """Its construction, its module, and dropped labels."""

    def __init__(
        self,
        config: Any,
        generator: nn.Module,
        tokenizer: Any,
        *,
        classes: int,
        label_drop: float,
        seed: int,
        terms: Sequence[Term] = (),
        steps: int = 1,
    ) -> None:
        """Train ``generator``, or a ``ModuleList`` of its chunks, on the tokens of a frozen ``tokenizer``.

        Args:
            config: the recipe's section.
            classes: number of classes, which stands for "no class".
            label_drop: share of samples without class.
            terms: losses to add; the generator has their taps and heads.
            steps: length of the run, for what changes on the way.
        """
        self.config, self.generator, self.tokenizer = config, generator, tokenizer
        self.classes, self.label_drop = classes, label_drop
        self.seed, self.terms, self.steps = seed, terms, steps

    @classmethod
    def build(cls, parts: Parts) -> Self:
        """See :meth:`Recipe.build`."""
        config, terms, tokenizer = parts.config, parts.terms(), parts.tokenizer()
        assert config.generator is not None
        return cls(
            config.recipe,
            parts.generator(taps=taps_of(terms), heads=heads_of(terms, tokenizer.space)),
            tokenizer,
            classes=config.generator.class_count or 0,
            label_drop=config.generator.condition_drop,
            seed=config.train.seed,
            terms=terms,
            steps=parts.steps,
        )

    def modules(self) -> dict[str, nn.Module]:
        """The one trained module."""
        return {"generator": self.generator}

    def labels(self, batch: Batch, stream: str = "label_drop") -> Tensor:
        """Classes, int64 [B], "no class" for a share of the samples; ``stream`` names the draw."""
        dropped = seeds.uniform(self.seed, stream, batch.epochs, batch.sample_ids) < self.label_drop
        return torch.where(dropped, self.classes, batch.labels)
