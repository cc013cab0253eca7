"""Classifier-free guidance: how strongly, and where in a sequence, samples are driven towards their condition."""

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """(1 + t) c - t u: classifier-free guidance with t = 0 meaning none."""
    return (1 + strength) * conditional - strength * unconditional


def linear(guidance: float, step: int, steps: int) -> float:
    """VAR's schedule: t grows linearly from 0 at the first scale to ``guidance`` at the last."""
    return guidance * step / max(steps - 1, 1)
