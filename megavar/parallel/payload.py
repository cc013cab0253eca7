"""What pipeline stages hand to each other: named tensors in one.

Megatron-core's schedules move one tensor [rows, B, C] between two stages, of a length that they are told beforehand.
A stage has more to say: hidden states, conditions that the blocks of every stage need, outputs that a loss on the last
stage reads. Each gets a *slot* of rows under a name. All stages derive the same slots from the inputs of the step, so
the length may change with them (another list of scales, another length of text) from one step to the next.

Under sequence parallelism a slot is either *sharded* (each tensor-parallel rank holds and sends its share of the rows:
hidden states) or *replicated* (each sends all of them to its counterpart: a condition per image). What every stage can
compute from its own copy of the inputs (positions, masks, rotary tables) does not travel.

Shapes: rows x B x C; B images of the micro-batch, C the model's width, the same for all slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Rows of the packed tensor under a name."""

    name: str
    rows: int
    """Of the complete tensor, on however many ranks."""
    sharded: bool = False
    """Whether tensor-parallel ranks hold equal shares of the rows under sequence parallelism."""


class Payload:
    """The slots of one pass, in the order in which they are packed."""

    def __init__(self, slots: Sequence[Slot], shares: int = 1) -> None:
        """``shares``: tensor-parallel size under sequence parallelism, else 1."""
        names = [slot.name for slot in slots]
        assert len(set(names)) == len(names), f"slots of the same name: {names}"
        for slot in slots:
            assert not slot.sharded or slot.rows % shares == 0, f"{slot} cannot be shared by {shares} ranks"
        self._sizes = {slot.name: slot.rows // shares if slot.sharded else slot.rows for slot in slots}
        self._shares = shares

    @property
    def rows(self) -> int:
        """Rows that this rank sends."""
        return sum(self._sizes.values())

    @property
    def length(self) -> int:
        """The sequence length to announce to the schedules, which divide it under sequence parallelism."""
        return self.rows * self._shares

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One tensor [rows, B, C] of this rank's parts.

        Args:
            tensors: [rows of the slot, B, C] by name. A slot without one is sent as zeros: a later stage fills it.
        """
        unknown = tensors.keys() - self._sizes.keys()
        assert not unknown, f"no slot for {sorted(unknown)}: a payload of {list(self._sizes)}"
        like = next(iter(tensors.values()))
        parts = []
        for name, rows in self._sizes.items():
            part = tensors.get(name)
            if part is None:
                part = like.new_zeros(rows, *like.shape[1:])
            assert part.shape[0] == rows, f"slot {name!r} holds {rows} rows, not {part.shape[0]}"
            parts.append(part)
        return torch.cat(parts)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Undo :meth:`pack`: views of the parts by name, zeros where nothing was given."""
        assert packed.shape[0] == self.rows, (
            f"received {packed.shape[0]} rows where these inputs make {self.rows}: "
            f"the stages were given inputs of different lengths"
        )
        return dict(zip(self._sizes, packed.split(list(self._sizes.values()))))
