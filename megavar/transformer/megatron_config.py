"""Megatron-core's ``TransformerConfig`` from ours."""

import functools

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig


def _leave_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    """Megatron-core initializes nothing: ``parallel.logical.initialize_parameters`` does, the same in every layout."""
    return weight


def transformer_config(generator: VARConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """The configuration of Megatron-core layers for a VAR under a layout.

    Args:
        dtype: type of parameters and activations.
    """
    experts = generator.experts
    mixture = {}
    if experts is not None:
        mixture = {
            "num_moe_experts": experts.number,
            "moe_router_topk": experts.top_k,
            "moe_router_pre_softmax": True,  # what our router does (Eq. 7); without it top_k=1 is refused
            "moe_token_dispatcher_type": parallel.dispatcher,
            "moe_router_load_balancing_type": "none",  # Eq. 10 is added by our router
            "moe_grouped_gemm": False,
            "moe_ffn_hidden_size": int(generator.hidden_size * generator.feed_forward_ratio),
        }
    virtual = parallel.virtual_pipeline > 1
    head_size = generator.hidden_size // generator.attention_heads
    return TransformerConfig(
        num_layers=generator.depth,
        hidden_size=generator.hidden_size,
        num_attention_heads=generator.attention_heads,
        ffn_hidden_size=int(generator.hidden_size * generator.feed_forward_ratio),
        softmax_scale=1.0 if generator.qk_l2_norm else 0.25 / head_size**0.5,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
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
        **mixture,
    )
