import torch
from torch import nn

from megavar.config.optimizer import OptimizerConfig, OptimizerOverrides
from megavar.parallel.parameter_rule import ParameterRule
from megavar.training.optimizer import build_optimizer, freeze, parameter_groups, parameter_rules, set_rates


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Parameter(torch.zeros(2, 2))
        self.expert = nn.Linear(4, 4)
        for parameter in self.expert.parameters():
            parameter.allreduce, parameter.group_name = False, "ep_size_2"


def rule(name):
    return ParameterRule(decays=name in ("linear.weight", "expert.weight"), frozen=name == "frozen")


def groups_of(module):
    rules = parameter_rules(module, rule)
    freeze(module, rules)
    return parameter_groups(module, rules)


def test_groups_follow_the_rule_and_nothing_else():
    module = Module()
    groups = groups_of(module)
    described = [
        (group["name"], not group["key"].undecayed, group.get("moe", False), [id(p) for p in group["params"]])
        for group in groups
    ]
    assert described == [
        ("decayed", True, False, [id(module.linear.weight)]),
        ("undecayed", False, False, [id(p) for p in (module.linear.bias, module.norm.weight, module.norm.bias)]),
        ("ep_size_2", True, True, [id(module.expert.weight)]),
        ("ep_size_2", False, True, [id(module.expert.bias)]),
    ]


def test_rates_reach_the_right_groups():
    config = OptimizerConfig(betas=(0.8, 0.9), modules={"other": OptimizerOverrides(betas=(0.5, 0.6))})
    optimizer = build_optimizer(config, "generator", groups_of(Module()))
    set_rates(optimizer, 0.1, 0.02, 0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0, 0.02, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert build_optimizer(config, "other", groups_of(Module())).param_groups[0]["betas"] == (0.5, 0.6)


def test_decay_is_decoupled_and_only_where_allowed():
    module = Module()
    optimizer = build_optimizer(OptimizerConfig(), "module", groups_of(module))
    set_rates(optimizer, 0.1, 0.5, 0)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in module.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("linear.weight", "expert.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
