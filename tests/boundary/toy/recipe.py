"""Teacher forcing, then the same on the generator's own most likely tokens, with less weight.

    ids     = tokenizer(image)
    logits  = generator(class, ids[:-1])                  pass 1: loss on ids, and terms
    own     = argmax(logits)
    logits' = generator(class, own[:-1])                  pass 2: loss on ids, times ``student``
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.parallel import seeds
from megavar.parallel.vocabulary import vocabulary_best, vocabulary_cross_entropy, vocabulary_hits
from megavar.recipes.base import BaseRecipe, Losses, Parts, Pass
from megavar.recipes.terms.base import Term, add_terms, heads_of, prepare_terms, taps_of
from megavar.tokenizers.base import Codebook
from tests.boundary.toy.generator import CausalInputs


@dataclass
class SelfTaughtInputs:
    """A prepared micro-batch."""

    model: CausalInputs
    targets: Tensor
    """int64 [B, L]."""
    terms: dict[str, Any] = field(default_factory=dict)


class SelfTaught(BaseRecipe):
    """Two passes per step."""

    def __init__(
        self, generator: nn.Module, tokenizer: Codebook, *, student: float, classes: int, label_drop: float, seed: int,
        terms: Sequence[Term] = (),
    ) -> None:  # fmt: skip
        self.generator, self.tokenizer, self.terms = generator, tokenizer, terms
        self.student, self.classes, self.label_drop, self.seed = student, classes, label_drop, seed

    @classmethod
    def build(cls, parts: Parts) -> "SelfTaught":
        """From the run's configuration."""
        config, terms, tokenizer = parts.config, parts.terms(), parts.tokenizer()
        generator = parts.generator(taps=taps_of(terms), heads=heads_of(terms, tokenizer.space))
        return cls(
            generator, tokenizer, student=config.recipe.student, classes=config.generator.classes,
            label_drop=config.generator.condition_drop, seed=config.train.seed, terms=terms,
        )  # type: ignore[attr-defined,union-attr]  # fmt: skip

    def modules(self) -> dict[str, nn.Module]:
        """One."""
        return {"generator": self.generator}

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> SelfTaughtInputs:
        """Tokens, labels, and keys for dropout."""
        ids = batch.tokens
        if ids is None:
            ids = self.tokenizer.tokens(self.tokenizer.encode(batch.require_images()))
        dropped = seeds.uniform(self.seed, "toy_label_drop", batch.epochs, batch.sample_ids) < self.label_drop
        keys = seeds.random_bits(self.seed, "toy_dropout", batch.epochs, batch.sample_ids)
        model = CausalInputs(torch.where(dropped, self.classes, batch.labels), ids[:, :-1], keys)
        inputs = SelfTaughtInputs(model, ids)
        return replace(inputs, terms=prepare_terms(self.terms, batch, inputs))

    def valid(self, batch: Batch, step: int) -> int:
        """All tokens count."""
        return len(batch) * self.tokenizer.space.length

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """See the module."""
        return [
            Pass(_forward, self.teacher_loss, carry=_most_likely, following=_of_its_own),
            Pass(_forward, self.student_loss, balance=self.student),
        ]

    def teacher_loss(self, output: GeneratorOutput, inputs: SelfTaughtInputs) -> Losses:
        """On true earlier tokens."""
        per_token = vocabulary_cross_entropy(output.prediction, inputs.targets)
        hits = vocabulary_hits(output.prediction, inputs.targets)
        named = {"loss": per_token.detach().sum(), "accuracy": hits.float().sum()}
        losses = Losses(per_token.sum(), named)
        return add_terms(losses, self.terms, output, inputs.terms, len(inputs.targets))

    def student_loss(self, output: GeneratorOutput, inputs: SelfTaughtInputs) -> Losses:
        """On its own earlier tokens."""
        total = vocabulary_cross_entropy(output.prediction, inputs.targets).sum()
        return Losses(self.student * total, {"loss/student": total.detach()})


def _forward(model: Callable[..., GeneratorOutput], inputs: SelfTaughtInputs) -> GeneratorOutput:
    return model(inputs.model)


def _most_likely(output: GeneratorOutput, inputs: SelfTaughtInputs) -> Tensor:
    return vocabulary_best(output.prediction)


def _of_its_own(inputs: SelfTaughtInputs, own: Tensor) -> SelfTaughtInputs:
    return replace(inputs, model=replace(inputs.model, ids=own[:, :-1]))
