"""The mixture-of-experts feed-forward network: our router before one of several implementations of the experts."""

import functools
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.choice import resolve
from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
from megavar.transformer.context import ForwardContext
from megavar.transformer.linear import ColumnLinear, RowLinear
from megavar.transformer.moe.backends import check_installed, choose_backend
from megavar.transformer.moe.even import EvenMixture
from megavar.transformer.moe.experts import GroupedExperts, traceable
from megavar.transformer.moe.local import LocalMixture
from megavar.transformer.moe.router import Router, Routing


class ExpertOutputLinear(RowLinear):
    """Second layer of an expert, which lies whole on its rank: one product, without Megatron-core's reduction.

    Its bias is no part of it, since gates weight both (``mlp.py:247``). Megatron-core 0.16 marks the bias as one whose
    gradient must be added up over tensor-parallel ranks (``tensor_parallel/layers.py:1228``), but the ranks hold
    different experts, or their gradients are added up with the experts' other ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True
        if self.bias is not None:
            self.bias.sequence_parallel = False

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """[R, F] -> [R, C], and the bias."""
        return F.linear(hidden, self.weight), self.bias


class MegatronMixture(MoELayer):
    """Megatron-core's layer: its dispatchers and experts follow a :class:`Routing` that was made before.

    Without fused permutation (which ours is) both of its dispatchers take any number of experts per token: the all-to-
    all computes ``num_out_tokens`` from top_k (``token_dispatcher.py:524``), but only the fused kernel reads it.
    """

    _routing: Routing | None = None

    def forward(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:  # type: ignore[override]
        """[L, B, C] -> [L, B, C] and None."""
        self._routing = routing
        return super().forward(hidden)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Called by Megatron-core where it would route: gates and assignment."""
        routing, self._routing = self._routing, None
        assert routing is not None
        return routing.gates, routing.assignment


def _build_mixture(backend: str, config: TransformerConfig, router: Router) -> nn.Module:
    """The layer of ``backend``: parameters under ``router.`` and ``experts.``, called with [L, B, C] and a Routing."""
    if backend == "grouped" and config.expert_model_parallel_size == 1:
        return LocalMixture(config, router)
    if backend == "tutel":
        from megavar.transformer.moe.tutel_backend import TutelMixture

        return TutelMixture(config, router)
    if backend == "deepspeed":
        from megavar.transformer.moe.deepspeed_backend import DeepSpeedMixture

        return DeepSpeedMixture(config, router)
    spec = ModuleSpec(module=GroupedExperts)
    if backend == "megatron":
        submodules = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=ExpertOutputLinear)
        spec = ModuleSpec(module=SequentialMLP, submodules=submodules)  # type: ignore[arg-type]
    return MegatronMixture(config, MoESubmodules(experts=spec, router=lambda **unused: router))


def _layout_of(config: TransformerConfig) -> ParallelConfig:
    return ParallelConfig(
        tensor=config.tensor_model_parallel_size,
        expert=config.expert_model_parallel_size,
        dispatcher=config.moe_token_dispatcher_type,  # type: ignore[arg-type]
    )


class ExpertFeedForward(nn.Module):
    """y_i = sum_j G_ij E_j(x_i) (MEPA Eq. 6): dropless, gates not renormalized, experts with biases.

    Under tensor parallelism each rank routes its share of the tokens through whole experts (expert tensor parallel
    size 1). Without sequence parallelism the tokens are therefore scattered before and gathered after the layer.
    """

    def __init__(self, config: TransformerConfig, number: int, *, experts: ExpertsChoice, kinds: int) -> None:
        """``number``: of the block; ``kinds``: how many kinds of segments routers and statistics tell apart."""
        super().__init__()
        experts.check(_layout_of(config))
        check_installed(experts.backend)
        self.scatter = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        config = copy(config)
        config.sequence_parallel = config.tensor_model_parallel_size > 1
        router = resolve(experts)(config, experts, block=number, kinds=kinds)
        self.moe: Any = _build_mixture(choose_backend(experts.backend, config), config, router)
        self._traceable = traceable(config.params_dtype)
        self._even = functools.partial(EvenMixture, config=config, experts=experts)

    @property
    def one_graph(self) -> bool:
        """Whether Dynamo traces the layer: Megatron-core's dispatchers and other packages' layers stay outside."""
        return self._traceable and self.never_waits

    @property
    def never_waits(self) -> bool:
        """Whether the host needs no number from the device."""
        return isinstance(self.moe, LocalMixture)

    def spread_evenly(self) -> None:
        """Give all experts equal loads whatever the router says, to measure what the layer costs (see ``even.py``)."""
        self.moe = self._even(self.moe.router)

    def prepare(self, context: ForwardContext, device: torch.device) -> None:
        """Make what the router asks of a pass."""
        self.moe.router.prepare(context, device)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """[L, B, C] -> [L, B, C]."""
        self.moe.router.context = context
        if self.scatter:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        routing = self.moe.router(hidden)
        exchange = self.moe if self.one_graph else self._outside_of_graphs
        output, _ = exchange(hidden if routing.input_scale == 1.0 else hidden * routing.input_scale, routing)
        if routing.beside is not None:
            output = output + routing.beside
        if self.scatter:
            # Every rank goes on with all tokens and computes the same gradient: keep this rank's rows of it.
            output = tensor_parallel.gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
        return output

    @torch.compiler.disable
    def _outside_of_graphs(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:
        return self.moe(hidden, routing)
