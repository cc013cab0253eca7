"""Dropless routing for backends that give every expert the same number of slots.

T tokens of this rank, M experts, m experts per token.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavar.transformer.moe.router import Routing


@dataclass(frozen=True)
class Slots:
    """Where each of the m copies of a token goes."""

    experts: Tensor
    """int64 [m, T]: number of the expert."""
    places: Tensor
    """int64 [m, T]: slot among those of the expert."""
    gates: Tensor
    """[m, T], with gradient."""
    capacity: int
    """Slots per expert: as many as the most wanted expert of any rank needs."""


def assign_slots(routing: Routing, top_k: int, group: dist.ProcessGroup) -> Slots:
    """Number the tokens of each expert in their order. Waits for the device, because buffers need a size.

    Args:
        routing: with ``top_k`` experts for each token.
        group: the ranks that share the experts; they agree on one capacity.
    """
    gates, assignment = routing.gates, routing.assignment
    place_in_expert = assignment.cumsum(0) - 1
    capacity = place_in_expert[-1].max() + 1
    if group.size() > 1:
        dist.all_reduce(capacity, dist.ReduceOp.MAX, group=group)
    experts = assignment.to(torch.uint8).topk(top_k, dim=-1).indices
    places, chosen = place_in_expert.gather(1, experts), gates.gather(1, experts)
    return Slots(experts.t().contiguous(), places.t().contiguous(), chosen.t().contiguous(), int(capacity))
