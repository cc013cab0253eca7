"""Dispatch without exchange, where a rank holds all experts: the host never waits for the device.

Megatron-core's dispatchers read on the host how many tokens each expert got. Here buffers have as many rows as the
router says there are copies at most (``Bounds``). Where each copy of a token lies and which token a row is a copy
of are two inverse tables, so that both directions, and their gradients, are gathers: no atomics, the same bits in every
run, one graph for a compiler.

T tokens of this rank, M experts, m copies of a token at most, R rows of copies at most, C width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.moe.experts import GroupedExperts, Segments
from megavar.transformer.moe.router import Router, Routing
from megavar.transformer.moe.routing import Bounds


@dataclass(frozen=True)
class Arrangement:
    """Rows ordered by expert, then by token, and where they come from. No gradient."""

    segments: Segments
    """Which rows are whose."""
    token: Tensor
    """int64 [R], whose copy each row is; anything for rows of no expert."""
    pair: Tensor
    """int64 [R], the same in the flattened table [T, M] of pairs of token and expert."""
    copies: Tensor
    """int64 [T, m], rows of the copies of each token in the order of experts; R where there are fewer."""
    places: Tensor
    """int64 [T M, 1], row of each pair; R where the token does not go to the expert."""


def arrange(assignment: Tensor, bounds: Bounds) -> Arrangement:
    """Give every copy a row.

    Args:
        assignment: bool [T, M].
        bounds: what the router promises of it.
    """
    tokens, experts = assignment.shape
    chosen = assignment.t().flatten()  # expert by expert
    counted = chosen.cumsum(0)
    numbers = torch.arange(1, bounds.rows + 1, device=assignment.device)
    found = torch.searchsorted(counted, numbers)  # experts x tokens for the rows that are too many
    own, token = found // tokens, found % tokens
    places = torch.where(chosen, counted - 1, bounds.rows).view(experts, tokens).t()
    copies = places if bounds.copies == experts else places.sort(-1).values[:, : bounds.copies]
    kept = None if bounds.every_row else (own < experts)[:, None]
    last = torch.arange(1, experts + 1, device=assignment.device) * tokens - 1
    ends = counted[last].to(torch.int32)
    own = own.clamp(max=experts - 1)
    return Arrangement(Segments(ends, own, kept), token, token * experts + own, copies, places.reshape(-1, 1))


class _Spread(torch.autograd.Function):
    """Rows of copies; the gradient of what is copied is the sum over its copies."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: Tensor, copies: Tensor, complete: bool) -> Tensor:
        """[N, ...] -> [R, ...].

        Args:
            source: int64 [R], which value each row copies.
            copies: int64 [N, m], the rows that copy each value; R stands for none.
            complete: whether none is missing.
        """
        ctx.save_for_backward(copies)
        ctx.complete = complete
        return values[source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (copies,) = ctx.saved_tensors
        return _sum_of_copies(gradients[0], copies, ctx.complete), None, None, None


class _Collect(torch.autograd.Function):
    """The sum over the copies of each value; the gradient of a copy is its value's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, copies: Tensor, complete: bool) -> Tensor:
        """[R, ...] -> [N, ...], with the arguments of :class:`_Spread`."""
        ctx.save_for_backward(source)
        return _sum_of_copies(rows, copies, complete)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (source,) = ctx.saved_tensors
        return gradients[0][source], None, None, None


def _sum_of_copies(rows: Tensor, copies: Tensor, complete: bool) -> Tensor:
    """Added up in float32 in the order of ``copies``, [R, ...] -> [N, ...]."""
    total: Tensor | None = None
    for place in copies.unbind(1):
        if complete:
            copy = rows[place]
        else:
            there = (place < rows.shape[0]).view(-1, *[1] * (rows.dim() - 1))
            copy = torch.where(there, rows[place.clamp(max=rows.shape[0] - 1)], 0)
        total = copy.float() if total is None else total.add_(copy)
    assert total is not None
    return total.to(rows.dtype)


class LocalMixture(nn.Module):
    """Copies of tokens, experts, the way back. Takes the place of Megatron-core's ``MoELayer``."""

    def __init__(self, config: TransformerConfig, router: Router) -> None:
        super().__init__()
        assert config.num_moe_experts is not None and config.expert_model_parallel_size == 1
        self.router = router
        self.experts = GroupedExperts(config.num_moe_experts, config)

    def forward(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """[L, B, C] -> [L, B, C] and None."""
        complete = routing.bounds.every_token
        with torch.no_grad():
            at = arrange(routing.assignment, routing.bounds)
        spread = _Spread.apply(hidden.flatten(0, 1), at.token, at.copies, complete)
        gates = _Spread.apply(routing.gates.flatten(), at.pair, at.places, False)
        computed = self.experts.compute(spread, at.segments, gates)
        return _Collect.apply(computed, at.token, at.copies, complete).view_as(hidden), None
