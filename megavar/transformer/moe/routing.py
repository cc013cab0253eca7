"""Routing mathematics of mixture-of-experts layers: scores, gates, balance loss (MEPA Eq. 6 to 10).

T tokens, M experts, m experts per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """How many copies of tokens a router makes: what the host knows without asking the device."""

    copies: int
    """Of one token at most, m."""
    rows: int
    """Of all tokens of this rank together at most."""
    every_token: bool = False
    """Whether every token has exactly ``copies``."""
    every_row: bool = False
    """Whether there are always exactly ``rows`` (expert choice: experts x capacity, however tokens share them)."""


def top_k_gates(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates of Eq. 7: the raw scores of the ``top_k`` best experts, zero elsewhere, not renormalized.

    Args:
        scores: float32 [T, M], softmax over experts.

    Returns:
        gates [T, M] with gradient, and the bool assignment [T, M].
    """
    chosen = scores.detach().topk(top_k, dim=-1).indices
    assignment = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    return scores * assignment, assignment


def balance_loss(assigned: Tensor, score_sum: Tensor, tokens: int | Tensor) -> Tensor:
    """Eq. 10 for each group of tokens: M sum_j (share of tokens that chose j) (mean score of j).

    The sum runs over all M experts (the paper prints m as its upper limit). With perfect balance the value is m.

    Args:
        assigned: [G, M] number of tokens of each group assigned to each expert, without gradient.
        score_sum: [G, M] sum of the tokens' scores, with gradient.
        tokens: number of tokens per group.

    Returns:
        [G].
    """
    experts = score_sum.shape[-1]
    return experts * ((assigned / tokens) * (score_sum / tokens)).sum(-1)


class WithLoss(torch.autograd.Function):
    """Gates as they are; the backward pass adds a loss of which nobody else knows to the loss that it comes from.

    What Megatron-core's ``MoEAuxLossAutoScaler`` does with a factor that lies in its class, where no graph can be
    traced. Here who scales the loss scales what is given.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, loss: Tensor) -> Tensor:
        """``loss`` is a scalar."""
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """One for the loss."""
        return gradients[0], gradients[0].new_ones((), dtype=torch.float32)
