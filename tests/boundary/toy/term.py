"""A loss with a head: the mean of the middle hidden states knows how bright the image is."""

from typing import Any

from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.generators.base import Head
from megavar.recipes.base import Losses
from tests.boundary.toy.choices import BrightnessConfig


class Brightness:
    """Squared error of a linear readout."""

    taps = ()

    def __init__(self, choice: BrightnessConfig) -> None:
        self.name, self.weight, self.block = choice.name, choice.weight, choice.block

    @classmethod
    def build(cls, choice: BrightnessConfig, parts: Any) -> "Brightness":
        """It needs no parts."""
        return cls(choice)

    def head(self, space: TokenSpace) -> Head:
        """On the output of one block."""
        return Head((f"block.{self.block}",), lambda width: nn.Linear(width, 1))

    def prepare(self, batch: Batch, inputs: Any) -> Tensor:
        """[B]: mean of the pixels; of cached tokens the share of odd ids."""
        if batch.images is not None:
            return batch.images.mean((1, 2, 3))
        return (inputs.targets % 2).float().mean(1)

    def loss(self, tapped: dict[str, Tensor], output: Tensor, targets: Tensor) -> Losses:
        """Sum over images."""
        error = (output.float().mean((1, 2)) - targets).square()
        return Losses(error.sum(), {"error": error.detach().sqrt().sum()})


