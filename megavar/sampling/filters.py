"""Guidance and truncation of next-token distributions, as VAR, FlexVAR and SAR use them."""

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """(1 + t) c - t u: classifier-free guidance with t = 0 meaning none."""
    return (1 + strength) * conditional - strength * unconditional


def scale_guidance(guidance: float, scale: int, scales: int) -> float:
    """VAR's schedule: t grows linearly from 0 at the first scale to ``guidance`` at the last."""
    return guidance * scale / max(scales - 1, 1)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Set logits outside the top k, then outside the nucleus, to -inf.

    Args:
        logits: [..., V].
        top_k: number of tokens to keep; all ties with the k-th are kept. 0 keeps all.
        top_p: tokens whose cumulative probability, counted from the least likely, is at most 1 - p are removed; the
            most likely always stays. 0 keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(dim=-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[..., -1] = False
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    return logits


def draw(logits: Tensor, noise: Tensor | None) -> Tensor:
    """Sample by the Gumbel-max trick; without noise take the most likely token.

    Args:
        logits: [..., V].
        noise: standard Gumbel noise [..., V], or None.

    Returns:
        int64 [...].
    """
    return (logits if noise is None else logits + noise).argmax(-1)
