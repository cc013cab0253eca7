"""Decoding token by token with a cache."""

import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.sampling.noise import Noise, pick
from megavar.tokenizers.base import Codebook
from megavar.transformer.cache import KeyValueCache
from tests.boundary.toy.choices import LineSampling
from tests.boundary.toy.generator import Causal, CausalInputs


class Line:
    """The class first, then each token after the one before."""

    def __init__(self, settings: LineSampling) -> None:
        self.temperature = settings.temperature

    def draw(self, generator: Causal, tokenizer: Codebook, condition: Condition, noise: Noise | None) -> Tensor:
        """int64 [B, L]."""
        length, labels = tokenizer.space.length, condition.labels
        cache, newest = KeyValueCache(length), labels.new_empty(len(labels), 0)
        drawn = []
        for place in range(length):
            logits = generator.step(CausalInputs(labels, newest, start=place), cache) / self.temperature
            uniform = noise.uniform(torch.tensor([place], device=labels.device)) if noise is not None else None
            newest = pick(logits, uniform)
            drawn.append(newest)
        return torch.cat(drawn, 1)
