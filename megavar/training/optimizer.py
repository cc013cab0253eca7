"""AdamW with parameter groups by explicit rules."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from megavar.config.optimizer import OptimizerConfig
from megavar.errors import ConfigError
from megavar.parallel.parameter_rule import ParameterRule, Rule
from megavar.parallel.topology import Topology
from megavar.training.checkpoint.state import logical_by_parameter


class GroupKey(NamedTuple):
    """What the parameters of one group have in common; groups are sorted by it."""

    expert: str
    """DeepSpeed's name of the experts' process groups; empty for other parameters."""
    undecayed: bool
    lr_factor: float
    first_step: int = 0
    end_step: float = math.inf

    @property
    def timed(self) -> bool:
        """Whether its parameters are trained in some of the run's steps only."""
        return self.first_step > 0 or self.end_step < math.inf


def parameter_rules(module: nn.Module, rule: Rule) -> dict[str, ParameterRule]:
    """The rule of every parameter of ``module`` by its local name.

    Raises:
        ConfigError: tensors that are stored as one parameter (stacked experts) have different rules.
    """
    result = {}
    for parameter, tensors in logical_by_parameter(module).items():
        rules = {tensor.name: rule(tensor.name) for tensor in tensors}
        first, *others = rules.items()
        for other in others:
            if other[1] != first[1]:
                raise ConfigError(
                    f"{first[0]} and {other[0]} are stored as one parameter ({parameter}), but have different rules: "
                    f"{first[1]} and {other[1]}. Give all experts of a layer the same one."
                )
        result[parameter] = first[1]
    return result


def freeze(module: nn.Module, rules: dict[str, ParameterRule]) -> None:
    """Take the frozen parameters out of training."""
    for name, parameter in module.named_parameters():
        if rules[name].frozen:
            parameter.requires_grad_(False)


def parameter_groups(module: nn.Module, rules: dict[str, ParameterRule]) -> list[dict[str, Any]]:
    """Group the trainable parameters of ``module`` by decay, learning rate, and whether they are tagged as experts.

    The order is the same on every rank. Each group carries its ``key`` (:class:`GroupKey`); expert groups also carry
    what DeepSpeed asks for (``moe`` and the group's ``name``).
    """
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            expert = getattr(parameter, "group_name", "") if getattr(parameter, "allreduce", True) is False else ""
            rule = rules[name]
            key = GroupKey(expert, not rule.decays, rule.lr_factor, rule.first_step, rule.end_step)
            groups.setdefault(key, []).append(parameter)
    return [_group(key, groups[key]) for key in sorted(groups)]


def _group(key: GroupKey, parameters: list[nn.Parameter]) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "key": key}
    if key.expert:
        return group | {"moe": True, "name": key.expert}
    factor = "" if key.lr_factor == 1 else f" at {key.lr_factor:g} of the learning rate"
    steps = f" in steps {key.first_step} to {key.end_step:g}" if key.timed else ""
    return group | {"name": ("undecayed" if key.undecayed else "decayed") + factor + steps}


@contextmanager
def equal_groups_on_stages(
    name: str, module: nn.Module, groups: list[dict[str, Any]], topology: Topology
) -> Iterator[list[dict[str, Any]]]:
    """The groups of ``module`` with those added that only other pipeline stages have. Collective.

    DeepSpeed's gradient norm does one collective over all stages per group: a stage with fewer groups, or others, would
    wait for ever or add up what does not belong together. An added group holds one parameter that never has a gradient.
    DeepSpeed asks for the names of all parameters when it is built, so within the block they belong to the module;
    afterwards it is as before, and checkpoints know nothing of them.

    Raises:
        ConfigError: a stage has experts and another has none.
    """
    if topology.config.pipeline == 1:
        yield groups
        return
    from megatron.core import parallel_state

    everywhere: list[Any] = [None] * topology.config.pipeline
    own = [group["key"] for group in groups]
    dist.all_gather_object(everywhere, own, group=parallel_state.get_pipeline_model_parallel_group())
    keys = {GroupKey(*key) for keys in everywhere for key in keys}
    if len({frozenset(key.expert for key in stage if key.expert) for stage in map(_keys, everywhere)}) > 1:
        raise ConfigError(
            f"Some pipeline stages of {name} have trainable experts and others have none. Spread the blocks with "
            f"experts over all stages, or set parallel.pipeline=1."
        )
    by_key = {group["key"]: group for group in groups}
    some = next(module.parameters())
    added = {}
    for number, key in enumerate(sorted(keys - by_key.keys())):
        placeholder: Any = nn.Parameter(torch.zeros(1, dtype=some.dtype, device=some.device))
        if key.expert:
            placeholder.allreduce, placeholder.group_name = False, key.expert
        added[f"placeholder_{number}"] = placeholder
        by_key[key] = _group(key, [placeholder])
    for place, placeholder in added.items():
        module.register_parameter(place, placeholder)
    try:
        yield [by_key[key] for key in sorted(by_key)]
    finally:
        for place in added:
            del module._parameters[place]


def _keys(stage: list[Any]) -> list[GroupKey]:
    return [GroupKey(*key) for key in stage]


def build_optimizer(config: OptimizerConfig, module_name: str, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """torch's fused AdamW (nothing is compiled at start). Learning rate and decay are set at every step."""
    override = config.modules.get(module_name)
    betas = override.betas if override is not None and override.betas is not None else config.betas
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.epsilon, weight_decay=0.0, fused=True)


def set_rates(optimizer: Any, learning_rate: float, weight_decay: float, step: int) -> None:
    """Set the values of step ``step`` on ``optimizer`` (torch's, or DeepSpeed's around it).

    A group outside of its steps has the learning rate 0, with which AdamW changes no bit of a weight: neither what its
    moments still hold nor decay moves it. All groups count the same steps, so in a group that begins late AdamW would
    correct its fresh moments as if they were old; rate and decay make up for that.
    """
    for group in optimizer.param_groups:
        key: GroupKey = group["key"]
        late = _late_start(key.first_step, step, group["betas"]) if key.first_step <= step < key.end_step else 0.0
        group["lr"] = learning_rate * key.lr_factor * late
        group["weight_decay"] = 0.0 if key.undecayed or late == 0 else weight_decay / late


def _late_start(first_step: int, step: int, betas: tuple[float, float]) -> float:
    """AdamW's factor of its moments after the steps since ``first_step``, over the one that it applies after all."""
    if first_step == 0:
        return 1.0
    since, after_all = step - first_step + 1, step + 1
    (m, v), (m_all, v_all) = ([1 - beta**count for beta in betas] for count in (since, after_all))
    return m_all / m * math.sqrt(v / v_all)
