"""MoE++ (Jin et al., arXiv:2410.07348): zero, copy and constant experts, gating residuals, heterogeneous balance.

    G^j = W^j x + W_g^j G^(j-1)                              scores of block j, with those of the block before    Eq. 6
    S   = softmax(G); chosen: the K largest of all N = E + Z experts                                              Eq. 1
    y   = sum over the chosen of S_i E_i(x)
    E_i = feed-forward network | a1 x + a2 v with [a1, a2] = softmax(W_c x) | x | 0                          Eq. 2 to 5
    L_b = sum_i eta_i f_i P_i, eta = 1 for feed-forward networks and tau for the others                           Eq. 7

Published code: SkyworkAI/MoE-plus-plus, ``moe_plus_plus_layer.py``; where it differs, ``ZeroComputationExperts`` says.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.experts.zero_computation import ZeroComputationExperts
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.moe.router import Router, Rows
from megavar.transformer.moe.routing import Bounds, top_k_gates

_HIDDEN = 8
"""Width of the two-layer router, in numbers of targets (the published code's)."""


class ZeroComputationRouter(Router):
    """Targets are E feed-forward experts, then constant, copy and zero experts: N in all."""

    experts: ZeroComputationExperts

    def __init__(self, config: TransformerConfig, experts: ZeroComputationExperts, *, block: int, kinds: int) -> None:
        super().__init__(config, experts, block=block, kinds=kinds)
        number, width = len(experts.targets), config.hidden_size
        self.hidden_weight: nn.Parameter | None = None
        if experts.router_layers == 2:
            self.hidden_weight = self.parameter(_HIDDEN * number, width)
        self.weight = self.parameter(number, width if self.hidden_weight is None else _HIDDEN * number)
        self.residual: nn.Parameter | None = None
        if experts.gating_residual and block > 0:
            self.residual = self.parameter(number, number)
        self.constant: nn.Parameter | None = None
        if experts.constant_experts:
            self.constant = self.parameter(experts.constant_experts, width)
            self.constant_weight = self.parameter(experts.constant_experts, 2, width)
        if experts.scale_input:
            self.input_scale = float(experts.top_k)

    @classmethod
    def initial_value(cls, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """The published code's: v from N(0, 1), W_g from N(0, 0.02^2), so that the residual is nearly off at first."""
        deviation = {"constant": 1.0, "residual": 0.02}.get(name)
        if deviation is not None:
            value.normal_(std=deviation, generator=generator)
        return deviation is not None

    @classmethod
    def rule(cls, name: str) -> ParameterRule | None:
        """Vectors v do not decay."""
        return ParameterRule(decays=False) if name == "constant" else None

    def scores(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """[L, B, C] -> float32 [L, B, N]; hands the scores before the softmax to the next block."""
        assert self.context is not None
        inner = hidden.float()
        if self.hidden_weight is not None:
            inner = F.linear(inner, self.hidden_weight.float()).tanh()
        scores = F.linear(inner, self.weight.float())
        if self.experts.gating_residual:
            if self.residual is not None and self.context.carried is not None:  # none: a plan runs a block alone
                scores = scores + F.linear(self.context.carried, self.residual.float())
            self.context.carried = scores
        if self.experts.score_deviation is not None:
            scores = scores / (scores.std(-1, keepdim=True) / self.experts.score_deviation)
        return scores.softmax(-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The K best of all targets; see ``ZeroComputationExperts.gates``."""
        gates, assignment = top_k_gates(scores, self.experts.top_k)
        if self.experts.gates == "raw":
            return gates, assignment
        if self.experts.gates == "renormalized" and self.experts.zero_experts:
            first_zero = len(self.experts.targets) - self.experts.zero_experts
            gates = F.pad(gates[..., :first_zero], (0, self.experts.zero_experts))
        return gates / gates.sum(-1, keepdim=True), assignment

    def kept(self, chosen: Tensor, counted: Tensor) -> Tensor:
        """In training, each target's first choices of every image, as many as Eq. 8 allows; else all."""
        if self.experts.capacity_factor is None or not self.training:
            return chosen
        real, own = chosen & (counted > 0)[..., None], self._own_rows(chosen.shape[0])
        if self.tokens_sharded:
            real = tensor_parallel.gather_from_sequence_parallel_region(real)
        before = (real.cumsum(0) - 1)[own.start : own.stop]
        computing, other = self.experts.capacities(1.0)
        limits = torch.full((chosen.shape[-1],), other, device=chosen.device)
        limits[: self.experts.number] = computing
        capacity = (real.sum((0, 2))[:, None] * limits).ceil()
        return chosen & (before < capacity)

    def bounds(self, rows: Rows, samples: int) -> Bounds:
        """Up to K experts for each token."""
        copies = min(self.experts.top_k, self.experts.number)
        return Bounds(copies, rows.count * samples * copies)

    def balance(self, scores: Tensor, assignment: Tensor, counted: Tensor) -> Tensor:
        """Eq. 7, times N where the choice says so."""
        weights = torch.full((scores.shape[-1],), self.experts.tau, device=scores.device)
        weights[: self.experts.number] = 1.0
        loss = super().balance(scores, assignment * weights, counted)
        return loss if self.experts.scale_balance else loss / scores.shape[-1]

    def beside(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """Constant, copy and zero experts, [L, B, C]: what no expert needs to compute."""
        constants, copies = self.experts.constant_experts, self.experts.copy_experts
        _, constant, copy, _ = gates.split([self.experts.number, constants, copies, self.experts.zero_experts], -1)
        of_input = copy.sum(-1)
        if self.constant is None:
            return hidden * of_input[..., None].to(hidden.dtype)
        mixed = torch.einsum("lbc,nkc->lbnk", hidden.float(), self.constant_weight.float()).softmax(-1)
        of_input = of_input + (constant * mixed[..., 0]).sum(-1)
        of_constant = (constant * mixed[..., 1]).to(hidden.dtype)
        return hidden * of_input[..., None].to(hidden.dtype) + of_constant @ self.constant
