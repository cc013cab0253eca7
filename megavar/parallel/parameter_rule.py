"""How one parameter is trained: what models and recipes say about it, and optimizers follow."""

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


Rule = Callable[[str], ParameterRule]
"""The rule of a tensor, given its layout-independent name (:mod:`megavar.parallel.logical`)."""
