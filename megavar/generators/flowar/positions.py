"""Where the tokens of FlowAR's maps stand: rows of learned tables, and angles on a plane."""

import torch
from torch import Tensor, nn

from megavar.transformer.rotary import Table, plane_table


class LearnedPositions(nn.Module):
    """A table with a row for each token of all scales, one scale after the other."""

    def __init__(self, scales: tuple[int, ...], width: int, dtype: torch.dtype, *, partial: bool = False) -> None:
        """``partial``: tensor-parallel ranks add the table to different rows, and their gradients are summed."""
        super().__init__()
        self.sizes = [side * side for side in scales]
        self.table = nn.Parameter(torch.empty(sum(self.sizes), width, dtype=dtype))
        self.table.sequence_parallel = partial  # type: ignore[attr-defined]

    def forward(self, scales: tuple[int, ...]) -> Tensor:
        """Rows of the scales of these numbers, [tokens of these scales, C]."""
        if scales == tuple(range(len(self.sizes))):
            return self.table
        parts = self.table.split(self.sizes)
        return torch.cat([parts[number] for number in scales])


def rotary_table(sides: tuple[int, ...], span: int, channels: int, device: torch.device) -> Table:
    """Angles of square maps that all cover a square of side ``span`` (``rope.py``).

    Args:
        channels: of a head, a multiple of 4.
    """
    rows, columns = [], []
    for side in sides:
        places = torch.arange(side, device=device) * (span / side)
        rows.append(places.repeat_interleave(side))
        columns.append(places.repeat(side))
    return plane_table(torch.cat(rows), torch.cat(columns), channels)
