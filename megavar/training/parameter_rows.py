"""Replacing rows of a trained parameter between steps, wherever DeepSpeed keeps them (dead codes of a codebook)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megavar.training.checkpoint.master import holdings, master_tensors, refresh_module
from megavar.training.engine import Engine


@torch.no_grad()
def write_rows(
    engines: Iterable[Engine], parameter: Tensor, rows: Tensor, values: Tensor, moves: Tensor | None = None
) -> None:
    """Move rows of ``parameter`` in the float32 master weights and in the module. Collective.

    Writing into the module alone would be undone by the next step, which copies the master weights over it. Moments are
    left as they are.

    Args:
        engines: one of them trains ``parameter``.
        parameter: shape [n, ...], the same object as in that engine's module.
        rows: int64 [m], equal on all ranks.
        values: [m, ...], equal on all ranks.
        moves: float32 [m] in [0, 1], equal on all ranks: how far the rows go towards ``values``; by default 1. Moves
            start from the master weights: those of the module may be rounded.
    """
    for engine in engines:
        for held, (_, candidate) in zip(holdings(engine.deepspeed), engine.module.named_parameters(), strict=True):
            if candidate is not parameter:
                continue
            assert held.trained, f"{held.name} is frozen"
            if held.piece is not None:
                row_size = values[0].numel()
                places = rows[:, None] * row_size + torch.arange(row_size, device=rows.device)
                places = places.flatten() - held.piece.start
                inside = (places >= 0) & (places < held.piece.numel)
                master = held.piece.of(master_tensors(engine.deepspeed))
                places = places[inside].to(master.device)  # an offloaded optimizer's weights lie elsewhere
                targets = values.flatten()[inside].to(master)
                if moves is not None:
                    share = moves.repeat_interleave(row_size)[inside].to(master)
                    targets = torch.lerp(master[places], targets, share)
                master[places] = targets
            refresh_module(engine.deepspeed)
            return
    raise AssertionError("no engine trains this parameter")
