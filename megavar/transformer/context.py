"""What the blocks of one forward pass share besides hidden states."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor

from megavar.transformer.cache import KeyValueCache
from megavar.transformer.kernels import Visibility
from megavar.transformer.sequence import SequenceLayout

T = TypeVar("T")


@dataclass
class ForwardContext:
    """Passed to every block; attention receives it in the place of Megatron-core's attention mask.

    Everything here speaks of complete sequences: L rows with the padding of ``sequence``, on every rank, also where
    sequence parallelism gives each rank a share of the hidden states.
    """

    sequence: SequenceLayout
    """The rows of this pass (while decoding, those that are new)."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines by which attention rotates queries and keys, float32 [L, R / 2] or [B, L, R / 2]: one angle for
    each of the R / 2 pairs of the R rotated channels of a head (see ``transformer/rotary.py``)."""
    valid: Tensor | None = None
    """bool [B, L], or while decoding [B, rows in the cache + L]: False marks padding of a sample (text),
    which its other tokens do not see and which routers do not count."""
    cache: KeyValueCache | None = None
    """Present while decoding."""
    seed: int = 0
    """Of dropout and drop path."""
    sample_keys: Tensor | None = None
    """int64 [B]: identifies (epoch, sample) for dropout and drop path; None disables them."""
    balance: float = 1.0
    """Multiplies the coefficient of the routers' balance loss in this pass."""
    counted: Tensor | None = None
    """bool [B]: samples that routing statistics count (the conditional half under guidance); None counts all."""
    routing: "list[RoutingRecord] | None" = None
    """Collects one record per mixture-of-experts layer."""
    carried: Tensor | None = None
    """What the router of the block before handed on (``ExpertsChoice.carried``), float32 [rows that routers of this
    rank see, B, N]; each router reads it and leaves its own. None before the first block."""

    prepared: dict[str, Tensor] = field(default_factory=dict)
    """What the parts of one block have made for its pass before it is computed (``BlockSpec``)."""

    _visibility: Visibility | None = field(init=False, default=None)
    _made: dict[str, Any] = field(init=False, default_factory=dict)

    @property
    def visibility(self) -> Visibility:
        """Which rows see which; made once, with its masks, for all blocks."""
        if self._visibility is None or self._visibility.valid is not self.valid:
            self._visibility = Visibility(self.sequence, self.valid)
        return self._visibility

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What all blocks of a pass share under a name; the first one that asks makes it."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def of_block(self) -> "ForwardContext":
        """The same context for one block, which prepares and records for itself."""
        visibility = self.visibility  # before the copy: all blocks share its masks
        other = copy(self)
        other._visibility, other.prepared = visibility, {}
        other.routing = None if self.routing is None else []
        return other

    def silent(self) -> "ForwardContext":
        """The same context for a recomputation, which must not be recorded twice."""
        other = copy(self)  # shares the masks that were made and the numbers that were drawn
        other.routing = None
        return other

    def kind_index(self, device: torch.device) -> Tensor:
        """Kind of each row's segment, int64 [L]; negative for rows of padding."""
        return self.once("kinds", lambda: self.sequence.kind_index(device))

    def counted_rows(self, device: torch.device) -> Tensor:
        """Rows that are no padding, bool [L, 1 or B]."""
        return self.once("counted", lambda: self._counted_rows(device))

    def _counted_rows(self, device: torch.device) -> Tensor:
        counted = (self.kind_index(device) >= 0)[:, None]
        if self.valid is not None:
            counted = counted & self.valid[:, -self.sequence.length :].t()
        return counted

    def first_row(self, rows: int) -> int:
        """Number of the first of this rank's ``rows`` rows of the sequence."""
        if rows == self.sequence.length:
            return 0
        assert rows * parallel_state.get_tensor_model_parallel_world_size() == self.sequence.length
        return rows * parallel_state.get_tensor_model_parallel_rank()


@dataclass
class RoutingRecord:
    """What one mixture-of-experts layer did in one pass; no gradient, no host synchronization."""

    load: Tensor
    """float32 [K, M]: tokens of each kind of segment assigned to each target (this rank's tokens)."""
    balance: Tensor
    """float32 scalar: Eq. 10, averaged over this rank's images."""
    met: Tensor | None = None
    """float32 [K, E + 1]: tokens of each kind that met 0, 1 ... E experts; None where all meet the same number."""
    block: int = -1
    """Number of the block, which writes it here: the same compiled graph serves all blocks."""
