"""Online clustered codebook (Zheng and Vedaldi 2023, arXiv:2307.15139), as AliTok's first stage uses it.

    share_v = moving average of the share of the tokens that have code v
    move_v  = exp(-10 V share_v / (1 - decay) - 0.001)                     1 for a code that nothing uses
    code_v  = (1 - move_v) code_v + move_v (the vector of the global batch that is nearest to code_v)

Source: ali-vilab/alitok ``train_tokenizer/model/vae_stage1.py``, which does it within the forward pass; here after the
optimizer's step.
"""

import torch
from torch import Tensor

from megavar.recipes.ranks import gather_over_ranks, rank, sum_over_ranks
from megavar.recipes.tokenizer.codebook import Replacement
from megavar.tokenizers.nearest import nearest
from megavar.tokenizers.trainable import Quantizer, QuantizerOutput


class ClusteredCodebook:
    """The upkeep; the shares live in the quantizer's buffer ``usage_average``."""

    def __init__(self, quantizer: Quantizer, decay: float) -> None:
        self.quantizer, self.decay = quantizer, decay
        self._usage: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def begin(self) -> None:
        """See :class:`Upkeep`."""
        self._usage, self._vectors = [], []

    def observe(self, step: int, quantized: QuantizerOutput, keys: Tensor) -> None:
        """Note a micro-batch."""
        self._usage.append(quantized.usage)
        self._vectors.append(quantized.targets.flatten(0, 1))

    @torch.no_grad()
    def after_step(self, step: int) -> Replacement | None:
        """Update the shares; return the codes that move. Collective."""
        if not self._usage:
            return None
        usage = sum_over_ranks(torch.stack(self._usage).sum(0))
        shares = self.quantizer.usage_average
        shares.copy_(self.decay * shares + (1 - self.decay) * usage / usage.sum())
        codes = self.quantizer.embedding()
        exponent = 10 * len(codes) * shares.float().sum(0) / (1 - self.decay) + 1e-3
        move = torch.exp(-exponent)
        found = self._nearest_of_all(codes)
        self.begin()
        rows = move.nonzero().flatten()
        if len(rows) == 0 or not bool(found.isfinite().all()):
            return None
        return Replacement(rows, found[rows], move[rows])

    def _nearest_of_all(self, codes: Tensor) -> Tensor:
        """For each code the nearest vector of all ranks: float32 [V, C]. In float64: vectors are near each other."""
        vectors = torch.cat(self._vectors).float()
        own = vectors[nearest(codes.double(), vectors.double())]
        distances = gather_over_ranks((own.double() - codes).square().sum(1)[None])  # [ranks, V]
        return sum_over_ranks(own * (distances.argmin(0) == rank())[:, None])
