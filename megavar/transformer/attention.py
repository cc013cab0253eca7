"""Self-attention on Megatron-core with scale-causal visibility.

A token sees all tokens of its own scale and of all earlier scales (VAR section 3.2). One meaning, three kernels:

* ``dense``: one call with a boolean mask [L, L]; the reference.
* ``prefix``: one unmasked call per scale on its prefix of keys; no mask in memory, fastest on CPU.
* ``flex``: FlexAttention with a block mask; compiled on CUDA. PyTorch has no CPU backward for it.

Shapes: L positions, B samples, H heads of this rank, D head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.context import ForwardContext
from megavar.transformer.sequence import SequenceLayout, cached_by_layout

Kernel = Callable[[Tensor, Tensor, Tensor, SequenceLayout, float], Tensor]


@cached_by_layout
def _dense_mask(layout: SequenceLayout, device: torch.device) -> Tensor:
    row = torch.arange(layout.length, device=device)
    return layout.visible(row[:, None], row[None, :], layout.segment_index(device))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, softmax_scale: float) -> Tensor:
    """Scale-causal attention of [B, H, L, D] tensors with a boolean mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_dense_mask(layout, q.device), scale=softmax_scale)


def _prefixes(layout: SequenceLayout) -> list[tuple[int, int, int]]:
    """(first row, row after the last, number of keys they see) of each segment and of the padding."""
    padding = [(layout.tokens, layout.length, layout.tokens)] if layout.padding else []
    return [(start, end, end) for start, end in layout.bounds] + padding


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, softmax_scale: float) -> Tensor:
    """Scale-causal attention of [B, H, L, D] tensors, one unmasked call per scale."""
    outputs = [
        F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], scale=softmax_scale)
        for start, end, seen in _prefixes(layout)
    ]
    return torch.cat(outputs, dim=2)


@cached_by_layout
def _flex_block_mask(layout: SequenceLayout, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    segment = layout.segment_index(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return layout.visible(query, key, segment)

    return create_block_mask(visible, None, None, layout.length, layout.length, device=str(device))


@functools.lru_cache(maxsize=1)
def _flex_function() -> Callable[..., Any]:
    from torch.nn.attention import flex_attention

    function: Callable[..., Any] = flex_attention.flex_attention
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


def flex_attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, softmax_scale: float) -> Tensor:
    """Scale-causal attention of [B, H, L, D] tensors by FlexAttention."""
    return _flex_function()(q, k, v, block_mask=_flex_block_mask(layout, q.device), scale=softmax_scale)


KERNELS: dict[str, Kernel] = {"dense": dense_attention, "prefix": prefix_attention, "flex": flex_attention}


def choose_kernel(name: str) -> Kernel:
    """The kernel ``name``; ``auto`` is ``flex`` on CUDA and ``prefix`` elsewhere."""
    if name == "auto":
        name = "flex" if torch.cuda.is_available() else "prefix"
    return KERNELS[name]


class ScaleCausalAttention(nn.Module):
    """The attention core of Megatron-core's :class:`SelfAttention`: softmax(q k^T) v without parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        kernel: str,
        recompute: bool,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert softmax_scale is not None
        self.block = layer_number - 1
        self.kernel = choose_kernel(kernel)
        self.recompute = recompute
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext, **unused: Any) -> Tensor:
        """Attend within ``context.sequence``, or to the cache while decoding.

        Args:
            query, key, value: [L, B, H, D].
            context: sequence layout and cache of this pass.

        Returns:
            [L, B, H * D].
        """
        if context.cache is not None:
            tokens = context.sequence.tokens  # rows of padding must not be seen by later scales
            key, value = context.cache.extend(self.block, key[:tokens], value[:tokens])

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            if context.cache is not None:
                out = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)
            else:
                out = self.kernel(q, k, v, context.sequence, self.softmax_scale)
            return out.permute(2, 0, 1, 3).flatten(2)

        if self.recompute and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(attend, False, query, key, value)
        return attend(query, key, value)


class QKVLinear(ColumnParallelLinear):
    """Fused projection with biases for queries and values but none for keys (VAR's ``mat_qkv``).

    Rows are Megatron-core's order: for each head its query, key and value rows, so that heads shard.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **(options | {"bias": False}))
        rows = self.output_size_per_partition // 3
        self.heads, self.head_size = rows // config.kv_channels, config.kv_channels
        self.q_bias = nn.Parameter(torch.zeros(rows, dtype=config.params_dtype))
        self.v_bias = nn.Parameter(torch.zeros(rows, dtype=config.params_dtype))
        for bias in (self.q_bias, self.v_bias):
            tensor_parallel.set_tensor_model_parallel_attributes(bias, True, 0, 1)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[L, B, C] -> [L, B, 3 H D]."""
        output, _ = super().forward(hidden, *args, **kwargs)
        q_bias, v_bias = (bias.view(self.heads, self.head_size) for bias in (self.q_bias, self.v_bias))
        return output + torch.stack([q_bias, torch.zeros_like(q_bias), v_bias], dim=1).flatten(), None


class UnitLength(nn.Module):
    """Divide each head vector by its length, in float32 (fp16 would overflow); eps 1e-12."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()

    def forward(self, heads: Tensor) -> Tensor:
        """[L, B, H, D] -> [L, B, H, D]."""
        return F.normalize(heads.float(), dim=-1).to(heads.dtype)


class UnitLengthWithTemperature(UnitLength):
    """Unit-length queries times a learned factor per head, at most 100 (VAR's ``scale_mul_1H11``)."""

    MAXIMUM = math.log(100)

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__(hidden_size, config, eps)
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.log_temperature = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
        tensor_parallel.set_tensor_model_parallel_attributes(self.log_temperature, True, 0, 1)

    def forward(self, heads: Tensor) -> Tensor:
        """[L, B, H, D] -> [L, B, H, D]."""
        temperature = self.log_temperature.float().clamp(max=self.MAXIMUM).exp()
        return (F.normalize(heads.float(), dim=-1) * temperature[:, None]).to(heads.dtype)


def build_self_attention(
    config: TransformerConfig, block: int, *, kernel: str, qk_l2_norm: bool, recompute: bool
) -> SelfAttention:
    """Megatron-core self-attention of block number ``block`` (from 0) with our core, projection and norms."""
    core = functools.partial(ScaleCausalAttention, kernel=kernel, recompute=recompute)
    submodules = SelfAttentionSubmodules(
        linear_qkv=QKVLinear,
        core_attention=core,  # type: ignore[arg-type]
        linear_proj=RowParallelLinear,
        q_layernorm=UnitLengthWithTemperature if qk_l2_norm else None,
        k_layernorm=UnitLength if qk_l2_norm else None,
    )
    return SelfAttention(config, submodules, layer_number=block + 1)
