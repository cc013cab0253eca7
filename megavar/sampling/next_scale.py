"""Decoding of next-scale generators: one token map after the other, coarse to fine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.generators.inputs import ScaleInputs
from megavar.generators.var import VAR
from megavar.parallel import seeds
from megavar.sampling.filters import draw, guide, scale_guidance, truncate
from megavar.transformer.cache import KeyValueCache

Noise = Callable[[int, int, int], Tensor | None]
"""(scale, tokens, vocabulary) -> Gumbel noise [B, tokens, V], or None for the most likely token."""


class Quantizer(Protocol):
    """What decoding needs of a multi-scale quantizer."""

    def embed(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, N, D]."""
        ...

    def next_input(self, k: int, f_hat: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Add the codes [B, D, s, s] of scale k to the feature map; also return the map resized to scale k + 1."""
        ...


@dataclass
class DecodedScales:
    """Everything decoding produced, coarse to fine."""

    ids: list[Tensor] = field(default_factory=list)
    """int64 [B, s_k^2]."""
    logits: list[Tensor] = field(default_factory=list)
    """Guided logits before truncation, [B, s_k^2, V]; empty unless asked for."""
    feature_maps: list[Tensor] = field(default_factory=list)
    """Accumulated features after each scale, [B, D, h, w]; the last one goes to the image decoder."""


def noise_of_samples(seed: int, indices: Tensor) -> Noise:
    """Gumbel noise that depends on (seed, sample index, scale, position, token) and on nothing else.

    Args:
        indices: int64 [B] global sample indices.
    """

    def noise(scale: int, tokens: int, vocabulary: int) -> Tensor:
        position = torch.arange(tokens, device=indices.device)[:, None]
        token = torch.arange(vocabulary, device=indices.device)
        return seeds.gumbel(seed, "sampling", scale, indices[:, None, None], position, token)

    return noise


@torch.no_grad()
def decode(
    model: VAR,
    quantizer: Quantizer,
    labels: Tensor,
    settings: NextScaleSampling,
    noise: Noise | None,
    *,
    keep_logits: bool = False,
) -> DecodedScales:
    """Draw one image per label (VAR ``autoregressive_infer_cfg``).

    Args:
        labels: int64 [B].
        settings: guidance and truncation.
        noise: see :data:`Noise`; None decodes greedily.
    """
    batch, scales = labels.shape[0], model.space.sides
    guided = settings.guidance > 0
    unconditional = torch.full_like(labels, model.choice.classes)
    doubled = torch.cat([labels, unconditional]) if guided else labels
    counted = torch.arange(doubled.shape[0], device=labels.device) < batch
    cache = KeyValueCache(sum(side * side for side in scales))
    result, features = DecodedScales(), None
    final = scales[-1]
    f_hat: Tensor | None = None
    for k, side in enumerate(scales):
        repeated = features if features is None or not guided else features.repeat(2, 1, 1)
        logits = model.step(ScaleInputs(doubled, repeated, scale=k), cache, counted)
        if guided:
            conditional, free = logits.chunk(2)
            logits = guide(conditional, free, scale_guidance(settings.guidance, k, len(scales)))
        if keep_logits:
            result.logits.append(logits)
        drawn = noise(k, side * side, logits.shape[-1]) if noise is not None else None
        ids = draw(truncate(logits / settings.temperature, settings.top_k, settings.top_p), drawn)
        codes = quantizer.embed(ids).transpose(1, 2).unflatten(-1, (side, side))
        if f_hat is None:
            f_hat = codes.new_zeros(batch, codes.shape[1], final, final)
        f_hat, following = quantizer.next_input(k, f_hat, codes)
        features = following.flatten(2).transpose(1, 2)
        result.ids.append(ids)
        result.feature_maps.append(f_hat.clone())
    return result
