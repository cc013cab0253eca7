"""Several sources as one: their samples one after the other, in an order in which each has its weight.

With weights w_1, ..., w_K the endless line of positions (``order.py``) is cut into blocks of w_1 + ... + w_K. Every
block has w_k samples of source k, at random places, which go through source k in random orders of its own, epoch by
epoch. So every share is exact in every block, each source is gone through evenly, and where a sample stands is a
function of the seed and its place alone. Without weights all samples are one collection.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megavar.data.order import Order
from megavar.data.source import Sample, Source, Split
from megavar.errors import ConfigError
from megavar.parallel.seeds import random_bits


class Mixture:
    """See :class:`megavar.data.source.Source`."""

    def __init__(self, split: Split, sources: Sequence[Source], weights: Sequence[int] | None = None) -> None:
        """Join ``sources``, which have captions, or the same classes.

        Raises:
            ConfigError: their classes differ.
        """
        self.split: Split = split
        self.sources, self.weights = tuple(sources), None if weights is None else tuple(weights)
        self.class_names = self.sources[0].class_names
        for number, source in enumerate(self.sources):
            if source.class_names != self.class_names:
                raise ConfigError(
                    f"data.source.sources.{number} has {source.num_classes} classes and data.source.sources.0 has "
                    f"{self.num_classes}, or they are called otherwise: mixed sources have captions, or equal classes."
                )
        self.starts = [0, *itertools.accumulate(len(source) for source in self.sources)]
        """Index of the first sample of each source."""
        content = " ".join([*(source.fingerprint for source in self.sources), str(self.weights)])
        digest = hashlib.sha256(content.encode()).hexdigest()
        self.fingerprint = f"mixture-{split}-{len(self)}-{digest[:16]}"

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for text-image pairs."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> Sample:
        """Sample ``index``."""
        number = next(number for number, start in enumerate(self.starts[1:]) if index < start)
        return self.sources[number].read(index - self.starts[number])

    def order(self, seed: int) -> "Order | MixedOrder":
        """In which the samples come."""
        if self.weights is None:
            return Order(len(self), seed)
        return MixedOrder([len(source) for source in self.sources], self.weights, seed)


class MixedOrder:
    """The order of a mixture's samples; see the module. Has the method of :class:`megavar.data.order.Order`."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[int], seed: int) -> None:
        self.weights, self.seed, self.block = tuple(weights), seed, sum(weights)
        self.starts = torch.tensor([0, *itertools.accumulate(lengths)])
        self.orders = [Order(length, int(random_bits(seed, "mixture", k))) for k, length in enumerate(lengths)]
        self._owners = torch.repeat_interleave(torch.arange(len(weights)), torch.tensor(self.weights))
        self._turns = torch.cat([torch.arange(weight) for weight in self.weights])
        self._places = functools.lru_cache(maxsize=4)(self._compute_places)

    def _compute_places(self, block: int) -> Tensor:
        return torch.sort(random_bits(self.seed, "mixture_block", block, torch.arange(self.block)), stable=True).indices

    def locate(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The samples at positions ``[start, stop)``.

        Returns:
            epochs of their own source, and indices in the mixture, both int64 [stop - start].
        """
        epochs, indices = [], []
        for position in range(start, stop):
            block, place = divmod(position, self.block)
            entry = self._places(block)[place]
            owner = int(self._owners[entry])
            own = block * self.weights[owner] + int(self._turns[entry])
            epoch, index = self.orders[owner].locate(own, own + 1)
            epochs.append(epoch)
            indices.append(index + self.starts[owner])
        return torch.cat(epochs), torch.cat(indices)
