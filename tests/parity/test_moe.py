"""Mixtures of experts that are not MEPA's, against the published layers: gates, results, gradients, losses."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.generators.var import VAR
from megavar.parallel.logical import logical_tensors
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.moe.router import Routing
from megavar.transformer.sequence import SequenceLayout

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
MOE = Family(
    "moe",
    aside={
        "batch": "the inputs' shape says it",
        "output.logits": "scores are their softmax, output.probs",
        "output.*.experts_per_token": "sums of the assignment",
    },
)


class Layer:
    """A mixture with VAR's experts and the case's weights, which remembers how it routed."""

    def __init__(self, case: Case, weights: dict[str, Tensor], sizes: tuple[int, ...], number: int = 0, **keys: Any):
        width, hidden = case.config["width"], case.config["hidden"]
        experts = ExpertsChoice.make(**keys)
        choice = VARConfig(depth=1, width=width, heads=1, feed_forward_ratio=hidden / width, experts=experts)
        config = VAR.layers(choice, ParallelConfig(), torch.float32)
        self.layer = ExpertFeedForward(config, number, experts=experts, kinds=len(sizes))
        parameters = dict(self.layer.named_parameters())
        self.tensors = {tensor.name: tensor for tensor in logical_tensors(self.layer)}
        assert self.tensors.keys() == weights.keys()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.local(parameters[tensor.parameter]).copy_(weights[name])
        self.context = ForwardContext(SequenceLayout(sizes), routing=[])
        self.layer.moe.router.register_forward_hook(lambda module, given, routing: setattr(self, "routing", routing))
        self.routing: Routing

    def __call__(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.layer(x.transpose(0, 1).contiguous(), self.context).transpose(0, 1)

    def by_token(self, values: Tensor) -> Tensor:
        """[L B, E] as routing has it -> [B, L, E]."""
        return values.unflatten(0, (self.context.sequence.length, -1)).transpose(0, 1)

    def gradients(self) -> dict[str, Tensor]:
        """By logical name."""
        parameters = dict(self.layer.named_parameters())
        return {name: tensor.local(parameters[tensor.parameter].grad) for name, tensor in self.tensors.items()}


def names_of_experts(experts: int, prefix: str = "experts.") -> dict[str, str]:
    """Our names to the published ones."""
    return {
        f"moe.experts.{number}.linear_{layer}.{kind}": f"{prefix}{number}.{layer}.{kind}"
        for number in range(experts)
        for layer in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }


# -- expert choice -----------------------------------------------------------------------------------------------------

GROUPS = ("image_scale", "image", "batch")
ROUNDING = {"round": "nearest", "floor": "floor", "ceil": "ceil"}


def is_expert_choice(case: Case) -> bool:
    return "capacity_factor" in case.config


def capacity_of(case: Case, group: str) -> dict[str, Any]:
    """The reference takes the floor, without a minimum, of groups larger than a scale."""
    given = case.config
    assert Fraction(*given["capacity_factor_fraction"]) == Fraction(str(given["capacity_factor"]))
    own = {"rounding": ROUNDING[given["rounding"]], "minimum": given["minimum"]}
    return {
        "router": "expert_choice", "number": given["experts"], "top_k": 1, "group": group,
        "capacity_factor": float(given["capacity_factor"]),
    } | (own if group == "image_scale" else {"rounding": "floor", "minimum": 0})  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
@MOE.each_case(is_expert_choice)
def test_expert_choice_equals_the_reference(case: Case, group: str) -> None:
    sizes = tuple(side * side for side in case.config["patch_nums"])
    assert sum(sizes) == case.config["length"]
    given = case.under("weights.")
    names = {"moe.router.weight": "gate_weight"} | names_of_experts(case.config["experts"])
    weights = {ours: given[theirs] for ours, theirs in names.items()}
    layer = Layer(case, weights, sizes, backend="grouped", **capacity_of(case, group))
    x = case["input.x"].clone().requires_grad_()
    result = layer(x)
    case.check("output.probs", (x @ given["gate_weight"].T).softmax(-1))
    case.check(f"output.{group}.assignment", layer.by_token(layer.routing.assignment))
    case.check(f"output.{group}.gates", layer.by_token(layer.routing.gates))
    case.check(f"output.{group}.result", result)
    task = (result * case["input.cotangent"]).sum()
    case.check(f"output.{group}.task", task)
    task.backward()
    gradients = layer.gradients()
    assert x.grad is not None
    case.check(f"grad.{group}.input", x.grad)
    case.check(f"grad.{group}.gate_weight", gradients["moe.router.weight"])
    for ours, theirs in names.items():
        case.check(f"grad_norm.{group}.{theirs}", gradients[ours].norm())


@MOE.each_case(is_expert_choice)
def test_experts_take_as_many_tokens_as_the_reference_says(case: Case) -> None:
    sizes = torch.tensor([side * side for side in case.config["patch_nums"]])
    batch = case["input.x"].shape[0]
    for group, tokens in (("image_scale", sizes), ("image", sizes.sum()[None]), ("batch", sizes.sum()[None] * batch)):
        taken = ExpertsChoice.make(**capacity_of(case, group)).tokens_per_expert(tokens)
        case.check(f"output.capacity.{group}", taken)
    var_256 = [side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    for name in case.under("output.capacity_table."):
        rounding, factor = name.split(".c")
        keys = {"rounding": ROUNDING[rounding], "capacity_factor": float(factor), "minimum": 1, "number": 8}
        experts = ExpertsChoice.make(router="expert_choice", top_k=1, **keys)
        case.check(f"output.capacity_table.{name}", torch.tensor([experts.tokens_per_expert(size) for size in var_256]))
