"""Linear layers on Megatron-core's that it does not offer.

Where no rank shares a layer, it is one product that adds its bias: Megatron-core adds biases in passes of their own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ColumnLinear(ColumnParallelLinear):
    """A column-parallel layer that adds its bias itself, whoever builds it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"skip_bias_add": False}))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[..., in] -> [..., out of this rank, or out when gathered]."""
        if self.tp_group.size() == 1:
            return F.linear(hidden, self.weight, self.bias), None
        output, _ = super().forward(hidden, *args, **kwargs)
        return output, None


class LinearFloat32(ColumnParallelLinear):
    """A column-parallel linear layer that computes in float32 whatever the parameters' type."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[..., in] -> float32 [..., out of this rank, or out when gathered]."""
        if self.tp_group.size() == 1:
            return F.linear(input_.float(), self.weight.float(), self.bias.float()), None
        output, _ = super().forward(input_.float(), weight=self.weight.float())
        bias = self.bias.float()
        if self.gather_output and bias.shape[0] != output.shape[-1]:
            bias = tensor_parallel.gather_from_tensor_model_parallel_region(bias)
        return output + bias, None


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
        q_bias, v_bias = (bias.view(self.heads, self.head_size) for bias in (self.q_bias, self.v_bias))
        bias = torch.stack([q_bias, torch.zeros_like(q_bias), v_bias], dim=1).flatten()
        if self.tp_group.size() == 1:
            return F.linear(hidden, self.weight, bias), None
        output, _ = super().forward(hidden, *args, **kwargs)
        return output + bias, None


class RowLinear(RowParallelLinear):
    """Megatron-core's row-parallel layer, which hands on its group.

    Megatron-core 0.16 looks for it at every call and warns (``layers.py:1280``): a compiled block breaks there.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        return super()._forward_impl(input, weight, *args, **(options | {"tp_group": self.tp_group}))


class OutputLinear(RowLinear):
    """A row-parallel layer that adds its bias itself, whoever builds it: the last one of attention and of a network."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"skip_bias_add": False}))

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """[..., in of this rank] -> [..., out] (this rank's rows under sequence parallelism)."""
        if self.tp_group.size() == 1:
            return F.linear(hidden, self.weight, self.bias), None
        output, _ = super().forward(hidden)
        return output, None


class BiasedOutputLinear(OutputLinear):
    """A row-parallel layer with a bias although ``add_bias_linear`` is off (AliTok's attention output)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"bias": True}))
