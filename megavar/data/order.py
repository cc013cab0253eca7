"""Which sample stands at which place of the run: a function of the seed alone, for any number of ranks.

The run is one endless line of positions. Epoch e covers positions ``[e * N, (e + 1) * N)`` and visits all N samples in
a random order of its own. Step s takes the next ``global_batch_size`` positions; an epoch boundary may fall inside a
step. A step's positions are split over data-parallel ranks and then over micro-batches, in order. Hence nothing is
dropped or padded, every world size sees the same global batches, and a run resumes from its step number alone.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megavar.errors import ConfigError
from megavar.parallel.seeds import random_bits


class Order:
    """The random order of the samples of a source, epoch by epoch."""

    def __init__(self, length: int, seed: int) -> None:
        assert length > 0
        self.length = length
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._compute_permutation)

    def _compute_permutation(self, epoch: int) -> Tensor:
        # Sorting counter-based random numbers does not depend on the generator of a library version.
        bits = random_bits(self.seed, "order", epoch, torch.arange(self.length))
        permutation = torch.sort(bits, stable=True).indices
        return permutation.to(torch.int32) if self.length < 2**31 else permutation

    def locate(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The samples at positions ``[start, stop)``.

        Returns:
            epochs and sample indices, both int64 [stop - start].
        """
        epochs, indices = [], []
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.length)
            count = min(stop - position, self.length - offset)
            indices.append(self._permutation(epoch)[offset : offset + count].to(torch.int64))
            epochs.append(torch.full((count,), epoch))
            position += count
        return torch.cat(epochs), torch.cat(indices)


def order_of(source: Any, seed: int) -> Any:
    """The order of a source's samples: its own, if it has one (a mixture with weights)."""
    own = getattr(source, "order", None)
    return Order(len(source), seed) if own is None else own(seed)


def rank_batch_size(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Samples of one rank in one step.

    Raises:
        ConfigError: the global batch cannot be split evenly over ranks and micro-batches.
    """
    if global_batch_size % (micro_batch_size * data_parallel_size):
        raise ConfigError(
            f"The global batch of {global_batch_size} samples cannot be split over {data_parallel_size} data-parallel "
            f"ranks in micro-batches of {micro_batch_size}: it must be a multiple of "
            f"{micro_batch_size * data_parallel_size}. Change the global or the micro-batch size."
        )
    return global_batch_size // data_parallel_size


def micro_batch_positions(
    step: int, *, global_batch_size: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[tuple[int, int]]:
    """The half-open ranges of positions of a rank's micro-batches in ``step``, in order."""
    size = rank_batch_size(global_batch_size, micro_batch_size, data_parallel_size)
    first = step * global_batch_size + data_parallel_rank * size
    return [(start, start + micro_batch_size) for start in range(first, first + size, micro_batch_size)]
