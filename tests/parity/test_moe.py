"""Mixtures of experts that are not MEPA's, against the published layers: gates, results, gradients, losses."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megavar.config.experts.base import ExpertsChoice
from megavar.config.experts.zero_computation import PRESETS
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.generators.var import VAR
from megavar.parallel.logical import logical_tensors
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.sequence import SequenceLayout

from .cases import Case, Family

pytestmark = pytest.mark.usefixtures("single_process")
MOE = Family(
    "moe",
    aside={
        "batch": "the inputs' shape says it",
        "output.logits": "scores are their softmax, output.probs",
        "released_defaults*": "what the class does without options: the variant default",
        "output.*.experts_per_token": "sums of the assignment",
    },
)


Names = dict[str, str | list[str]]
"""Ours to the published ones; of a tensor that holds several of theirs as rows, a list."""


class Layer:
    """A mixture with VAR's experts and the case's weights, which remembers how it routed."""

    def __init__(self, case: Case, names: Names, context: ForwardContext, block: int = 0, /, **keys: Any):
        width, hidden = case.config["width"], case.config["hidden"]
        experts = ExpertsChoice.make(**keys)
        choice = VARConfig(depth=1, width=width, heads=1, feed_forward_ratio=hidden / width, experts=experts)
        config = VAR.layers(choice, ParallelConfig(), torch.float32)
        self.layer = ExpertFeedForward(config, block, experts=experts, kinds=len(context.sequence.sizes))
        self.context, self.names = context, names
        self.parameters = dict(self.layer.named_parameters())
        self.tensors = {tensor.name: tensor for tensor in logical_tensors(self.layer)}
        assert self.tensors.keys() == names.keys()
        given = case.under("weights.")
        with torch.no_grad():
            for ours, theirs in names.items():
                value = torch.stack([given[one] for one in theirs]) if isinstance(theirs, list) else given[theirs]
                self.tensors[ours].local(self.parameters[self.tensors[ours].parameter]).copy_(value)
        choose = self.router.choose
        self.router.choose = lambda scores: self.remember(*choose(scores))

    @property
    def router(self) -> Any:
        return self.layer.moe.router

    def remember(self, gates: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """[L, B, M] -> [B, L, M]."""
        self.gates, self.assignment = gates.transpose(0, 1), assignment.transpose(0, 1)
        return gates, assignment

    def __call__(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.layer(x.transpose(0, 1).contiguous(), self.context).transpose(0, 1)

    def gradients(self) -> dict[str, Tensor]:
        """By published name."""
        found: dict[str, Tensor] = {}
        for ours, theirs in self.names.items():
            parameter = self.parameters[self.tensors[ours].parameter]
            gradient = self.tensors[ours].local(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            found |= dict(zip(theirs, gradient)) if isinstance(theirs, list) else {theirs: gradient}
        return found


def context_of(sizes: tuple[int, ...]) -> ForwardContext:
    return ForwardContext(SequenceLayout(sizes), routing=[])


def names_of_experts(experts: int, prefix: str = "experts.") -> Names:
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
    names = {"moe.router.weight": "gate_weight"} | names_of_experts(case.config["experts"])
    layer = Layer(case, names, context_of(sizes), backend="grouped", **capacity_of(case, group))
    x = case["input.x"].clone().requires_grad_()
    result = layer(x)
    case.check("output.probs", (x @ case["weights.gate_weight"].T).softmax(-1))
    case.check(f"output.{group}.assignment", layer.assignment)
    case.check(f"output.{group}.gates", layer.gates)
    case.check(f"output.{group}.result", result)
    task = (result * case["input.cotangent"]).sum()
    case.check(f"output.{group}.task", task)
    task.backward()
    gradients = layer.gradients()
    assert x.grad is not None
    case.check(f"grad.{group}.input", x.grad)
    case.check(f"grad.{group}.gate_weight", gradients["gate_weight"])
    for name, gradient in gradients.items():
        case.check(f"grad_norm.{group}.{name}", gradient.norm())


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


# -- MoE++ -------------------------------------------------------------------------------------------------------------


def is_plus_plus(case: Case) -> bool:
    return "tau" in case.config


def is_release(case: Case) -> bool:
    return "variants" in case.config


def names_of_plus_plus(experts: dict[str, int], block: int, router_layers: int) -> Names:
    of, ffn = f"layers.{block}.", experts["ffn"]
    constants = [f"{of}experts.experts.{ffn + number}" for number in range(experts["constant"])]
    names: Names = {"moe.router.weight": f"{of}gate.wg.weight"}
    if router_layers == 2:
        names = {"moe.router.hidden_weight": f"{of}gate.wg.0.weight", "moe.router.weight": f"{of}gate.wg.2.weight"}
    if block > 0:
        names["moe.router.residual"] = f"{of}gate.gate_map.weight"
    if constants:
        names["moe.router.constant"] = [f"{name}.constant" for name in constants]
        names["moe.router.constant_weight"] = [f"{name}.wg.weight" for name in constants]
    return names | names_of_experts(ffn, f"{of}experts.experts.")


def plus_plus_layers(case: Case, sizes: tuple[int, ...], router_layers: int, **keys: Any) -> list[Layer]:
    """The case's layers, linked by the scores that each hands to the next."""
    experts, context = case.config["experts"], context_of(sizes)
    numbers = {f"{kind}_experts": experts[kind] for kind in ("constant", "copy", "zero")}
    common = {"router": "zero_computation", "number": experts["ffn"], "top_k": case.config["top_k"]} | numbers
    common["router_layers"] = router_layers
    return [
        Layer(case, names_of_plus_plus(experts, block, router_layers), context, block, **common | keys)
        for block in range(case.config["layers"])
    ]


