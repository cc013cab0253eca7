"""What generators, their backbone and the losses on their outputs hand to each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megavar.parallel.logical import InitializationRule
from megavar.parallel.parameter_rule import Rule
from megavar.transformer.defaults import usual_initial_value, usual_rule
from megavar.transformer.sequence import SequenceLayout


@dataclass
class TokenSequence:
    """What every stage knows of the tokens of a pass, each from its own copy of the inputs."""

    layout: SequenceLayout
    """Segments and visibility, without padding rows: the backbone adds them."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines, float32 [L, R / 2] or [B, L, R / 2]; see :class:`ForwardContext`."""
    valid: Tensor | None = None
    """bool [B, L] (with a cache [B, rows in it + L]): False marks tokens of a sample that nobody may see (text)."""
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for dropout and drop path; None disables them."""


@dataclass
class Embedded:
    """What the first stage makes of the inputs."""

    hidden: Tensor
    """[B, L, C]."""
    conditions: dict[str, Tensor] = field(default_factory=dict)
    """What blocks or the last stage need beside hidden states: [B, rows, C] under the names and with the rows of
    :meth:`Backbone.condition_rows`."""


@dataclass(frozen=True)
class Head:
    """A network on the last stage that a loss of its own trains, beside the model's prediction.

    Its parameters are ``heads.<name>.*``: they are trained by the model's engine and left out of exports.
    """

    taps: tuple[str, ...]
    """What it reads."""
    build: Callable[[int], nn.Module]
    """From the width C to the network. It is called with its taps, each [B, L, C], in the order of :attr:`taps`, inside
    the model's forward, so that ZeRO-3 gathers its parameters."""
    initial_value: InitializationRule = usual_initial_value
    """Of its parameters, by their names in it."""
    rule: Rule = usual_rule
    """How they are trained, by their names in it."""

    def build_in(self, dtype: torch.dtype, width: int) -> nn.Module:
        """The network with parameters of the model's type. Not converted: tensors without values cannot be."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return self.build(width)
        finally:
            torch.set_default_dtype(before)


@dataclass
class GeneratorOutput:
    """What the last stage returns."""

    prediction: Any
    """Mostly logits, float32 [B, L, V / tensor-parallel size]; a generator says what else it may be."""
    taps: dict[str, Tensor] = field(default_factory=dict)
    """[B, L, C] by name, complete on every rank."""
    heads: dict[str, Any] = field(default_factory=dict)
    """What each head made of its taps, by the head's name."""
