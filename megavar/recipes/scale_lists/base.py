"""What decides on which scales a step trains a next-scale generator."""

from typing import Any, Protocol


class ScaleLists(Protocol):
    """A list of side lengths, coarse to fine, for every step."""

    def __init__(self, choice: Any, usual: tuple[int, ...], seed: int) -> None:
        """``choice``: its section; ``usual``: the tokenizer's scales; ``seed``: the run's."""
        ...

    @property
    def all_sides(self) -> tuple[int, ...]:
        """Every side that may occur: metrics have one line for each."""
        ...

    @property
    def shared(self) -> bool:
        """Whether all ranks have the same list."""
        ...

    def of_step(self, step: int) -> tuple[int, ...]:
        """The list of a step on this rank."""
        ...
