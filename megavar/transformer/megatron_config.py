"""Megatron-core's ``TransformerConfig`` from sizes and a layout."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig

Activation = Literal["gelu_tanh", "gelu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


def _leave_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    """Megatron-core initializes nothing: ``parallel.logical.initialize_parameters`` does, the same in every layout."""
    return weight


def _mixture(experts: ExpertsChoice | None, hidden: int, parallel: ParallelConfig) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": experts.top_k,
        "moe_router_pre_softmax": True,  # what our routers do (Eq. 7); without it top_k=1 is refused
        "moe_token_dispatcher_type": parallel.dispatcher,
        "moe_router_load_balancing_type": "none",  # Eq. 10 is added by our routers
        "moe_grouped_gemm": False,
        "moe_ffn_hidden_size": hidden,
    }


def transformer_config(
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    depth: int,
    width: int,
    heads: int,
    groups: int | None = None,
    head_size: int | None = None,
    hidden: int,
    activation: Activation = "gelu_tanh",
    gated: bool = False,
    bias: bool = True,
    qkv_bias: bool = False,
    softmax_scale: float | None = None,
    epsilon: float = 1e-6,
    experts: ExpertsChoice | None = None,
) -> TransformerConfig:
    """The configuration of Megatron-core layers under a layout.

    Args:
        dtype: type of parameters and activations.
        depth: number of blocks.
        width: C, size of hidden states.
        heads: attention heads of C / heads channels (or ``head_size``).
        groups: heads of keys and values (grouped queries); None: as many as ``heads``.
        hidden: F, inner size of the feed-forward network and of each expert.
        gated: the first layer has a second part that multiplies the activation's result.
        bias: of all linear layers.
        qkv_bias: of the attention's input projection where ``bias`` is off.
        softmax_scale: None is 1 / sqrt(head size).
        epsilon: of norms.
        experts: mixture of experts in place of the feed-forward networks.
    """
    virtual = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=depth,
        hidden_size=width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_size,
        ffn_hidden_size=hidden,
        softmax_scale=softmax_scale,
        activation_func=ACTIVATIONS[activation],
        gated_linear_unit=gated,
        layernorm_epsilon=epsilon,
        add_bias_linear=bias,
        add_qkv_bias=qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        init_method=_leave_uninitialized,
        output_layer_init_method=_leave_uninitialized,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if virtual else None,
        # Two transfers between the same two ranks get mixed up when batched (notes: feasibility 4c).
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
        deallocate_pipeline_outputs=False,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        **_mixture(experts, hidden, parallel),
    )
