"""Normalization layers of hidden states [L, B, C] and of heads [L, B, H, D], legal under every layout.

Megatron-core's own refuse sequence parallelism without Transformer Engine (``torch_norm.py:35``). Where the ranks of a
tensor-parallel group normalize different rows or heads with the same parameters, their gradients must be added up:
these parameters carry Megatron-core's mark ``sequence_parallel``, which ``training/gradients.py`` obeys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def normalize(hidden: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer normalization over the last dimension without learned scale and shift."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=eps)


class _Norm(nn.Module):
    """Built by blocks (hidden states) and by Megatron-core's attention (heads) with these arguments."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self._hidden_size, self._dtype = hidden_size, config.params_dtype
        heads = hidden_size != config.hidden_size  # every rank has its own heads; rows only under sequence parallelism
        self._partial = config.tensor_model_parallel_size > 1 and (heads or config.sequence_parallel)

    def _parameter(self) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(self._hidden_size, dtype=self._dtype))
        parameter.sequence_parallel = self._partial  # type: ignore[attr-defined]
        return parameter


class PlainNorm(_Norm):
    """Layer normalization without parameters."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return normalize(hidden, self.eps)


class AffineLayerNorm(_Norm):
    """Layer normalization with learned ``weight`` and ``bias``."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, **unused: Any) -> None:
        super().__init__(hidden_size, config, eps)
        self.weight, self.bias = self._parameter(), self._parameter()

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return F.layer_norm(hidden, hidden.shape[-1:], self.weight, self.bias, self.eps)


class PlainRMSNorm(_Norm):
    """Division by the root mean square, without parameters."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return F.rms_norm(hidden, hidden.shape[-1:], eps=self.eps)


class RMSNorm(_Norm):
    """Division by the root mean square, with a learned ``weight`` (Zhang and Sennrich 2019)."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, **unused: Any) -> None:
        super().__init__(hidden_size, config, eps)
        self.weight = self._parameter()

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)
