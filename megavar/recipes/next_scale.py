"""Next-scale prediction: VAR's recipe, and MEPA's where the generator's feed-forward networks are experts.

scales        = the tokenizer's, or random ones        FlexVAR
ids, features = tokenizer(image, scales)               frozen pyramid of tokens: MEPA Eq. 1 to 3
label         = "no class" for 10 % of the samples
logits        = generator(label, features)             experts routed by Eq. 6 to 9 inside the blocks
loss          = lambda * mean cross entropy            Eq. 5, 13
                + balance loss                         Eq. 10, injected by the routers where they score tokens
                + terms                                semantic guidance: Eq. 11 to 13
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megavar.config.choice import resolve
from megavar.config.recipes.next_scale import NextScaleConfig
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import seeds
from megavar.parallel.vocabulary import scores
from megavar.recipes.base import Count, Losses, Pass
from megavar.recipes.noise import noisy
from megavar.recipes.one_generator import OneGenerator
from megavar.recipes.scale_lists.base import ScaleLists
from megavar.recipes.terms.base import add_terms, prepare_terms
from megavar.tokenizers.base import Pyramid


@dataclass
class NextScaleInputs:
    """A prepared micro-batch."""

    model: ScaleInputs
    targets: Tensor
    """int64 [B, L]: the true token at every position."""
    terms: dict[str, Any] = field(default_factory=dict)
    """What each term compares with."""


class NextScale(OneGenerator):
    """Next-scale cross entropy with balanced experts."""

    config: NextScaleConfig
    tokenizer: Pyramid

    @functools.cached_property
    def scale_lists(self) -> ScaleLists:
        """What decides on which scales a step trains."""
        lists: ScaleLists = resolve(self.config.scale_lists)(
            self.config.scale_lists, self.tokenizer.space.sides, self.seed
        )
        return lists

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> NextScaleInputs:
        """Images (or cached tokens or latents) to tokens, teacher-forcing features and labels."""
        sides = self.scale_lists.of_step(step)
        ids, features = self._tokens(batch, sides)
        if self.config.noise is not None:
            assert self.tokenizer.space.vocabulary is not None
            wrong = noisy(
                ids, self.config.noise, batch, step / self.steps, self.tokenizer.space.vocabulary, self.seed
            )  # fmt: skip
            features = self.tokenizer.inputs(wrong, sides)
        labels = self.labels(batch)
        keys = seeds.random_bits(self.seed, "drop_path", batch.epochs, batch.sample_ids)
        inputs = NextScaleInputs(ScaleInputs(labels, features, keys, sides), ids)
        inputs.terms = prepare_terms(self.terms, batch, inputs)
        return inputs

    def _tokens(self, batch: Batch, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] at these scales, and what the generator reads, float32 [B, L - L_0, D]."""
        if batch.tokens is None:
            latents = batch.latents if batch.latents is not None else self.tokenizer.encode(batch.require_images())
            return self.tokenizer.at(latents, sides)
        if sides != self.tokenizer.space.sides:
            raise ConfigError(
                "data.cache holds tokens of the tokenizer's own scales, but recipe.scale_lists trains on others. Cache "
                "latents instead (data.source.content=latents)."
            )
        return batch.tokens, self.tokenizer.inputs(batch.tokens)

    def valid(self, batch: Batch, step: int) -> Count:
        """All tokens count."""
        tokens = len(batch) * sum(side * side for side in self.scale_lists.of_step(step))
        return tokens if self.scale_lists.shared else torch.tensor(tokens, device=batch.labels.device)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Teacher forcing."""
        return [Pass(self.forward, self.loss)]

    def forward(self, model: Callable[[ScaleInputs], Any], inputs: NextScaleInputs) -> Any:
        """The generator is told the targets: it may compute their losses itself, without keeping all logits."""
        return model(replace(inputs.model, targets=inputs.targets, label_smoothing=self.config.label_smoothing))

    def loss(self, output: GeneratorOutput, inputs: NextScaleInputs) -> Losses:
        """Weighted cross entropy in nats (Eq. 5, 13) and the terms; loss and accuracy of each scale beside it."""
        per_token, hit = scores(output.prediction, inputs.targets, self.config.label_smoothing)
        total = per_token.sum()
        with torch.no_grad():
            hits = hit.float()
            means = self._by_scale(self.sides(inputs), per_token.detach(), hits)
        weighted = self.config.cross_entropy_weight * total
        losses = Losses(weighted, {"loss": total.detach(), "accuracy": hits.sum()}, means=means)
        return add_terms(losses, self.terms, output, inputs.terms, len(inputs.targets))

    def sides(self, inputs: NextScaleInputs) -> tuple[int, ...]:
        """Of the step's scales."""
        sides: tuple[int, ...] = inputs.model.sides or self.tokenizer.space.sides
        return sides

    def _by_scale(self, sides: tuple[int, ...], losses: Tensor, hits: Tensor) -> dict[str, tuple[Tensor, Count]]:
        """Loss and accuracy of each scale; ranks may have other scales, so those that are absent here are empty."""
        sizes = [side * side for side in sides]
        present = dict(zip(sides, zip(losses.split(sizes, 1), hits.split(sizes, 1), strict=True), strict=True))
        nothing = losses.new_zeros(())
        means: dict[str, tuple[Tensor, Count]] = {}
        for side in self.scale_lists.all_sides:
            loss, hit = present.get(side, (nothing, nothing))
            count = loss.numel() if side in present else 0
            means[f"loss/scale_{side:02d}"] = (loss.sum(), count)
            means[f"accuracy/scale_{side:02d}"] = (hit.sum(), count)
        return means