@pytest.mark.parametrize("objective", ["task", "balance", "balance_image"])
@MOE.each_case(is_plus_plus)
def test_moe_plus_plus_equals_its_equations(case: Case, objective: str) -> None:
    given = case.config
    assert given["gate"] == "softmax" and given["input_scale"] in (1, given["top_k"])
    sizes = tuple(side * side for side in given["patch_nums"])
    assert sum(sizes) == given["length"]
    scope = "image" if objective == "balance_image" else "micro_batch"
    layers = plus_plus_layers(
        case, sizes, given["router_layers"], tau=given["tau"], balance_scope=scope, scale_balance=False,
        gates="chosen" if given["renormalize"] else "raw", scale_input=given["input_scale"] != 1,
        balance_coefficient=0.0 if objective == "task" else 1.0, backend="grouped",
    )  # fmt: skip
    kinds = [name.partition("_")[0] for name in layers[0].router.experts.targets]
    assert given["kinds"] == ["ffn" if kind.isdigit() else kind for kind in kinds]
    x = case["input.x"].clone().requires_grad_()
    hidden, ffn = x, given["experts"]["ffn"]
    for block, layer in enumerate(layers):
        result = layer(hidden)
        logits = layer.context.carried.transpose(0, 1)
        seen = {
            "input": hidden, "logits": logits, "probs": logits.softmax(-1), "assignment": layer.assignment,
            "gates": layer.gates, "result": result, "load": layer.assignment.sum((0, 1)),
            "ffn_per_token": layer.assignment[..., :ffn].sum(-1),
        }  # fmt: skip
        for number in range(given["experts"]["constant"]):
            alone = torch.zeros_like(layer.gates)
            alone[..., ffn + number] = 1
            seen[f"constant_output.{number}"] = layer.router.beside(hidden, alone)
        for name, value in seen.items():
            case.check(f"output.layer.{block}.{name}", value)
        hidden = hidden + result
    case.check("output.hidden", hidden)
    balance = [record.balance for record in layers[0].context.routing]
    case.check_series(f"output.balance.{scope}", balance)
    case.check(f"output.balance_sum.{scope}", sum(balance))
    task = (hidden * case["input.cotangent"]).sum()
    if objective == "task":
        case.check("output.task", task)
        case.check("output.loss", task + given["beta"] * sum(balance))
        task.backward()
    else:
        (hidden * 0).sum().backward()  # what routers inject is all there is
    gradients = {name: value for layer in layers for name, value in layer.gradients().items()}
    for name in case.under(f"grad.{objective}."):
        case.check(f"grad.{objective}.{name}", x.grad if name == "input" else gradients[name])
    for name in case.under(f"grad_norm.{objective}."):
        case.check(f"grad_norm.{objective}.{name}", gradients[name].norm())


@MOE.each_case(is_plus_plus)
def test_moe_plus_plus_has_the_capacities_of_its_equation(case: Case) -> None:
    given = case.config
    experts = plus_plus_layers(case, (given["length"],), given["router_layers"], tau=given["tau"],
                               capacity_factor=given["gamma"])[0].router.experts  # fmt: skip
    tokens = case["input.x"].shape[0] * given["length"]
    for name, number in (("tokens", tokens), ("assignments", given["top_k"] * tokens)):
        case.check(f"output.capacity.{name}", torch.tensor(experts.capacities(number), dtype=torch.float64))


@MOE.each_case(is_release)
def test_moe_plus_plus_equals_the_released_code(case: Case) -> None:
    given = case.config
    for variant, options in given["variants"].items():
        mixtral = bool(options.get("moe_use_mixtral_gating"))
        deviation = options.get("moe_gate_norm_std") if options.get("moe_use_logits_norm") else None
        keys = {
            "gates": "chosen" if mixtral else "renormalized",
            "scale_input": not (mixtral or bool(options.get("moe_feature_no_mul_topk"))),
            "score_deviation": deviation,
        }
        if not options:
            preset = PRESETS["release"]
            assert keys == {name: preset.get(name) for name in keys} and preset["router_layers"] == 2
        layers = plus_plus_layers(case, (given["length"],), 2 if given["moe_2layer_gate"] else 1, **keys,
                                  balance_coefficient=0.0, backend="grouped")  # fmt: skip
        x = case["input.x"].clone().requires_grad_()
        total = torch.zeros(())
        for block, layer in enumerate(layers):
            result, of = layer(x[block]), f"output.{variant}.layer.{block}."
            assert layer.context.carried is not None
            case.check(f"{of}logits", layer.context.carried.transpose(0, 1))
            case.check(f"{of}gates", layer.gates)
            case.check(f"{of}assignment", layer.assignment)
            case.check(f"{of}result", result)
            total = total + result
        case.check(f"output.{variant}.sum", total)
        task = (total * case["input.cotangent"]).sum()
        case.check(f"output.{variant}.task", task)
        task.backward()
        assert x.grad is not None
        case.check(f"grad.{variant}.input", x.grad)
        gradients = {name: value for layer in layers for name, value in layer.gradients().items()}
        gradients["layers.0.gate.gate_map.weight"] = torch.zeros(())  # theirs exists, and is never used
        for name in case.under(f"grad_norm.{variant}."):
            case.check(f"grad_norm.{variant}.{name}", gradients[name].norm())
