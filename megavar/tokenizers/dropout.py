"""Dropout whose masks belong to samples: equal on any number of ranks, in any micro-batch, after any resume."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megavar.parallel import seeds


class SampleDropout(nn.Module):
    """Like ``nn.Dropout`` (rate to 1/65536); what a sample loses follows from its key and the layer's name.

    The owner of the layers names them once (:func:`name_dropouts`) and gives the keys around each forward pass
    (:func:`sample_keys`).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.stream = ""
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]; the identity in evaluation mode."""
        if not self.training or self.rate == 0:
            return x
        assert self.keys is not None and self.stream, "dropout needs names and sample keys; see sample_keys"
        dropped = min(round(self.rate * 65536), 65535)
        kept = seeds.lanes(seeds.random_bits(0, self.stream, self.keys), 0, x[0].numel()) >= dropped - 32768
        return torch.where(kept.view(x.shape), x * (65536 / (65536 - dropped)), 0.0)

    def extra_repr(self) -> str:
        """The rate, for prints of the model."""
        return f"rate={self.rate}"


def name_dropouts(model: nn.Module) -> None:
    """Name every dropout layer of ``model`` after its place, so that layers draw different masks."""
    for name, module in model.named_modules():
        if isinstance(module, SampleDropout):
            module.stream = f"dropout/{name}"


@contextmanager
def sample_keys(model: nn.Module, keys: Tensor | None) -> Iterator[None]:
    """Within the block the dropout layers of ``model`` use the keys of these samples.

    Args:
        keys: int64 [B], different for every sample and epoch; None where no layer drops anything.
    """
    layers = [module for module in model.modules() if isinstance(module, SampleDropout) and module.rate > 0]
    for layer in layers:
        layer.keys = keys
    try:
        yield
    finally:
        for layer in layers:
            layer.keys = None
