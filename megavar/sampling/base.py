"""What a decoding procedure is: from conditions and noise to the tokens of images.

To add one, write a class with :meth:`Procedure.draw` whose constructor takes its configuration section, and a
``SamplingChoice`` that names it (``sampling: {procedure: ...}``). It may demand more of the generator than
:class:`megavar.generators.base.Generator` offers to all, and more of the tokenizer than
:class:`megavar.tokenizers.base.Tokenizer`: it says so by a protocol of its own, as :mod:`.procedures.next_scale` does.
Guidance, truncation and the draw itself are in :mod:`.guidance`, :mod:`.filters` and :mod:`.noise`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.sampling.noise import Noise


class Procedure(Protocol):
    """Draws the tokens of B samples.

    A sample may depend on its own condition and noise only: neither on the other samples of the batch nor on
    ``torch``'s generators. There should be no synchronization with the device per step.

    A class may name in ``repeated`` those of its methods that draw runs often and whose work follows from the shapes of
    their tensors alone, such as the flow to one token: a plan counts each shape once.
    """

    def draw(self, generator: Any, tokenizer: Any, condition: Condition, noise: Noise | None) -> Tensor:
        """Draw.

        Args:
            generator: the whole model on one rank, in evaluation mode.
            tokenizer: frozen; it embeds what was drawn where the generator reads code vectors.
            condition: of the B samples.
            noise: of the B samples; None takes the most likely tokens (greedy).

        Returns:
            int64 [B, L] ids, or float32 [B, L, C] vectors of a continuous tokenizer.

        Raises:
            ConfigError: generator or tokenizer cannot be decoded by this procedure.
        """
        ...


class Known(NamedTuple):
    """Tokens of B samples that are not drawn."""

    ids: Tensor
    """int64 [B, L]."""
    given: Tensor
    """bool [B, L]: which of ``ids`` are known."""

    def put(self, drawn: Tensor, first: int) -> Tensor:
        """``drawn`` [B, n], the tokens from place ``first`` on, with those that are known in their places."""
        places = slice(first, first + drawn.shape[1])
        return torch.where(self.given[:, places], self.ids[:, places], drawn)


@runtime_checkable
class Completing(Procedure, Protocol):
    """A procedure that can draw the rest of sequences of which some tokens are known."""

    def complete(
        self, generator: Any, tokenizer: Any, condition: Condition, noise: Noise | None, known: Known | None
    ) -> Tensor:
        """As :meth:`Procedure.draw`; a token that is known is what later ones are drawn after, and is returned."""
        ...


class DrawnScale(NamedTuple):
    """One step of a procedure that draws token map after token map."""

    ids: Tensor
    """int64 [B, L_k]."""
    logits: Tensor
    """Guided logits before temperature and truncation, float32 [B, L_k, V]."""
    state: Any
    """The tokenizer's, after it took in the ids."""


class DrawnVectors(Protocol):
    """One step of a procedure that draws map after map of vectors."""

    @property
    def tokens(self) -> Tensor:
        """float32 [B, L_k, C]."""
        ...


@runtime_checkable
class FlowByScale(Protocol):
    """A procedure that draws map after map of vectors, each after maps that may be others than those drawn."""

    def flow(self, generator: Any, begin: Tensor, told: Tensor, scale: int, guidance: float) -> Tensor:
        """From noise to the tokens of a scale, float32 [B, L_k, C]."""
        ...

    def steps(
        self, generator: Any, tokenizer: Any, condition: Condition, noise: Noise | None, followed: Sequence[Tensor] = ()
    ) -> Iterator[DrawnVectors]:
        """The scales one by one; ``followed``: maps [B, L_k, C] of the first ones that later ones are drawn after."""
        ...


@runtime_checkable
class ScaleByScale(Protocol):
    """A procedure that draws token map after token map, and can go on from given ones."""

    def steps(
        self, generator: Any, tokenizer: Any, condition: Condition, noise: Noise | None, given: Sequence[Tensor] = ()
    ) -> Iterator[DrawnScale]:
        """The scales one by one; ``given``: ids [B, L_k] of the first ones, taken as they are."""
        ...

    def choose(self, logits: Tensor, side: int, uniform: Tensor | None) -> Tensor:
        """Ids [B, L_k] of a scale of this side from its guided logits [B, L_k, V]."""
        ...
