"""Next-token prediction: RAR (arXiv:2411.00776) and reAR (``papers/rear.md`` section 4.1).

ids    = tokenizer(image)                      frozen; a grid row by row, or a line
order  = row by row, or random for some        RAR: annealed from always to never
input  = ids, some of them wrong               reAR Eq. 4: noisy context, e ~ U(0, f(t))
label  = "no class" for 10 % of the samples
loss   = mean cross entropy of the true tokens given the wrong ones before them           Eq. 5
         + balance loss of experts, + terms    reAR: codebook-embedding regularization, Eq. 6
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megavar.config.recipes.rear import ReARConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import RasterInputs
from megavar.parallel import seeds
from megavar.parallel.vocabulary import vocabulary_cross_entropy, vocabulary_hits
from megavar.recipes.base import Losses, Pass
from megavar.recipes.noise import noisy
from megavar.recipes.one_generator import OneGenerator
from megavar.recipes.terms.base import add_terms, prepare_terms
from megavar.tokenizers.base import Tokenizer


@dataclass
class NextTokenInputs:
    """A prepared micro-batch."""

    model: RasterInputs
    targets: Tensor
    """int64 [B, L]: the true tokens in the order in which they are predicted."""
    terms: dict[str, Any] = field(default_factory=dict)
    """What each term compares with."""


class NextToken(OneGenerator):
    """Cross entropy of each token given those before it."""

    config: ReARConfig
    tokenizer: Tokenizer

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> NextTokenInputs:
        """Images (or cached tokens or latents) to tokens, wrong tokens, orders and labels."""
        ids, vocabulary = self._tokens(batch), self.tokenizer.space.vocabulary
        assert vocabulary is not None
        progress = step / self.steps
        read = noisy(ids, self.config.noise, batch, progress, vocabulary, self.seed)
        order = self._order(batch, progress)
        if order is not None:
            ids, read = ids.gather(1, order), read.gather(1, order)
        labels = self.labels(batch)
        keys = seeds.random_bits(self.seed, "dropout", batch.epochs, batch.sample_ids)
        inputs = NextTokenInputs(RasterInputs(labels, read[:, :-1], order, keys), ids)
        inputs.terms = prepare_terms(self.terms, batch, inputs)
        return inputs

    def _tokens(self, batch: Batch) -> Tensor:
        """True tokens, int64 [B, L]."""
        if batch.tokens is not None:
            return batch.tokens
        latents = batch.latents if batch.latents is not None else self.tokenizer.encode(batch.require_images())
        return self.tokenizer.tokens(latents)

    def _order(self, batch: Batch, progress: float) -> Tensor | None:
        """Place of the i-th token, int64 [B, L]; None where every sample is read row by row."""
        share = 0.0 if self.config.random_order is None else self.config.random_order.share(progress)
        if share == 0:
            return None
        keys = batch.epochs[:, None], batch.sample_ids[:, None]
        places = torch.arange(self.tokenizer.space.length, device=batch.labels.device)
        shuffled = seeds.random_bits(self.seed, "order", *keys, places).argsort(1)
        return torch.where(seeds.uniform(self.seed, "random_order", *keys) < share, shuffled, places)

    def valid(self, batch: Batch, step: int) -> int:
        """All tokens count."""
        return len(batch) * self.tokenizer.space.length

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Teacher forcing."""
        return [Pass(lambda model, inputs: model(inputs.model), self.loss)]

    def loss(self, output: GeneratorOutput, inputs: NextTokenInputs) -> Losses:
        """Cross entropy in nats (Eq. 5), and that of the terms; the correct token ratio beside it."""
        per_token = vocabulary_cross_entropy(output.prediction, inputs.targets, self.config.label_smoothing)
        total = per_token.sum()
        with torch.no_grad():
            hits = vocabulary_hits(output.prediction, inputs.targets).float().sum()
        losses = Losses(total, {"loss": total.detach(), "accuracy": hits})
        return add_terms(losses, self.terms, output, inputs.terms, len(inputs.targets))
