"""What the blocks of one forward pass share besides hidden states."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megavar.parallel import seeds
from megavar.transformer.layout import ScaleLayout


@dataclass
class KeyValueCache:
    """Keys and values of all positions decoded so far, per block: [L, B, H, D]."""

    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions of ``block`` and return everything up to now."""
        if block in self.entries:
            past_key, past_value = self.entries[block]
            key, value = torch.cat([past_key, key]), torch.cat([past_value, value])
        self.entries[block] = (key, value)
        return key, value


@dataclass
class ForwardContext:
    """Passed to every block; attention receives it in the place of Megatron-core's attention mask."""

    layout: ScaleLayout
    scale_index: Tensor
    """Scale of each row of the full sequence of this pass, int64 [L]."""
    seed: int = 0
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for drop path; None disables drop path."""
    cache: KeyValueCache | None = None
    """Present while decoding: the pass then holds the rows of one scale only."""
    counted: Tensor | None = None
    """bool [B]: samples that routing statistics count (the conditional half under guidance); None counts all."""
    routing: "list[RoutingRecord] | None" = None
    """Collects one record per mixture-of-experts layer."""

    def silent(self) -> "ForwardContext":
        """The same context for a recomputation, which must not be recorded twice."""
        return replace(self, routing=None)

    def keep_mask(self, stream: str, block: int, rate: float) -> Tensor | None:
        """Drop-path multipliers [B] (0 or 1/keep), a function of (seed, sample, block); None means keep all."""
        if self.sample_keys is None or rate == 0.0:
            return None
        kept = seeds.uniform(self.seed, stream, block, self.sample_keys) >= rate
        return kept.to(torch.float32) / (1.0 - rate)


@dataclass
class RoutingRecord:
    """What one mixture-of-experts layer did in one pass; no gradient, no host synchronization."""

    block: int
    load: Tensor
    """float32 [K, M]: tokens of each scale assigned to each expert (this rank's tokens)."""
    balance: Tensor
    """float32 scalar: Eq. 10, averaged over this rank's images."""
