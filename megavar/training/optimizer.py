"""AdamW with parameter groups by an explicit rule."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megavar.config.optimizer import OptimizerConfig

DecayRule = Callable[[str, nn.Parameter], bool]
"""Whether weight decay applies to a parameter, given its local name."""


def parameter_groups(module: nn.Module, decays: DecayRule) -> list[dict[str, Any]]:
    """Group the trainable parameters of ``module`` by decay and by whether they are tagged as experts.

    The order is the same on every rank. Each group carries ``decays`` (bool); expert groups also carry what DeepSpeed
    asks for (``moe`` and the group's ``name``).
    """
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            expert = getattr(parameter, "group_name", "") if getattr(parameter, "allreduce", True) is False else ""
            groups.setdefault((decays(name, parameter), expert), []).append(parameter)
    result = []
    for (decay, expert), parameters in sorted(groups.items(), key=lambda item: (item[0][1], not item[0][0])):
        group: dict[str, Any] = {"params": parameters, "decays": decay}
        group.update({"moe": True, "name": expert} if expert else {"name": "decayed" if decay else "undecayed"})
        result.append(group)
    return result


def build_optimizer(config: OptimizerConfig, module_name: str, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """torch's fused AdamW (nothing is compiled at start). Learning rate and decay are set at every step."""
    override = config.modules.get(module_name)
    betas = override.betas if override is not None and override.betas is not None else config.betas
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.epsilon, weight_decay=0.0, fused=True)


def set_rates(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
    """Set the values of the next step on ``optimizer`` (torch's, or DeepSpeed's around it)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
