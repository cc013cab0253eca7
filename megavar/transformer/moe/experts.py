"""Experts with stacked weights: all experts of a rank in four tensors.

Each expert is the dense block's feed-forward network, C -> F -> C, plain or gated, with or without biases. R copies
of tokens for this rank's experts, E experts of this rank, C width, F hidden size.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.feed_forward import activate

_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


@functools.cache
def traceable(dtype: torch.dtype) -> bool:
    """Whether Dynamo can trace grouped products of this type: PyTorch 2.11 describes those of bfloat16 only."""
    rows, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((16, 16), (1, 16, 16)))
    try:
        _grouped_mm(rows, weight.transpose(1, 2), offs=torch.empty(1, dtype=torch.int32, device="meta"))
    except RuntimeError:
        return False
    return True


def first_layer_rows(config: TransformerConfig) -> int:
    """Outputs of an expert's first layer: F, or 2 F where a gated one holds both parts."""
    assert config.moe_ffn_hidden_size is not None
    return config.moe_ffn_hidden_size * (2 if config.gated_linear_unit else 1)


class StackedExperts(nn.Module):
    """Weights of E experts. ``parallel/logical.py`` knows the names: each row is one expert's tensor."""

    linear_fc1_bias: nn.Parameter | None
    linear_fc2_bias: nn.Parameter | None

    def __init__(self, experts: int, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe_ffn_hidden_size is not None
        self.config = config
        dtype, width, rows = config.params_dtype, config.hidden_size, first_layer_rows(config)
        self.linear_fc1_weight = nn.Parameter(torch.empty(experts, rows, width, dtype=dtype))
        self.linear_fc2_weight = nn.Parameter(torch.empty(experts, width, config.moe_ffn_hidden_size, dtype=dtype))
        for name, size in (("linear_fc1_bias", rows), ("linear_fc2_bias", width)):
            bias = nn.Parameter(torch.empty(experts, size, dtype=dtype)) if config.add_bias_linear else None
            self.register_parameter(name, bias)


@dataclass(frozen=True)
class Segments:
    """Rows ordered by expert, and perhaps rows of no expert after them. No gradient."""

    ends: Tensor
    """int32 [E], the row after the last of each expert."""
    own: Tensor
    """int64 [R], each row's expert; any of them for rows of none."""
    kept: Tensor | None = None
    """bool [R, 1], whether the row is an expert's; None: all are."""

    def only(self, rows: Tensor) -> Tensor:
        """Zeros in the rows of no expert, here and in the gradient: grouped products leave there what lay in memory."""
        return rows if self.kept is None else torch.where(self.kept, rows, 0)


class _AddBias(torch.autograd.Function):
    """rows + gates bias[own], which a compiler fuses with its neighbours; backward is a matrix product, no atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, own: Tensor, gates: Tensor | None) -> Tensor:
        """[R, N], [E, N], int64 [R], [R] -> [R, N]; no gates are ones. ``rows``, which are nobody else's, change."""
        ctx.save_for_backward(bias, own, gates)
        added = bias[own]
        if torch.compiler.is_compiling():  # which fuses better without
            return rows + added if gates is None else torch.addcmul(rows, added, gates[:, None])
        ctx.mark_dirty(rows)
        return rows.add_(added) if gates is None else rows.addcmul_(added, gates[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        bias, own, gates = ctx.saved_tensors
        (gradient,) = gradients
        membership = (own[:, None] == torch.arange(bias.shape[0], device=own.device)).to(gradient.dtype)
        if gates is None:
            return gradient, membership.t() @ gradient, None, None
        of_gates = (gradient @ bias.t() * membership).sum(1)
        return gradient, (membership * gates[:, None]).t() @ gradient, None, of_gates


class GroupedExperts(StackedExperts):
    """One grouped matrix product per layer over tokens sorted by expert; no padding, no loop over experts.

    Takes the place of Megatron-core's ``SequentialMLP`` behind its token dispatchers.
    """

    def __init__(self, experts: int, config: TransformerConfig, submodules: Any = None, **unused: Any) -> None:
        super().__init__(experts, config)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, gates: Tensor) -> tuple[Tensor, None]:
        """Apply each expert to its segment and weight the result by the gates.

        Args:
            tokens: [R, C], those of the first expert first.
            tokens_per_expert: int64 [E]; on the CPU or on the device.
            gates: [R].

        Returns:
            [R, C] and None (biases are in it).
        """
        if tokens.shape[0] == 0:
            # grouped_mm has no kernel for it. Parameters still need a (zero) gradient, and both inputs must be part of
            # the graph: their backward exchanges gradients with ranks that have tokens, which would wait for ever.
            return tokens * gates[:, None] + sum(parameter.sum() * 0 for parameter in self.parameters()), None
        ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0)
        own = torch.searchsorted(ends, torch.arange(tokens.shape[0], device=tokens.device), right=True)
        return self.compute(tokens, Segments(ends.to(torch.int32), own), gates), None

    def compute(self, rows: Tensor, segments: Segments, gates: Tensor) -> Tensor:
        """[R, C] and gates [R] -> [R, C]; zeros in rows of no expert."""
        inner = self._layer(rows, self.linear_fc1_weight, self.linear_fc1_bias, segments)
        inner = activate(inner, self.config) * gates[:, None]
        return self._layer(inner, self.linear_fc2_weight, self.linear_fc2_bias, segments, gates)

    def _layer(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments, gates: Tensor | None = None
    ) -> Tensor:
        product = _grouped_mm(segments.only(rows), weight.transpose(1, 2), offs=segments.ends)
        if bias is not None:
            product = _AddBias.apply(product, bias, segments.own, gates)
        return segments.only(product)


class PaddedExperts(StackedExperts):
    """Batched matrix products over a buffer with the same number of slots for every expert."""

    def forward(self, slots: Tensor) -> Tensor:
        """[E, slots, C] -> [E, slots, C]; empty slots give values that nobody reads."""
        inner = _layer(slots, self.linear_fc1_weight, self.linear_fc1_bias)
        return _layer(activate(inner, self.config), self.linear_fc2_weight, self.linear_fc2_bias)


def _layer(slots: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = weight.transpose(1, 2)
    return torch.bmm(slots, product) if bias is None else torch.baddbmm(bias[:, None], slots, product)
