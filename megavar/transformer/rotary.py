"""Rotary positions (Su et al. 2021): pairs of channels of queries and keys turn by angles of their position.

A table is a pair (cosines, sines), float32 [L, R / 2] or [B, L, R / 2]: one angle for each pair of the first R channels
of a head; the other channels stay as they are. Tables may hold any numbers: a row of zeros erases queries and keys
(AliTok's condition token).
"""

from typing import Literal

import torch
from torch import Tensor

Pairs = Literal["half", "interleaved"]
"""Which channels form pair i of R / 2: ``half``: i and i + R / 2 (Llama and Qwen of Hugging Face); ``interleaved``: 2 i
and 2 i + 1 (Meta's Llama, AliTok, FlowAR)."""
Table = tuple[Tensor, Tensor]


def frequencies(channels: int, base: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Angle per unit of position of each of ``channels`` / 2 pairs: base^(-2 i / channels), float32."""
    return base ** -(torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)


def line_table(positions: Tensor, channels: int, base: float = 10000.0) -> Table:
    """Table for positions on a line.

    Args:
        positions: [L] or [B, L].
        channels: R, channels of a head that turn.
    """
    angles = positions.float()[..., None] * frequencies(channels, base, positions.device)
    return angles.cos(), angles.sin()


def plane_table(rows: Tensor, columns: Tensor, channels: int, base: float = 10000.0) -> Table:
    """Table for positions on a plane: the first half of the pairs turns with the row, the second with the column.

    Args:
        rows, columns: [L] or [B, L].
        channels: R, a multiple of 4.
    """
    tables = [line_table(positions, channels // 2, base) for positions in (rows, columns)]
    (row_cos, row_sin), (column_cos, column_sin) = tables
    return torch.cat([row_cos, column_cos], -1), torch.cat([row_sin, column_sin], -1)


def sectioned_table(positions: Tensor, sections: tuple[int, ...], base: float = 10000.0) -> Table:
    """Table for several positions per token: the first pairs turn with the first position, and so on (Qwen2.5-VL).

    Pairs have the frequencies that they have in :func:`line_table`, so that equal positions make the same table.

    Args:
        positions: [N, B, L].
        sections: pairs that turn with each of the N positions.
    """
    tables = [line_table(position, 2 * sum(sections), base) for position in positions]
    parts = [[part.split(sections, -1)[number] for part in table] for number, table in enumerate(tables)]
    return torch.cat([cos for cos, _ in parts], -1), torch.cat([sin for _, sin in parts], -1)


def rotate(heads: Tensor, table: Table, pairs: Pairs) -> Tensor:
    """Turn the pairs of every head, in float32.

    Args:
        heads: [L, B, H, D].
        table: cosines and sines of the L rows.

    Returns:
        [L, B, H, D] in the type of ``heads``.
    """
    cos, sin = (_by_row(part) for part in table)
    turned = 2 * cos.shape[-1]
    x = heads[..., :turned].float()
    first, second = x.chunk(2, -1) if pairs == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
    parts = first * cos - second * sin, second * cos + first * sin
    x = torch.cat(parts, -1) if pairs == "half" else torch.stack(parts, -1).flatten(-2)
    x = x.to(heads.dtype)
    return x if turned == heads.shape[-1] else torch.cat([x, heads[..., turned:]], -1)


def _by_row(part: Tensor) -> Tensor:
    """[L, R / 2] or [B, L, R / 2] -> [L, 1 or B, 1, R / 2]."""
    return (part[:, None] if part.dim() == 2 else part.transpose(0, 1)).unsqueeze(2)
