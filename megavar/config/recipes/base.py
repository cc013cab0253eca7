"""The kind of all recipes: which paper's algorithm a run trains, with its hyper-parameters."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.choice import Choice
from megavar.config.generators.base import GeneratorChoice
from megavar.config.terms.base import TermChoice

GENERATOR_MODULE = "generator"
"""Name of the module that a run of a generator results in, in recipes, checkpoints and ``optimizer.modules``."""
TOKENIZER_MODULE = "autoencoder"
"""Name of the module that a run of a tokenizer results in."""
TEACHER_MODULE = "teacher"
"""Name of the module that a run of a teacher results in."""


@dataclass(frozen=True)
class PlannedPass:
    """A run over the trained network, as plans and utilization count it."""

    sides: tuple[int, ...] | None = None
    """Of the token maps in its sequence; None: all tokens of the image."""
    copies: int = 1
    """How often each image is in its batch: twice with guidance."""
    share: float = 1.0
    """Of the steps that have it."""
    learns: bool = True
    """Whether it has a loss; else it only runs forward."""


class RecipeChoice(Choice):
    """An algorithm; :class:`megavar.recipes.base.Recipe` is what it configures."""

    package: ClassVar[str] = "megavar.config.recipes"
    trains: ClassVar[Literal["generator", "tokenizer", "teacher"]]
    """What a run of it results in: a generator is sampled and scored, a tokenizer's reconstructions are, a teacher is
    used by terms of other runs."""

    name: str
    """Which algorithm."""

    def check(self, generator: GeneratorChoice | None) -> None:
        """Compare its keys with the generator, as the file is read.

        Raises:
            ValueError: this recipe cannot train such a generator so; the message names keys and a remedy.
        """

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that it trains, as ``Recipe.modules`` of its implementation returns them."""
        named = {"generator": GENERATOR_MODULE, "tokenizer": TOKENIZER_MODULE, "teacher": TEACHER_MODULE}
        return (named[self.trains],)

    def trained_choice(self) -> Choice | None:
        """What a run of it results in, where no section of its own says so (``generator``, ``tokenizer``)."""
        return None

    def frozen_weights(self) -> dict[str, str]:
        """Paths of the weights that are used and not trained, by what they are: they are part of a run's identity."""
        return {}

    def passes_of_step(self, sides: tuple[int, ...]) -> tuple[PlannedPass, ...]:
        """Passes of a step over the trained network, for plans and utilization.

        Args:
            sides: of the tokenizer's maps, coarse to fine; random lists of scales are counted as if they were these.
        """
        return (PlannedPass(),)

    @property
    def counted_terms(self) -> tuple[TermChoice, ...]:
        """Losses with heads and teachers that plans count."""
        return ()

    @property
    def uncounted(self) -> tuple[str, ...]:
        """What a plan leaves out of its costs, in words."""
        return ()


class GeneratorRecipeChoice(RecipeChoice):
    """An algorithm that trains a generator on the tokens of a frozen tokenizer."""

    trains: ClassVar[Literal["generator", "tokenizer", "teacher"]] = "generator"

    tokenizer_weights: PathText
    """Trained tokenizer: the directory of a megavar tokenizer run, or a file in a published layout of the tokenizer
    (for VAR's, ``vae_ch160v4096z32.pth``)."""
    terms: tuple[TermChoice, ...] = ()
    """Losses that are added to the recipe's own."""

    def frozen_weights(self) -> dict[str, str]:
        """The tokenizer, and what the terms use."""
        weights = {"tokenizer": self.tokenizer_weights}
        for term in self.terms:
            weights |= {f"{term.name}.{name}": path for name, path in term.frozen_weights().items()}
        return weights

    @property
    def counted_terms(self) -> tuple[TermChoice, ...]:
        """Those that say what their heads are."""
        return tuple(term for term in self.terms if term.counted)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Heads and teachers of the others."""
        return tuple(f"heads and teachers of the term {term.name}" for term in self.terms if not term.counted)
