"""The inputs of a step's micro-batches: made one at a time when a pass first needs them, let go after the last."""

from collections.abc import Callable, Iterator
from typing import Any


class MicroBatches:
    """The inputs of one pass. Each is made exactly once, whoever asks first.

    Under virtual pipelining several chunks of a stage read the same inputs, each at its own time; a frozen tokenizer's
    features are in memory for as many micro-batches as are under way, not for all of the step.
    """

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        """``make`` gives the inputs of micro-batch ``index``, from 0 to ``count - 1``."""
        self.count = count
        self._make = make
        self._made: dict[int, Any] = {}
        self._uses: dict[int, int] = {}

    @staticmethod
    def of(items: list[Any]) -> "MicroBatches":
        """Of inputs that exist already."""
        return MicroBatches(len(items), items.__getitem__)

    def __len__(self) -> int:
        return self.count

    def peek(self, index: int) -> Any:
        """The inputs of a micro-batch, which stay."""
        if index not in self._made:
            assert index not in self._uses, f"the inputs of micro-batch {index} have been let go"
            self._made[index] = self._make(index)
        return self._made[index]

    def take(self, index: int, keep: bool = False) -> Any:
        """The inputs of a micro-batch; unless ``keep``, they are let go."""
        return self._use(index, 1, keep)

    def readers(self, number: int, keep: bool) -> list[Iterator[tuple[int, Any]]]:
        """``number`` iterators over (index, inputs), to be read to their ends at any pace.

        Args:
            keep: whether the inputs are needed again afterwards; else each is let go with its last reading.
        """
        return [self._read(number, keep) for _ in range(number)]

    def _read(self, number: int, keep: bool) -> Iterator[tuple[int, Any]]:
        for index in range(self.count):
            yield index, self._use(index, number, keep)

    def _use(self, index: int, readers: int, keep: bool) -> Any:
        item = self.peek(index)
        if keep:
            return item
        self._uses[index] = self._uses.get(index, 0) + 1
        if self._uses[index] == readers:
            del self._made[index]
        return item
