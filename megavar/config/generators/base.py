"""The kind of all generators, and what layout rules need to know of one."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megavar.config.choice import Choice
from megavar.config.experts.base import ExpertsChoice
from megavar.config.token_space import TokenSpace


@dataclass(frozen=True)
class Limits:
    """What restricts the layouts of a generator. Free of torch: the rules run on login nodes."""

    depth: int
    """Number of blocks; pipeline stages share them evenly."""
    shared: dict[str, int] = field(default_factory=dict)
    """Sizes that tensor-parallel ranks share, by a phrase for errors that names the key."""
    experts: ExpertsChoice | None = None
    """Mixture of experts of the blocks, if there is one."""


class GeneratorChoice(Choice):
    """An architecture and its sizes; :class:`megavar.generators.base.Generator` is what it configures."""

    package: ClassVar[str] = "megavar.config.generators"
    default: ClassVar[str | None] = "var"

    name: str
    """Which architecture."""

    def limits(self, space: TokenSpace | None) -> Limits:
        """What restricts the layouts.

        Args:
            space: of the tokenizer; None leaves out what depends on it.
        """
        raise NotImplementedError(f"{type(self).__name__} must say its limits")

    @property
    def class_count(self) -> int | None:
        """Number of classes that can be asked for; None where conditions are something else (text)."""
        return None

    @property
    def text_rows(self) -> int | None:
        """Token ids of text that are read for each image; None where none are."""
        return None

    @property
    def condition_drop(self) -> float:
        """Share of the training samples whose condition is replaced by none, for classifier-free guidance."""
        return 0.0

    @property
    def any_order(self) -> bool:
        """Whether it can be trained on the tokens of an image in any order: its rows know which token they predict."""
        return False

    @property
    def reads_codebook(self) -> bool:
        """Whether the generator holds the tokenizer's code vectors; assembly hands them to it where it is trained."""
        return False

    @property
    def condition(self) -> Literal["class", "text", "none"]:
        """What images are asked for by; suites that ask for something else are refused."""
        return "none" if self.class_count is None else "class"
