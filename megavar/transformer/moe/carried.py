"""What the router of a block hands to that of the next block, across pipeline stages.

It is an input and an output of every block (``ForwardContext.carried``), so that recomputation gives its gradient, and
a slot of the payload. It stays float32, whatever type the payload has: a rounded score would choose other experts.
"""

from collections.abc import Mapping

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavar.config.experts.base import ExpertsChoice
from megavar.parallel.exact import from_rows, rows_per_token, to_rows
from megavar.parallel.payload import Slot
from megavar.transformer.sequence import SequenceLayout

_SLOT = "carried"


class Carried:
    """Packs and unpacks it; does nothing where routers hand on nothing."""

    def __init__(self, experts: ExpertsChoice | None, config: TransformerConfig) -> None:
        self.numbers = 0 if experts is None else experts.carried
        self.channels, self.dtype = config.hidden_size, config.params_dtype
        # Routers see a share of the rows under tensor parallelism, also where hidden states are not shared.
        self.sharded = config.sequence_parallel
        self.shares = 1 if self.sharded else config.tensor_model_parallel_size

    def slots(self, layout: SequenceLayout) -> list[Slot]:
        """Of the payload, for padded sequences of this layout."""
        if not self.numbers:
            return []
        rows = layout.length // self.shares * rows_per_token(self.numbers, self.channels, self.dtype)
        return [Slot(_SLOT, rows, sharded=self.sharded)]

    def pack(self, carried: Tensor | None) -> dict[str, Tensor]:
        """What goes into the slots."""
        return {} if carried is None else {_SLOT: to_rows(carried, self.channels, self.dtype)}

    def unpack(self, received: Mapping[str, Tensor]) -> Tensor | None:
        """What came in the slots."""
        return from_rows(received[_SLOT], self.numbers) if self.numbers else None
