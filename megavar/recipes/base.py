"""What a recipe is: the algorithm of a paper as the trainer sees it.

A recipe owns modules and turns a batch into named losses. It knows nothing of engines, ranks or checkpoints.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megavar.config.root import Config
from megavar.data.batch import Batch


@dataclass
class Losses:
    """The result of one micro-batch.

    ``named`` and ``statistics`` carry no gradient. The trainer averages ``named`` over micro-batches and data-parallel
    ranks and adds up ``statistics`` (counts, sums) over them.
    """

    total: Tensor
    """float32 scalar: what is differentiated, a mean over the micro-batch."""
    named: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by metric name, each a mean over the micro-batch."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the micro-batch by name, of any shape."""


class Parts(Protocol):
    """What a recipe is built from (``megavar.assembly.Assembly``)."""

    @property
    def config(self) -> Config:
        """The run's configuration; ``config.recipe`` is the recipe's own section."""
        ...

    @property
    def device(self) -> torch.device:
        """Where modules live."""
        ...

    def tokenizer(self) -> Any:
        """The frozen tokenizer whose tokens a generator learns (``megavar.tokenizers.base``)."""
        ...

    def fresh_tokenizer(self) -> Any:
        """The tokenizer that the run trains, not initialized and on the CPU."""
        ...

    def generator(self, **options: Any) -> nn.Module:
        """This rank's part of the generator: a stage, or a ``ModuleList`` of its chunks."""
        ...

    def terms(self) -> list[Any]:
        """The losses that the recipe section adds to the recipe's own."""
        ...


class Recipe(Protocol):
    """The interface between a paper and the trainer."""

    @classmethod
    def build(cls, parts: Parts) -> "Recipe":
        """The recipe that ``parts.config.recipe`` describes, with freshly initialized modules."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """Trainable modules by name, in the order in which they are stepped."""
        ...

    def prepare(self, batch: Batch, step: int) -> Any:
        """Turn a batch into the inputs of :meth:`forward`, without gradient (tokenise, drop labels)."""
        ...

    def forward(self, name: str, model: nn.Module, inputs: Any) -> Any:
        """Run module ``name``. ``model`` is the module or an engine around it; call it, never its attributes."""
        ...

    def loss(self, name: str, output: Any, inputs: Any, step: int) -> Losses:
        """Turn the output of module ``name`` into losses."""
        ...

    def active(self, name: str, step: int) -> bool:
        """Whether module ``name`` is trained at ``step`` (a discriminator starts late)."""
        ...

    def decays(self, name: str, parameter_name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter of module ``name``."""
        ...

    def collect(self) -> dict[str, Tensor]:
        """Statistics that modules recorded on this rank since the last call, and forget them.

        Every rank calls it at the same step and gets the same names and shapes (zeros for what lies on other ranks);
        the trainer adds them up over all ranks of the world.
        """
        ...

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Turn statistics (from :meth:`loss` and :meth:`collect`, summed over ranks and steps) into metrics."""
        ...

    def after_step(self, step: int) -> None:
        """Called on every rank after the optimizer step (for example to revive dead codes)."""
        ...
