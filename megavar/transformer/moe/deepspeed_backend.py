"""Experts inside DeepSpeed-MoE's layer, with our router's gates in the place of its own.

DeepSpeed 0.19.8: ``moe/sharded_moe.py`` calls ``gate(tokens, used_tokens, True, use_tutel)`` and takes from it where
each copy of a token goes and its weight. We answer with Eq. 6 to 9, dropless. (Its own gates renormalize for k = 2
and know no scales.)
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.parallel.deepspeed_backend import import_deepspeed
from megavar.transformer.feed_forward import activate
from megavar.transformer.moe.experts import first_layer_rows
from megavar.transformer.moe.router import Router, Routing
from megavar.transformer.moe.slots import Slots, assign_slots


class _Expert(nn.Module):
    """The dense block's feed-forward network."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe_ffn_hidden_size is not None
        self.config = config
        bias, dtype = config.add_bias_linear, config.params_dtype
        self.linear_fc1 = nn.Linear(config.hidden_size, first_layer_rows(config), bias, dtype=dtype)
        self.linear_fc2 = nn.Linear(config.moe_ffn_hidden_size, config.hidden_size, bias, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_fc2(activate(self.linear_fc1(tokens), self.config))


class _PreparedGate:
    """What DeepSpeed takes for a gate: hands over the slots that were assigned right before."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.slots: Slots | None = None

    def _set_ep_group(self, group: Any) -> None:
        """Required by DeepSpeed."""

    def __call__(self, tokens: Tensor, used_tokens: None, sparse: bool, use_tutel: bool) -> tuple:
        slots, self.slots = self.slots, None
        assert slots is not None
        no_loss, no_counts = tokens.new_zeros(()), None  # Eq. 10 and the statistics are the router's
        return no_loss, slots.capacity, self.experts, slots.experts, slots.places, slots.gates.float(), no_counts


class DeepSpeedMixture(nn.Module):
    """Our router, then DeepSpeed's exchange and experts."""

    def __init__(self, config: TransformerConfig, router: Router) -> None:
        super().__init__()
        deepspeed = import_deepspeed()
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer

        if deepspeed.comm.comm.cdb is None:
            deepspeed.init_distributed(verbose=False)
        assert config.num_moe_experts is not None
        self.top_k = config.moe_router_topk
        self.group = parallel_state.get_expert_model_parallel_group()
        self.router = router
        ranks = self.group.size()
        local = config.num_moe_experts // ranks
        self.experts = Experts(_Expert(config), local)
        for parameter in self.experts.parameters():
            del parameter.allreduce, parameter.group_name  # training/experts.py tags experts, for all backends alike
        self._gate = _PreparedGate(config.num_moe_experts)
        layer = MOELayer(self._gate, self.experts, None, ranks, local)  # type: ignore[arg-type]
        layer._set_ep_group(self.group)
        self._exchange_and_compute = (layer,)  # not a submodule: it holds no parameters but the experts'

    def forward(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """[L, B, C] -> [L, B, C] and None."""
        self._gate.slots = assign_slots(routing, self.top_k, self.group)
        return self._exchange_and_compute[0](hidden, None), None
