"""Megatron-core's ``TransformerConfig``: what the layout decides, and what a model says of its blocks."""

from copy import copy
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig


def _leave_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    """Megatron-core initializes nothing: ``parallel.logical.initialize_parameters`` does, the same in every layout."""
    return weight


def transformer_config(
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    depth: int,
    width: int,
    heads: int,
    feed_forward: int,
    experts: ExpertsChoice | None = None,
    **fields: Any,
) -> TransformerConfig:
    """The configuration of the layers of a model under a layout.

    Args:
        dtype: type of parameters and activations.
        depth: number of blocks of the whole model.
        width: hidden size C.
        heads: attention heads.
        feed_forward: hidden size of the feed-forward network, of each expert where there are experts.
        experts: in the place of the feed-forward network of every block.
        fields: any other field of Megatron-core's class, which wins over ours (``num_query_groups``,
            ``gated_linear_unit``, ``add_qkv_bias``, ``softmax_scale``, ``activation_func``, ...).
    """
    virtual = parallel.virtual_pipeline > 1
    given: dict[str, Any] = {
        "num_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "ffn_hidden_size": feed_forward,
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": True,
        "hidden_dropout": 0.0,  # dropout is ours, a function of the sample
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "init_method": _leave_uninitialized,
        "output_layer_init_method": _leave_uninitialized,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if virtual else None,
        # Two transfers between the same two ranks get mixed up when batched (notes: feasibility 4c).
        "overlap_p2p_comm": virtual,
        "batch_p2p_comm": not virtual,
        "deallocate_pipeline_outputs": False,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
    }
    return TransformerConfig(**(given | _mixture(experts, parallel, feed_forward) | fields))


def _mixture(experts: ExpertsChoice | None, parallel: ParallelConfig, hidden: int) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": min(experts.top_k, experts.number),
        "moe_router_pre_softmax": True,  # what our routers do (Eq. 7); without it top_k=1 is refused
        "moe_token_dispatcher_type": parallel.dispatcher,
        "moe_router_load_balancing_type": "none",  # Eq. 10 is added by our routers
        "moe_grouped_gemm": False,
        "moe_ffn_hidden_size": hidden,
    }


def without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """For layers with complete inputs on every tensor-parallel rank, while hidden states are shared between them."""
    if not config.sequence_parallel:
        return config
    config = copy(config)
    config.sequence_parallel = False
    return config
