"""Experts behind Tutel's dispatch kernels and all-to-all (github.com/microsoft/tutel), with our router's gates.

Tutel's own layer computes routing, gates and balance loss itself; only the parts below it are used, so that Eq. 6 to 10
and the routing statistics stay ours.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.errors import ConfigError
from megavar.transformer.moe.experts import PaddedExperts
from megavar.transformer.moe.router import Router, Routing
from megavar.transformer.moe.slots import assign_slots


def _import_tutel() -> tuple[Any, Any]:
    """Tutel's dispatch and communication modules.

    Raises:
        ConfigError: the installed package does not load, for example because it was built for another PyTorch.
    """
    try:
        from tutel import moe, net
    except Exception as error:  # it raises whatever its missing kernels lead to
        raise ConfigError(
            f"generator.experts.backend=tutel: the installed package tutel does not load ({error}). Build it again for "
            f"PyTorch {torch.__version__}, or choose another backend."
        ) from error
    return moe, net


class TutelMixture(nn.Module):
    """Router, exchange, experts, exchange back."""

    def __init__(self, config: TransformerConfig, router: Router) -> None:
        super().__init__()
        self._tutel = _import_tutel()
        assert config.num_moe_experts is not None
        self.number, self.top_k = config.num_moe_experts, config.moe_router_topk
        self.group = parallel_state.get_expert_model_parallel_group()
        self.ranks = self.group.size()
        self.router = router
        self.experts = PaddedExperts(self.number // self.ranks, config)

    def forward(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """[L, B, C] -> [L, B, C] and None."""
        tokens = hidden.flatten(0, -2).contiguous()
        slots = assign_slots(routing, self.top_k, self.group)
        dispatcher = self._tutel[0].fast_dispatcher(self.number, slots.capacity, tokens.shape[-1], tokens.dtype)
        dispatcher.update(list(slots.experts), list(slots.places), list(slots.gates), capacity=slots.capacity)
        sent = dispatcher.encode(tokens).view(self.ranks, -1, slots.capacity, tokens.shape[-1])
        received = self._exchange(sent).transpose(0, 1)  # [own experts, ranks, capacity, C]
        computed = self.experts(received.flatten(1, 2)).view(received.shape)
        returned = self._exchange(computed.transpose(0, 1)).reshape(-1, tokens.shape[-1])
        return dispatcher.decode(returned).view(hidden.shape), None

    def _exchange(self, parts: Tensor) -> Tensor:
        """Row r of ``parts`` goes to rank r of the expert-parallel group."""
        return parts if self.ranks == 1 else self._tutel[1].all_to_all_single(parts.contiguous(), group=self.group)
