"""Masked autoregression with a diffusion loss: MAR (arXiv:2406.11838; ``mar.py``, ``diffloss.py``), VGT's Table 8.

z      = tokenizer(image)                         frozen, a posterior's sample
share  ~ N(1, 1/4) within [0.7, 1]                one per step (released: per batch), or per sample
masked = the first ceil(share L) of a random order
i      ~ {0 ... 999}, e ~ N(0, 1)                 four draws for each token
loss   = mean over masked tokens of mean (e - noise(x_i))^2 + bound on the variance in bits
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from megavar import diffusion
from megavar.config.recipes.mar import MARRecipeConfig
from megavar.data.batch import Batch
from megavar.data.text import Text
from megavar.diffusion import Diffusion
from megavar.errors import ConfigError
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import MaskedInputs
from megavar.parallel import seeds
from megavar.recipes.base import Count, Losses, Parts, Pass
from megavar.recipes.one_generator import OneGenerator
from megavar.recipes.terms.base import add_terms, prepare_terms
from megavar.tokenizers.base import Continuous


@dataclass
class MaskedDiffusionInputs:
    """A prepared micro-batch."""

    model: MaskedInputs
    noise: Tensor
    """float32 [B, M, L, C]."""
    terms: dict[str, Any] = field(default_factory=dict)
    """What each term compares with."""


class MaskedDiffusion(OneGenerator):
    """The noise of masked tokens."""

    config: MARRecipeConfig
    tokenizer: Continuous
    chain = Diffusion()
    empty: Text | None = None
    """Tokens of no caption, where images are asked for by text."""

    @classmethod
    def build(cls, parts: Parts) -> Self:
        """See :meth:`Recipe.build`.

        Raises:
            ConfigError: text and generator do not fit.
        """
        recipe, choice = super().build(parts), parts.config.generator
        if choice is not None and choice.condition == "text":
            encoder = parts.text()
            sizes: Any = choice
            if (encoder.config.length, encoder.size <= sizes.text_vocabulary) != (sizes.buffer, True):
                raise ConfigError(
                    f"The text has {encoder.config.length} rows (data.text.length) and ids below {encoder.size}, but "
                    f"generator.buffer={sizes.buffer} and generator.text_vocabulary={sizes.text_vocabulary}: give the "
                    f"buffer that length, and the vocabulary at least that size."
                )
            recipe.empty = encoder.empty
        return recipe

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> MaskedDiffusionInputs:
        """Images (or cached latents) to tokens, masks, noise and times."""
        tokens = self.tokens(batch)
        who = batch.epochs[:, None, None], batch.sample_ids[:, None, None]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        draws = torch.arange(self.config.noise_draws, device=tokens.device)[:, None]
        times = seeds.random_bits(self.seed, "times", *who, draws, places) % diffusion.TIMES
        keys = (part[..., None] for part in (*who, draws, places))
        channel = torch.arange(tokens.shape[2], device=tokens.device)
        noise = seeds.normal(self.seed, "noise", *keys, channel).float()
        model = MaskedInputs(
            self.labels(batch),
            tokens,
            self.masked(batch, step),
            text=self.text(batch),
            noisy=self.chain.noisy(tokens[:, None], noise, times),
            times=times,
            sample_keys=seeds.random_bits(self.seed, "dropout", batch.epochs, batch.sample_ids),
        )
        inputs = MaskedDiffusionInputs(model, noise)
        inputs.terms = prepare_terms(self.terms, batch, inputs)
        return inputs

    def tokens(self, batch: Batch) -> Tensor:
        """True tokens, float32 [B, L, C]."""
        latents = batch.latents if batch.latents is not None else self.tokenizer.encode(batch.require_images())
        if self.config.posterior == "mean":
            return self.tokenizer.tokens(latents)
        space = self.tokenizer.space
        normal = seeds.normal_tokens(
            self.seed, "posterior", batch.epochs, batch.sample_ids, space.length, space.channels
        )
        return self.tokenizer.sample(latents, normal)

    def text(self, batch: Batch) -> Tensor | None:
        """Ids int64 [B, P], without caption for a share of the samples; None where images are asked for by class."""
        if self.empty is None:
            return None
        assert batch.text_ids is not None
        drop = seeds.uniform(self.seed, "label_drop", batch.epochs, batch.sample_ids) < self.label_drop
        return torch.where(drop[:, None], self.empty.ids.to(drop.device), batch.text_ids)

    def masked(self, batch: Batch, step: int) -> Tensor:
        """bool [B, L]."""
        places = torch.arange(self.tokenizer.space.length, device=batch.sample_ids.device)
        keys = batch.epochs[:, None], batch.sample_ids[:, None]
        rank = seeds.random_bits(self.seed, "order", *keys, places).argsort(1).argsort(1)
        counts = self.counts(batch, step)
        return rank < (counts[:, None] if isinstance(counts, Tensor) else counts)

    def counts(self, batch: Batch, step: int) -> int | Tensor:
        """Masked tokens of each sample: the same number, or int64 [B]."""
        length = self.tokenizer.space.length
        if self.config.masked_share == "batch":
            return math.ceil(length * float(self._share(seeds.uniform(self.seed, "masked share", step))))
        share = self._share(seeds.uniform(self.seed, "masked share", batch.epochs, batch.sample_ids))
        return (length * share).ceil().long()

    def _share(self, uniform: Tensor) -> Tensor:
        return diffusion.truncated_normal(uniform, 1.0, 0.25, self.config.least_masked, 1.0)

    def valid(self, batch: Batch, step: int) -> Count:
        """Masked tokens."""
        counts = self.counts(batch, step)
        return counts.sum() if isinstance(counts, Tensor) else len(batch) * counts

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """One."""
        return [Pass(lambda model, inputs: model(inputs.model), self.loss)]

    def loss(self, output: GeneratorOutput, inputs: MaskedDiffusionInputs) -> Losses:
        """Of masked tokens, the mean over draws; its two parts beside it."""
        model = inputs.model
        assert model.times is not None
        squared, bound = self.chain.errors(output.prediction, model.tokens[:, None], inputs.noise, model.times)
        of_token = {"loss": squared + bound, "loss/noise": squared, "loss/variance": bound}
        sums = {name: (errors.mean(1) * model.masked).sum() for name, errors in of_token.items()}
        losses = Losses(sums["loss"], {name: value.detach() for name, value in sums.items()})
        return add_terms(losses, self.terms, output, inputs.terms, len(model.masked))
