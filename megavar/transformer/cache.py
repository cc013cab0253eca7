"""Keys and values of what was decoded so far, in memory that is reserved once."""

from torch import Tensor


class KeyValueCache:
    """Per block, keys and values [capacity, B, H, D] of which the first :meth:`length` rows are filled.

    Appending copies the new rows only. Memory is reserved at a block's first call, in the type of what it appends.
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
        """Append new rows [new, B, H, D] of ``block``; returns all of its rows up to now (views)."""
        start = self.length(block)
        end = start + key.shape[0]
        assert end <= self.capacity, f"{end} rows in a cache of {self.capacity}"
        if block not in self._entries:
            self._entries[block] = (
                key.new_empty(self.capacity, *key.shape[1:]),
                value.new_empty(self.capacity, *value.shape[1:]),
            )
        keys, values = self._entries[block]
        keys[start:end], values[start:end] = key, value
        self._filled[block] = end
        return keys[:end], values[:end]

    def crop(self, length: int) -> None:
        """Forget all rows after the first ``length`` of every block; the memory stays reserved."""
        self._filled = {block: min(filled, length) for block, filled in self._filled.items()}
