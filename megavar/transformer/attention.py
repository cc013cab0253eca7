"""Self-attention on Megatron-core, with our own core.

Shapes: L rows, B samples, H query heads and G key heads of this rank (H is a multiple of G), D head size.
"""

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megavar.transformer.context import ForwardContext
from megavar.transformer.kernels import KERNELS, Kernel, attend, choose_kernel
from megavar.transformer.rotary import Pairs, rotate


class BlockAttention(SelfAttention):
    """Megatron-core's self-attention as blocks call it: with a context, its output bias added."""

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:  # type: ignore[override]
        """[L, B, C] -> [L, B, C] (this rank's rows under sequence parallelism)."""
        output, bias = super().forward(hidden, context)
        return output if bias is None else output + bias


class AttentionCore(nn.Module):
    """softmax(q k^T) v without parameters: rotary positions, cache, and a kernel for the context's visibility.

    Takes the place of Megatron-core's ``DotProductAttention`` and is built with its arguments.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        kernel: str,
        pairs: Pairs = "half",
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        """``kernel``: see ``transformer/kernels.py``; ``pairs``: channels that rotary positions turn together."""
        super().__init__()
        assert config.kv_channels is not None
        self.block = layer_number - 1
        self.kernel = kernel
        self.pairs = pairs
        self.recompute = False
        """Whether the backward pass computes the core again (``parallel.recompute: selective``)."""
        self.compiled = False
        """Whether passes without a cache run as a compiled graph (``train.compile: blocks``)."""
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def prepare(self, context: ForwardContext, device: torch.device) -> None:
        """Make the masks of the pass, which all blocks share."""
        if context.cache is None:
            self._kernel(context, device).prepare(context.visibility, device)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext, **unused: Any) -> Tensor:
        """Attend among the rows of this pass, or to the cache and them while decoding.

        Args:
            query: [L, B, H, D].
            key, value: [L, B, G, D].
            context: sequence, rotary tables, cache of this pass.

        Returns:
            [L, B, H D].
        """
        if context.rotary is not None:
            query, key = (rotate(heads, context.rotary, self.pairs) for heads in (query, key))

        def compute(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))
            return self._attend(q, k, v, context).permute(2, 0, 1, 3).flatten(2)

        if context.cache is not None:
            past = context.cache.length(self.block)
            tokens = context.sequence.tokens  # rows of padding must not be seen later
            keys, values = context.cache.extend(self.block, key[:tokens], value[:tokens])
            if past:
                return self._continue(query, keys, values, past, context)
        if self.recompute and torch.is_grad_enabled():
            # PyTorch's, which a compiler sees through; nothing here draws random numbers
            return checkpoint(compute, query, key, value, use_reentrant=False, preserve_rng_state=False)
        return compute(query, key, value)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> Tensor:
        """[B, H or G, L, D] -> [B, H, L, D]."""
        if context.cache is not None and context.sequence.unmasked and context.valid is None:
            tokens = context.sequence.tokens  # one segment: not worth a compiled kernel of its own shape
            return attend(q, k[:, :, :tokens], v[:, :, :tokens], self.softmax_scale)
        return self._kernel(context, q.device).function(q, k, v, context.visibility, self.softmax_scale)

    def _kernel(self, context: ForwardContext, device: torch.device) -> Kernel:
        compiled = self.compiled and context.cache is None
        return KERNELS[choose_kernel(self.kernel, context.visibility, device, compiled=compiled)]

    def _continue(self, query: Tensor, keys: Tensor, values: Tensor, past: int, context: ForwardContext) -> Tensor:
        """Attend to ``past`` decoded rows and to those of this pass, keys and values [B, G, past + rows, D]."""
        q = query.permute(1, 2, 0, 3)
        mask = context.visibility.continued(past, q.device)
        return attend(q, keys, values, self.softmax_scale, mask).permute(2, 0, 1, 3).flatten(2)


def _of_length(heads: Tensor, length: Tensor | float) -> Tensor:
    """Head vectors [L, B, H, D] stretched to ``length`` ([H, 1] or a number): one factor per vector, in float32.

    The smallest length that is divided by is 1e-12.
    """
    wide = heads.float()
    factor = length / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    return (wide * factor).to(heads.dtype)


class UnitLength(nn.Module):
    """Divide each head vector by its length, in float32 (fp16 would overflow); eps 1e-12."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()

    def forward(self, heads: Tensor) -> Tensor:
        """[L, B, H, D] -> [L, B, H, D]."""
        return _of_length(heads, 1.0)


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
        return _of_length(heads, temperature[:, None])
