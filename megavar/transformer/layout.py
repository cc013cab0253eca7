"""The sequence of a next-scale model: token maps of growing side length, one after the other."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaleLayout:
    """Side lengths of the token maps and, at the end, rows of padding.

    Padding makes the length divisible by the tensor-parallel size under sequence parallelism. It behaves like one more
    scale after the last: it sees everything and nothing sees it.
    """

    scales: tuple[int, ...]
    padding: int = 0

    @staticmethod
    def padded(scales: tuple[int, ...], multiple: int) -> "ScaleLayout":
        """The layout whose length is the next multiple of ``multiple``."""
        return ScaleLayout(scales, -sum(side * side for side in scales) % multiple)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per segment: the scales, then the padding if there is any."""
        return tuple(side * side for side in self.scales) + ((self.padding,) if self.padding else ())

    @cached_property
    def tokens(self) -> int:
        """Tokens without padding, L."""
        return sum(side * side for side in self.scales)

    @cached_property
    def length(self) -> int:
        """Rows of the sequence, padding included."""
        return self.tokens + self.padding

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(first row, row after the last) of each segment."""
        bounds, start = [], 0
        for size in self.sizes:
            bounds.append((start, start + size))
            start += size
        return tuple(bounds)

    def scale_index(self, device: torch.device | None = None) -> Tensor:
        """Segment of each row, int64 [length]."""
        return torch.repeat_interleave(
            torch.arange(len(self.sizes), device=device), torch.tensor(self.sizes, device=device)
        )
