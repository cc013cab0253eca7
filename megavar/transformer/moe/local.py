"""Dispatch without exchange, where a rank holds all experts: the host never waits for the device.

Megatron-core's dispatchers read on the host how many tokens each expert got. With a fixed number m of experts per token
every size is known beforehand, and a permutation and its inverse do the rest: gathers in both directions, no atomics,
the same bits in every run.

T tokens of this rank, m experts per token, M experts, C width.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.moe.experts import GroupedExperts
from megavar.transformer.moe.router import Router, Routing


class _Spread(torch.autograd.Function):
    """Copies of tokens, ordered by expert; a token's gradient is the sum over its copies."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token: Tensor, copies: Tensor) -> Tensor:
        """[T, C] -> [T m, C].

        Args:
            token: int64 [T m], whose copy each row is.
            copies: int64 [T, m], where the copies of a token are.
        """
        ctx.save_for_backward(copies)
        return tokens[token]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        return _sum_of_copies(gradients[0], copies), None, None


class _Collect(torch.autograd.Function):
    """The sum over the copies of each token; a copy's gradient is its token's."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, token: Tensor, copies: Tensor) -> Tensor:
        """[T m, C] -> [T, C], with the arguments of :class:`_Spread`."""
        ctx.save_for_backward(token)
        return _sum_of_copies(computed, copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return gradients[0][token], None, None


def _sum_of_copies(rows: Tensor, copies: Tensor) -> Tensor:
    return rows[copies].sum(1, dtype=torch.float32).to(rows.dtype)


class LocalMixture(nn.Module):
    """Router, a permutation, experts, the way back. Takes the place of Megatron-core's ``MoELayer``."""

    def __init__(self, config: TransformerConfig, router: Router) -> None:
        super().__init__()
        assert config.num_moe_experts is not None and config.expert_model_parallel_size == 1
        self.top_k = config.moe_router_topk
        self.router = router
        self.experts = GroupedExperts(config.num_moe_experts, config)

    def forward(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """[L, B, C] -> [L, B, C] and None."""
        gates, assignment, _ = routing
        experts = assignment.to(torch.uint8).topk(self.top_k, dim=-1).indices.sort(-1).values  # [T, m]
        order = experts.flatten().argsort(stable=True)  # copies by expert, then by token
        token = order // self.top_k
        places = torch.arange(order.shape[0], device=order.device)
        copies = torch.empty_like(order).scatter_(0, order, places).view_as(experts)
        chosen = gates.gather(1, experts).flatten().gather(0, order)
        spread = _Spread.apply(hidden.flatten(0, 1), token, copies)
        computed, _ = self.experts(spread, assignment.sum(0), chosen)
        return _Collect.apply(computed, token, copies).view_as(hidden), None
