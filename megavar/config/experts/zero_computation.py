"""MoE++: experts beside which stand some that compute nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.experts.base import ExpertsChoice

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"top_k": 2, "capacity_factor": 1.1, "scale_balance": False},
    "release": {
        "number": 4, "top_k": 2, "router_layers": 2, "gates": "renormalized", "scale_input": True,
        "balance_coefficient": 0.0,
    },
}  # fmt: skip


class ZeroComputationExperts(ExpertsChoice):
    """MoE++ (Jin et al., arXiv:2410.07348): a token may also choose to be dropped, copied or replaced.

    ``number`` feed-forward experts, then constant, copy and zero experts; each token takes the ``top_k`` best of all.
    MEPA compares with it (Table 4, "MoE++") and states no setting. The defaults are the paper's equations at MEPA's
    sizes: 8 experts and 1 + 1 + 2 others (Table 2 of MoE++; its Eq. 10 gives one constant expert, which contradicts
    it), ``top_k`` 3, no token dropped, balance loss as strong as under the other routers.
    """

    implementation: ClassVar[str] = "megavar.transformer.moe.routers.zero_computation:ZeroComputationRouter"
    variable_number: ClassVar[bool] = True

    router: Literal["zero_computation"] = "zero_computation"
    preset: Literal["paper", "release"] | None = None
    """Sets other keys, which win where they are given. ``paper``: the published training: 2 experts per token, capacity
    1.1, the balance loss without a factor. ``release``: the published code (inference only), where ``num_experts`` = 8
    counts all: 4 + 4, two-layer router, renormalized gates, inputs times ``top_k``, no balance loss."""
    constant_experts: int = Field(2, ge=0)
    """Experts that give a1 x + a2 v with a trained vector v and [a1, a2] = softmax(W_c x) (Eq. 5)."""
    copy_experts: int = Field(1, ge=0)
    """Experts that give their input back (Eq. 4): the branch's input, which is normalized and modulated."""
    zero_experts: int = Field(1, ge=0)
    """Experts that give zero (Eq. 3)."""
    tau: float = Field(0.75, gt=0, le=1)
    """Weight of the other experts in the balance loss, where feed-forward experts have 1 (Eq. 7). Where the loss is
    smallest, a token meets ``top_k`` tau E / (tau E + Z) of E experts beside Z others: 1.8 by default."""
    gating_residual: bool = True
    """Add W_g times the scores of the block before, as they are before the softmax, to a block's scores (Eq. 6)."""
    gates: Literal["raw", "renormalized", "chosen"] = "raw"
    """``raw``: softmax over all (Eq. 1), so that what goes to the zero expert is lost. ``renormalized``: without the
    zero experts' share, divided by the sum over the chosen ones (the published code). ``chosen``: softmax over the
    chosen ones (its option ``moe_use_mixtral_gating``)."""
    router_layers: Literal[1, 2] = 1
    """1: a linear router (Eq. 6). 2: with a hidden layer of 8 N and tanh (the published code)."""
    score_deviation: float | None = Field(None, gt=0)
    """Standard deviation to which a token's scores are scaled before the softmax; none in the paper (the published
    code's option ``moe_use_logits_norm``). What is handed to the next block is not scaled."""
    scale_input: bool = False
    """Multiply the experts' input (not the router's) by ``top_k``, as the published code does."""
    scale_balance: bool = True
    """Multiply the balance loss by the number N of all experts, as MEPA's Eq. 10 does. The paper's Eq. 7 has no such
    factor: its coefficient 0.01 is 12 times weaker then."""
    capacity_factor: float | None = Field(None, gt=0)
    """gamma of Eq. 8, in training; of one image, in the order of its tokens. Default: no token is dropped. What the
    equation prints would drop most of the choices for any ``top_k`` above 1, because it divides the number of tokens,
    not of choices, among the experts; choices are meant here."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(preset := values.get("preset"), str):
            return {**PRESETS.get(preset, {}), **values}
        return values

    @model_validator(mode="after")
    def _gates_remain(self) -> "ZeroComputationExperts":
        if self.gates == "renormalized" and self.top_k <= self.zero_experts:
            raise ValueError(
                f"gates=renormalized divides by the gates of chosen experts that are no zero experts, but all "
                f"top_k={self.top_k} may be zero experts (zero_experts={self.zero_experts}): raise top_k, or choose "
                f"gates=raw"
            )
        return self

    @property
    def others(self) -> int:
        """Experts that compute nothing, Z."""
        return self.constant_experts + self.copy_experts + self.zero_experts

    @property
    def targets(self) -> tuple[str, ...]:
        """See :meth:`ExpertsChoice.targets`."""
        names = list(super().targets)
        for kind, count in (("constant", self.constant_experts), ("copy", self.copy_experts),
                            ("zero", self.zero_experts)):  # fmt: skip
            names += [kind] if count == 1 else [f"{kind}_{number}" for number in range(count)]
        return tuple(names)

    @property
    def carried(self) -> int:
        """The scores, for the gating residual."""
        return len(self.targets) if self.gating_residual else 0

    def copies(self, sizes: Sequence[int]) -> float:
        """See :meth:`ExpertsChoice.copies`; with the balance loss at its minimum."""
        weighted = self.tau * self.number
        return min(self.top_k * weighted / (weighted + self.others), float(self.number))

    def capacities(self, choices: float) -> tuple[float, float]:
        """Choices that a feed-forward expert and another one take at most of ``choices`` (Eq. 8, real numbers)."""
        assert self.capacity_factor is not None
        share = self.capacity_factor * choices / (self.tau * self.number + self.others)
        return self.tau * share, share
