"""What the passes of a step cost, measured on the real generator at the very maps that each pass runs over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megavar.config.generators.base import GeneratorChoice
from megavar.config.recipes.base import PlannedPass, RecipeChoice
from megavar.config.token_space import TokenSpace
from megavar.planning.measure import Request, measure


@dataclass(frozen=True)
class Work:
    """A step in units of one pass over all tokens of its images."""

    trained: float = 1.0
    """Operations of the passes with a loss over those of such a unit, forward and backward."""
    rolled_out: float = 0.0
    """Operations of the others over those of a unit forward."""
    trained_tokens: float = 1.0
    """Tokens that the former move between ranks."""
    rolled_out_tokens: float = 0.0
    """Tokens that the latter move."""
    launched: float = 1.0
    """Times that every kernel is launched, however few tokens it gets, over once forward and backward."""
    largest: float = 1.0
    """Tokens of the fullest pass with a loss, which decides what is kept for a backward pass."""


def work_of(recipe: RecipeChoice, generator: GeneratorChoice, space: TokenSpace) -> Work:
    """The work of a step of ``recipe``; a pass at some maps costs what the generator costs that has only these.

    Raises:
        UnmeasurableError: the generator's code needs values.
    """
    passes = recipe.passes_of_step(space.sides)
    learning, free = [one for one in passes if one.learns], [one for one in passes if not one.learns]
    tokens = {one: _part(space, one).length / space.length for one in passes}
    trained = rolled_out = tokens
    if any(one.sides is not None for one in passes):  # measuring takes seconds
        whole, *parts = measure([Request(generator, space), *(Request(generator, _part(space, one)) for one in passes)])
        trained = {one: part.model_flops / whole.model_flops for one, part in zip(passes, parts)}
        rolled_out = {one: part.forward_flops / whole.forward_flops for one, part in zip(passes, parts)}
    return Work(
        trained=_total(learning, trained),
        rolled_out=_total(free, rolled_out),
        trained_tokens=_total(learning, tokens),
        rolled_out_tokens=_total(free, tokens),
        launched=sum(one.share if one.learns else one.share / 3 for one in passes),
        largest=max(one.copies * tokens[one] for one in learning),
    )


def _total(passes: Sequence[PlannedPass], sizes: Mapping[PlannedPass, float]) -> float:
    return sum(one.copies * one.share * sizes[one] for one in passes)


def _part(space: TokenSpace, one: PlannedPass) -> TokenSpace:
    if one.sides is None:
        return space
    return replace(space, sides=one.sides, length=sum(side * side for side in one.sides))
