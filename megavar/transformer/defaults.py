"""Initial values and parameter rules of networks that do not state their own."""

import math

import torch
from torch import Tensor

from megavar.parallel.parameter_rule import ParameterRule


def usual_initial_value(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Zero biases, unit scales, and everything else normal with variance 1 / (3 fan-in), PyTorch's for linear layers.

    A vector whose name is not a bias's is taken for a norm's scale.
    """
    if name.endswith("bias"):
        value.zero_()
    elif value.ndim == 1:
        value.fill_(1.0)
    else:
        fan_in = math.prod(value.shape[1:])
        value.normal_(std=math.sqrt(1 / (3 * fan_in)), generator=generator)


def usual_rule(name: str) -> ParameterRule:
    """Weight decay on everything but biases and the scales of norms, which are called so."""
    parts = name.split(".")
    return ParameterRule(decays=not (parts[-1].endswith("bias") or any("norm" in part for part in parts[-2:])))
