"""Where chance enters a sample: one uniform number per token, and the token that it stands for; or normal vectors.

A token is drawn by inverting the cumulative distribution over the vocabulary. That needs one number where the
Gumbel-max trick needs one per entry of the vocabulary, and the number depends on (seed, sample, position) alone: not
on the batch, the chunk, the rank or the order in which a procedure visits positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from megavar.errors import CheckpointError
from megavar.parallel import seeds

_ELEMENTS = 1 << 20
"""Probabilities that are accumulated at once: 8 MiB of float64, which a CPU's cache holds."""


@dataclass(frozen=True)
class Noise:
    """The random numbers of B samples."""

    seed: int
    indices: Tensor
    """int64 [B]: the samples' indices."""

    def uniform(self, positions: Tensor, repetition: int = 0) -> Tensor:
        """Uniform numbers in [0, 1) for tokens.

        Args:
            positions: int64 [n], places in the sample's sequence of tokens.
            repetition: which draw of the same token it is, for procedures that draw tokens again.

        Returns:
            float64 [B, n].
        """
        return seeds.uniform(self.seed, "sampling", repetition, self.indices[:, None], positions)

    def normal(self, positions: Tensor, channels: int, repetition: int = 0) -> Tensor:
        """Standard normal vectors of continuous tokens.

        Args:
            positions: int64 [n], places in the sample's sequence of tokens, or [B, n] where samples differ.
            channels: size C of a vector.
            repetition: which draw for the same token it is (samplers with noise in every step).

        Returns:
            float32 [B, n, C].
        """
        channel = torch.arange(channels, device=self.indices.device)
        keys = self.indices[:, None, None], positions[..., None], channel
        return seeds.normal(self.seed, "sampling/normal", repetition, *keys).float()


def pick(logits: Tensor, uniform: Tensor | None) -> Tensor:
    """The token whose interval of the cumulative distribution holds ``uniform``; without it the most likely one.

    Vocabulary order, not order of probability: where kernels round logits differently, an interval moves by as much,
    while two tokens of nearly equal probability would change places. A token of probability zero is never picked.

    Args:
        logits: [..., V]; -inf means probability zero.
        uniform: float64 [...] in [0, 1), or None.

    Returns:
        int64 [...].
    """
    if uniform is None:
        return logits.argmax(-1)
    rows, places = logits.reshape(-1, logits.shape[-1]), uniform.reshape(-1, 1)
    size = max(1, _ELEMENTS // rows.shape[-1])
    picked = [_invert(part, place) for part, place in zip(rows.split(size), places.split(size))]
    return torch.cat(picked).view(uniform.shape)


def _invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """[R, V] and float64 [R, 1] to int64 [R]."""
    share = (logits - logits.amax(-1, keepdim=True)).exp_()
    reached = share.cumsum(-1, dtype=torch.float64)
    total = reached[:, -1:]
    # Below the total even where the product rounds up to it, so that a token reaches beyond it: the first that does
    # has added to the sum.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    picked = torch.searchsorted(reached, target, right=True)[:, 0]
    return picked.clamp_(max=logits.shape[-1] - 1)  # beyond it only where logits are no numbers


class FiniteLogits:
    """Refuses what was drawn from logits that are not numbers, which tokens would hide.

    One synchronization with the device for all steps of a sequence.
    """

    def __init__(self) -> None:
        self._checks: list[Tensor] = []

    def note(self, logits: Tensor) -> None:
        """Look at logits of one step, of any shape, before they are truncated."""
        self._checks.append(logits.isfinite().all())

    def require(self) -> None:
        """Wait for the device, or leave that to :func:`postponed_checks`.

        Raises:
            CheckpointError: some logits were infinite or not a number.
        """
        postponed = _postponed.get()
        if postponed is None:
            require_finite(self._checks)
        else:
            postponed.append(torch.stack(self._checks).all())


_postponed: ContextVar[list[Tensor] | None] = ContextVar("postponed", default=None)


@contextmanager
def postponed_checks() -> Iterator[Sequence[Tensor]]:
    """Inside, drawing does not wait for the device: what :func:`require_finite` should look at later is collected."""
    checks: list[Tensor] = []
    token = _postponed.set(checks)
    try:
        yield checks
    finally:
        _postponed.reset(token)


def require_finite(checks: Sequence[Tensor]) -> None:
    """Wait for the device.

    Raises:
        CheckpointError: one of ``checks`` is false: some logits were infinite or not a number.
    """
    if not bool(torch.stack(list(checks)).all()):
        raise CheckpointError(
            "The generator predicts logits that are not finite. Its weights are damaged or training has diverged: "
            "name another checkpoint."
        )
