"""Visual generation tuning: QueryAR (VGT section 3.3; ``vgt_internvl3.py``, ``flow_head.py``).

z     = tokenizer(image)                                  frozen VGT-AE, row by row
p     = random permutation of the places                  one per step (released: per batch), or per sample
text  = request with the caption, without for 10 %
rows  = text, <img>, Q_p(1), z_p(1), Q_p(2), z_p(2) ...
t     = shift(sigmoid(n)), n ~ N(0, 1), e ~ N(0, 1)       per latent
v     = generator(rows; (1 - t) z + t e, t)               t = 1 is noise here
loss  = mean over latents of mean (v - (e - z))^2         Eq. 8;  + balance loss of experts, + terms
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from megavar import flow_matching
from megavar.config.recipes.vgt import VGTConfig
from megavar.data.batch import Batch
from megavar.data.text import Text, TextEncoder
from megavar.errors import ConfigError
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import QueryInputs
from megavar.parallel import seeds
from megavar.recipes.base import Losses, Parts, Pass, chunks_of
from megavar.recipes.one_generator import OneGenerator
from megavar.recipes.terms.base import add_terms, prepare_terms
from megavar.tokenizers.base import Continuous


@dataclass
class QueryFlowInputs:
    """A prepared micro-batch."""

    model: QueryInputs
    data: Tensor
    """float32 [B, N, C]: the true latents in the order in which they are asked for."""
    noise: Tensor
    """float32 [B, N, C]: what they are mixed with."""
    order: Tensor
    """int64 [B, N]: their places."""
    terms: dict[str, Any] = field(default_factory=dict)
    """What each term compares with."""


def training_rows(
    text: Tensor, mask: Tensor, start: Tensor, data: Tensor, order: Tensor, noise: Tensor, times: Tensor, keys: Tensor
) -> QueryInputs:
    """The interleaved sequence.

    Args:
        text: int64 [B, T], padded on the right.
        mask: bool [B, T], False at padding.
        start: int64 [S], what begins an image.
        data, noise: float32 [B, N, C] in the order of ``order``, int64 [B, N].
        times: float32 [B, N].
        keys: int64 [B], see :class:`QueryInputs`.
    """
    batch, length = order.shape
    ids = torch.cat([text, start.expand(batch, -1)], 1)
    seen = torch.ones(batch, len(start) + 2 * length, dtype=torch.bool, device=order.device)
    return QueryInputs(
        ids,
        torch.stack([order, order], 2).flatten(1),
        torch.stack([torch.zeros_like(data), data], 2).flatten(1, 2),
        torch.arange(2 * length, device=order.device) % 2 == 1,
        slice(0, None, 2),
        valid=torch.cat([mask, seen], 1),
        noisy=flow_matching.interpolate(data, noise, times[..., None]),
        times=times,
        sample_keys=keys,
    )


class QueryFlow(OneGenerator):
    """Velocity of each latent, given the text and the latents before it."""

    config: VGTConfig
    tokenizer: Continuous
    empty: Text
    """The request without caption, [1, T]."""

    @classmethod
    def build(cls, parts: Parts) -> Self:
        """See :meth:`Recipe.build`.

        Raises:
            ConfigError: text and generator do not fit.
        """
        encoder, choice = parts.text(), parts.config.generator
        assert choice is not None
        _check_text(encoder, choice)
        recipe = super().build(parts)
        recipe.empty = encoder.empty
        return recipe

    @property
    def start(self) -> tuple[int, ...]:
        """Ids of what begins an image."""
        choice: Any = chunks_of(self.generator)[0].choice
        return tuple(choice.image_start)

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> QueryFlowInputs:
        """Images (or cached latents) and texts to rows, noise and times."""
        text, mask = self.text(batch)
        tokens, noise = self.tokens(batch), self._normal("noise", batch)
        order = self.order(batch, step)
        data, noise = (_picked(values, order) for values in (tokens, noise))
        times = self.times(batch).gather(1, order)
        start = torch.tensor(self.start, device=order.device)
        keys = seeds.random_bits(self.seed, "dropout", batch.epochs, batch.sample_ids)
        model = training_rows(text, mask, start, data, order, noise, times, keys)
        inputs = QueryFlowInputs(model, data, noise, order)
        inputs.terms = prepare_terms(self.terms, batch, inputs)
        return inputs

    def text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, T] and mask bool [B, T], without caption for a share of the samples."""
        assert batch.text_ids is not None and batch.text_mask is not None
        drop = seeds.uniform(self.seed, "label_drop", batch.epochs, batch.sample_ids) < self.label_drop
        ids, mask = self.empty.ids.to(drop.device), self.empty.mask.to(drop.device)
        return torch.where(drop[:, None], ids, batch.text_ids), torch.where(drop[:, None], mask, batch.text_mask)

    def tokens(self, batch: Batch) -> Tensor:
        """True latents, float32 [B, N, C], row by row."""
        latents = batch.latents if batch.latents is not None else self.tokenizer.encode(batch.require_images())
        if self.config.posterior == "mean":
            return self.tokenizer.tokens(latents)
        return self.tokenizer.sample(latents, self._normal("posterior", batch))

    def order(self, batch: Batch, step: int) -> Tensor:
        """Places in the order of the sequence, int64 [B, N]."""
        places = torch.arange(self.tokenizer.space.length, device=batch.sample_ids.device)
        if self.config.permutation == "sample":
            keys = batch.epochs[:, None], batch.sample_ids[:, None]
            return seeds.random_bits(self.seed, "order", *keys, places).argsort(1)
        return seeds.random_bits(self.seed, "order of a step", step, places).argsort().expand(len(batch), -1)

    def times(self, batch: Batch) -> Tensor:
        """Flow times of all places, float32 [B, N]; 1 is noise."""
        keys = batch.epochs[:, None], batch.sample_ids[:, None]
        places = torch.arange(self.tokenizer.space.length, device=batch.sample_ids.device)
        if self.config.times == "uniform":
            times = seeds.uniform(self.seed, "times", *keys, places).float()
        else:
            times = flow_matching.logit_normal(seeds.normal(self.seed, "times", *keys, places).float())
        return self.shifted(times)

    def shifted(self, times: Tensor) -> Tensor:
        """Times of the data set's distribution to those that are trained."""
        if self.config.time_shift_towards == "noise":
            return flow_matching.shifted(times, self.config.time_shift)
        return 1 - flow_matching.shifted(1 - times, self.config.time_shift)

    def _normal(self, stream: str, batch: Batch) -> Tensor:
        """Standard normal [B, N, C]."""
        space = self.tokenizer.space
        return seeds.normal_tokens(self.seed, stream, batch.epochs, batch.sample_ids, space.length, space.channels)

    def valid(self, batch: Batch, step: int) -> int:
        """All latents count."""
        return len(batch) * self.tokenizer.space.length

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Teacher forcing."""
        return [Pass(lambda model, inputs: model(inputs.model), self.loss)]

    def loss(self, output: GeneratorOutput, inputs: QueryFlowInputs) -> Losses:
        """Squared error of the velocity (Eq. 8)."""
        total = flow_matching.velocity_error(output.prediction, inputs.data, inputs.noise).sum()
        losses = Losses(total, {"loss": total.detach()})
        return add_terms(losses, self.terms, output, inputs.terms, len(inputs.data))


def _picked(values: Tensor, order: Tensor) -> Tensor:
    """Rows of [B, N, C] in the order of [B, N]."""
    return values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))


def _check_text(encoder: TextEncoder, choice: Any) -> None:
    """Compare the text's section with the generator's."""
    length, vocabulary = encoder.config.length, choice.language_model.vocabulary
    if length != choice.text_length:
        raise ConfigError(
            f"data.text.length={length}, but generator.text_length={choice.text_length}: give both the same number."
        )
    marked = encoder.tokenizer.token_to_id("<img>")
    if marked is not None and choice.image_start != (marked,):
        raise ConfigError(
            f"generator.image_start={list(choice.image_start)}, but <img> has the id {marked} in {encoder.origin}: set "
            f"generator.image_start=[{marked}]."
        )
    if encoder.size > vocabulary:
        raise ConfigError(
            f"The text tokenizer has {encoder.size} tokens, but generator.language_model.vocabulary={vocabulary}. Name "
            f"the language model's own tokenizer in data.text.tokenizer, or set the vocabulary to its size."
        )
