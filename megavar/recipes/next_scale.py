"""Next-scale prediction: VAR's recipe, and MEPA's where the generator's feed-forward networks are experts.

    ids, features = tokenizer(image)                       frozen pyramid of tokens: MEPA Eq. 1 to 3
    label         = "no class" for 10 % of the samples
    logits        = generator(label, features)             experts routed by Eq. 6 to 9 inside the blocks
    loss          = lambda * mean cross entropy over all tokens     Eq. 5, 13
                    + balance loss                         Eq. 10, injected by the routers where they score tokens
                    + terms                                semantic guidance: Eq. 11 to 13
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megavar.config.recipes.mepa import MEPAConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import seeds
from megavar.parallel.vocabulary import vocabulary_cross_entropy, vocabulary_hits
from megavar.recipes.base import BaseRecipe, Losses, Parts, Pass
from megavar.recipes.terms.base import Term, add_terms, heads_of, prepare_terms, taps_of
from megavar.tokenizers.base import Pyramid


@dataclass
class NextScaleInputs:
    """A prepared micro-batch."""

    model: ScaleInputs
    targets: Tensor
    """int64 [B, L]: the true token at every position."""
    terms: dict[str, Any] = field(default_factory=dict)
    """What each term compares with."""


class NextScale(BaseRecipe):
    """Next-scale cross entropy with balanced experts."""

    def __init__(
        self,
        config: MEPAConfig,
        generator: nn.Module,
        tokenizer: Pyramid,
        *,
        classes: int,
        label_drop: float,
        seed: int,
        terms: Sequence[Term] = (),
    ) -> None:
        """Train ``generator``, or a ``ModuleList`` of its chunks, on the tokens of a frozen ``tokenizer``.

        Args:
            classes: number of classes, which stands for "no class".
            label_drop: share of samples without class.
            terms: losses to add; the generator has their taps and heads.
        """
        self.config = config
        self.generator = generator
        self.tokenizer = tokenizer
        self.scales = tokenizer.space.sides
        self.classes, self.label_drop = classes, label_drop
        self.seed = seed
        self.terms = terms

    @classmethod
    def build(cls, parts: Parts) -> "NextScale":
        """See :meth:`Recipe.build`."""
        config, terms, tokenizer = parts.config, parts.terms(), parts.tokenizer()
        assert isinstance(config.recipe, MEPAConfig) and config.generator is not None
        return cls(
            config.recipe,
            parts.generator(taps=taps_of(terms), heads=heads_of(terms, tokenizer.space)),
            tokenizer,
            classes=config.generator.class_count or 0,
            label_drop=config.generator.condition_drop,
            seed=config.train.seed,
            terms=terms,
        )

    def modules(self) -> dict[str, nn.Module]:
        """The one trained module."""
        return {"generator": self.generator}

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> NextScaleInputs:
        """Images (or cached tokens or latents) to tokens, teacher-forcing features and labels."""
        if batch.tokens is not None:
            ids, features = batch.tokens, self.tokenizer.inputs(batch.tokens)
        else:
            latents = batch.latents if batch.latents is not None else self.tokenizer.encode(batch.require_images())
            ids, features = self.tokenizer.at(latents)
        dropped = seeds.uniform(self.seed, "label_drop", batch.epochs, batch.sample_ids) < self.label_drop
        labels = torch.where(dropped, self.classes, batch.labels)
        keys = seeds.random_bits(self.seed, "drop_path", batch.epochs, batch.sample_ids)
        inputs = NextScaleInputs(ScaleInputs(labels, features, keys), ids)
        inputs.terms = prepare_terms(self.terms, batch, inputs)
        return inputs

    def valid(self, batch: Batch, step: int) -> int:
        """All tokens count."""
        return len(batch) * self.tokenizer.space.length

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Teacher forcing."""
        return [Pass(lambda model, inputs: model(inputs.model), self.loss)]

    def loss(self, output: GeneratorOutput, inputs: NextScaleInputs) -> Losses:
        """Weighted cross entropy in nats (Eq. 5, 13) and the terms; loss and accuracy of each scale beside it."""
        per_token = vocabulary_cross_entropy(output.prediction, inputs.targets, self.config.label_smoothing)
        total = per_token.sum()
        with torch.no_grad():
            hits = vocabulary_hits(output.prediction, inputs.targets).float()
            sizes, means = [side * side for side in self.scales], {}
            for side, loss, hit in zip(self.scales, per_token.detach().split(sizes, 1), hits.split(sizes, 1)):
                means[f"loss/scale_{side:02d}"] = (loss.sum(), loss.numel())
                means[f"accuracy/scale_{side:02d}"] = (hit.sum(), hit.numel())
        losses = Losses(self.config.cross_entropy_weight * total, {"loss": total.detach(), "accuracy": hits.sum()}, means=means)
        return add_terms(losses, self.terms, output, inputs.terms, len(inputs.targets))
