"""How one parameter is trained: what models and recipes say about it, and optimizers follow."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterRule:
    """The treatment of one logical tensor. Equal rules share a parameter group."""

    decays: bool = True
    """Whether weight decay applies."""
    lr_factor: float = 1.0
    """The learning rate of this tensor over that of its module (VGT trains its encoder with half of it)."""
    frozen: bool = False
    """Not trained at all: no gradient, no optimizer state; checkpoints hold its weights all the same."""
    first_step: int = 0
    """First step of the run in which it is trained; before it nothing changes it."""
    end_step: float = math.inf
    """First step in which it is trained no longer: nothing changes it from then on."""


Rule = Callable[[str], ParameterRule]
"""The rule of a tensor, given its layout-independent name (:mod:`megavar.parallel.logical`)."""
