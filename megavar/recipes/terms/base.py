"""What a term is: a loss on hidden states of a generator that combines with any recipe (semantic guidance, REPA, ...).

    class Mine:                                                                           # a Term
        name, weight, taps = "mine", 0.5, ()
        def head(self, space): return Head(("block.8",), lambda width: nn.Linear(width, 768))
        def prepare(self, batch, inputs): return self.teacher(batch.require_images())     # [B, L, 768], no gradient
        def loss(self, tapped, output, targets):
            distance = 1 - cosine_similarity(output, targets, dim=-1)                     # [B, L]
            return Losses(distance.mean(1).sum())                                         # summed over images

A head lives on the generator's engine, as ``heads.<term>``: one backward, one gradient norm, checkpoints and moving
averages for nothing; exports leave it out. A term whose choice says ``counted`` has a class method ``head_of(choice,
generator, space)``, too: its head from configurations alone, so that plans count it without loading a teacher.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from megavar.config.terms.base import TermChoice
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput, Head
from megavar.recipes.base import Losses, Parts


class Term(Protocol):
    """A loss that a recipe adds to its own."""

    @classmethod
    def build(cls, choice: TermChoice, parts: Parts) -> "Term":
        """The term that a section of ``recipe.terms`` describes, with its frozen networks on ``parts.device``."""
        ...

    @property
    def name(self) -> str:
        """Its name in configurations and metrics, and its head's."""
        ...

    @property
    def weight(self) -> float:
        """Its share in the total loss."""
        ...

    @property
    def taps(self) -> tuple[str, ...]:
        """Hidden states that its loss reads itself: ``"embedding"``, ``"block.0"``, ..."""
        ...

    def head(self, space: TokenSpace) -> Head | None:
        """What is trained with the generator for this term alone, and the hidden states that it reads.

        Args:
            space: tokens that the generator predicts.
        """
        ...

    def prepare(self, batch: Batch, inputs: Any) -> Any:
        """Targets of a micro-batch, without gradient (a teacher's features, code vectors).

        Args:
            inputs: what the recipe prepared for the generator.
        """
        ...

    def loss(self, tapped: dict[str, Tensor], output: Any, targets: Any) -> Losses:
        """Compare.

        Args:
            tapped: hidden states [B, L, C] by the name of their tap.
            output: what the head returned, None without one.
            targets: from :meth:`prepare`.

        Returns:
            sums over the *images* of the micro-batch, whatever the recipe counts.
        """
        ...


def taps_of(terms: Sequence[Term]) -> tuple[str, ...]:
    """All taps that the losses of ``terms`` read, each once."""
    return tuple(dict.fromkeys(tap for term in terms for tap in term.taps))


def heads_of(terms: Sequence[Term], space: TokenSpace) -> dict[str, Head]:
    """The heads of ``terms`` by the name of their term."""
    found = {term.name: term.head(space) for term in terms}
    return {name: head for name, head in found.items() if head is not None}


def prepare_terms(terms: Sequence[Term], batch: Batch, inputs: Any) -> dict[str, Any]:
    """Targets of all terms by name."""
    return {term.name: term.prepare(batch, inputs) for term in terms}


def add_terms(
    losses: Losses, terms: Sequence[Term], output: GeneratorOutput, targets: dict[str, Any], images: int
) -> Losses:
    """``losses`` of a micro-batch of ``images`` images with those of the terms, as ``loss/<term>`` among the metrics.

    Args:
        output: of the generator, which has the terms' taps and heads.
        targets: from :func:`prepare_terms`.
    """
    means, statistics, per_image = dict(losses.means), dict(losses.statistics), losses.per_image
    for term in terms:
        tapped = {tap: output.taps[tap] for tap in term.taps}
        more = term.loss(tapped, output.heads.get(term.name), targets[term.name])
        weighted = term.weight * more.total
        per_image = weighted if per_image is None else per_image + weighted
        means[f"loss/{term.name}"] = (more.total.detach(), images)
        means |= {f"{term.name}/{name}": (value, images) for name, value in more.named.items()}
        means |= {f"{term.name}/{name}": pair for name, pair in more.means.items()}
        statistics |= {f"{term.name}/{name}": value for name, value in more.statistics.items()}
    return replace(losses, means=means, statistics=statistics, per_image=per_image)
