"""Keys and values of what was decoded so far, in memory that is reserved once."""

from torch import Tensor


class KeyValueCache:
    """Per block, keys and values [B, H, capacity, D] of which the first :meth:`length` rows are filled.

    Appending copies the new rows only. Memory is reserved at a block's first call, in the type of what it appends; a
    head's rows lie side by side, as attention reads them at every later step.
    """

    def __init__(self, capacity: int) -> None:
        """``capacity``: most rows that will ever be kept, the length of a complete sequence without padding."""
        self.capacity = capacity
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        self._filled: dict[int, int] = {}

    def length(self, block: int) -> int:
        """Rows that ``block`` has appended."""
        return self._filled.get(block, 0)

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new rows [new, B, H, D] of ``block``; returns all of its rows up to now, [B, H, rows, D] (views)."""
        start = self.length(block)
        end = start + key.shape[0]
        assert end <= self.capacity, f"{end} rows in a cache of {self.capacity}"
        if block not in self._entries:
            self._entries[block] = (self._reserve(key), self._reserve(value))
        keys, values = self._entries[block]
        keys[:, :, start:end], values[:, :, start:end] = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        self._filled[block] = end
        return keys[:, :, :end], values[:, :, :end]

    def _reserve(self, new: Tensor) -> Tensor:
        _, batch, heads, size = new.shape
        return new.new_empty(batch, heads, self.capacity, size)

    def crop(self, length: int) -> None:
        """Forget all rows after the first ``length`` of every block; the memory stays reserved."""
        self._filled = {block: min(filled, length) for block, filled in self._filled.items()}
