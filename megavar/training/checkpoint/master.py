"""Where DeepSpeed keeps the float32 master weights and optimizer states of each parameter on this rank.

Every DeepSpeed optimizer cuts and flattens parameters its own way. This file gives one picture of all of them: a list
of *master tensors*, the very tensors that torch's AdamW steps on this rank, and for every parameter the *piece* of it
that this rank holds and where. Moments, and an exponential moving average if there is one, are lists of tensors shaped
like the master tensors, so one description serves all.

==============================  ====================================================================
ZeRO-0 (float32)                the optimizer steps the parameters themselves, whole on every rank
ZeRO-1/2, ``BF16_Optimizer``    one flat partition per parameter group; ``_hp_mapping`` says what is in it
ZeRO-3                          one flat partition per sub-group; every parameter cut evenly and padded
==============================  ====================================================================
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """The part of one parameter's master values that this rank holds."""

    index: int
    """Which master tensor."""
    offset: int
    """First element of the piece in that (flattened) master tensor."""
    start: int
    """First element of the piece in the flattened parameter."""
    numel: int

    def of(self, tensors: list[Tensor]) -> Tensor:
        """The piece of a list of tensors shaped like the master tensors: a flat view."""
        return tensors[self.index].detach().view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Holding:
    """One parameter of this rank's module, who shares it, and this rank's piece."""

    name: str
    """Name of the local parameter."""
    shape: tuple[int, ...]
    """Its local shape."""
    group: dist.ProcessGroup
    """The data-parallel ranks whose pieces make up the parameter."""
    replicated: bool
    """Whether every rank of ``group`` holds the whole."""
    piece: Piece | None
    """None where other ranks hold all of it. Its index counts within :func:`weight_tensors`."""
    trained: bool = True
    """False for frozen parameters, which have no moments."""


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def master_tensors(engine: Any) -> list[Tensor]:
    """The float32 tensors that the optimizer of ``engine`` steps on this rank, in a fixed order.

    Flat partitions under ZeRO (with padding in them), tensors shaped like the parameters without.
    """
    optimizer = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    assert isinstance(optimizer, torch.optim.Optimizer), f"unknown DeepSpeed optimizer {type(optimizer).__name__}"
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _frozen_tensors(engine: Any) -> list[Tensor]:
    return [getattr(p, "ds_tensor", p) for p in engine.module.parameters() if not p.requires_grad]


def weight_tensors(engine: Any) -> list[Tensor]:
    """:func:`master_tensors`, then what this rank holds of each frozen parameter."""
    return master_tensors(engine) + _frozen_tensors(engine)


def holdings(engine: Any) -> list[Holding]:
    """One :class:`Holding` per parameter of ``engine``, in the order of ``named_parameters``.

    Equal on all ranks of a parameter's group except for ``piece``.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        find = _zero3_pieces(optimizer)
    elif hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_groups_flat_partition"):
        find = _flat_pieces
    else:
        find = _whole_pieces(engine)
    result, frozen = [], len(master_tensors(engine))
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            result.append(find(name, parameter))
        else:
            result.append(_frozen_holding(name, parameter, frozen))
            frozen += 1
    return result


def _frozen_holding(name: str, parameter: nn.Parameter, index: int) -> Holding:
    p: Any = parameter
    if not hasattr(p, "ds_tensor"):
        return Holding(name, tuple(p.shape), _data_group(p), True, Piece(index, 0, 0, p.numel()), trained=False)
    start = p.ds_tensor.ds_numel * dist.get_rank(p.ds_process_group)
    numel = min(p.ds_tensor.ds_numel, p.ds_numel - start)
    piece = Piece(index, 0, start, numel) if numel > 0 else None
    return Holding(name, tuple(p.ds_shape), p.ds_process_group, False, piece, trained=False)


def _data_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    from megatron.core import parallel_state

    is_expert = getattr(parameter, "allreduce", True) is False  # Megatron-core's mark of expert parameters
    if is_expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group()


def _zero3_pieces(optimizer: Any) -> Any:
    assert not optimizer.swap_optimizer, "optimizer states on NVMe are not supported"

    def find(name: str, parameter: nn.Parameter) -> Holding:
        p: Any = parameter
        index, offset, numel = optimizer.grad_position[optimizer.get_param_id(p)]
        start = numel * dist.get_rank(p.ds_process_group)
        numel = min(numel, p.ds_numel - start)  # the last ranks hold padding: set_full_hp_param reads past the end here
        piece = Piece(index, offset, start, numel) if numel > 0 else None
        return Holding(name, tuple(p.ds_shape), p.ds_process_group, False, piece)

    return find


def _flat_pieces(name: str, parameter: nn.Parameter) -> Holding:
    p: Any = parameter
    piece = None
    if p._hp_mapping is not None:
        module_side, master_side = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
        piece = Piece(p._hp_mapping.param_group_index, master_side.start, module_side.start, module_side.numel)
    return Holding(name, tuple(p.shape), p._dp_group, False, piece)


def _whole_pieces(engine: Any) -> Any:
    index = {id(parameter): i for i, parameter in enumerate(master_tensors(engine))}

    def find(name: str, parameter: nn.Parameter) -> Holding:
        shape = tuple(parameter.shape)
        return Holding(name, shape, _data_group(parameter), True, Piece(index[id(parameter)], 0, 0, parameter.numel()))

    return find


def moments(engine: Any) -> dict[str, list[Tensor]]:
    """First and second moments by AdamW's names, lists shaped like :func:`master_tensors`.

    Before the first step AdamW has none; they are created as zeros, which is what its first step would do.
    """
    inner = _inner(engine.optimizer)
    assert isinstance(inner, torch.optim.AdamW), f"checkpoints know torch's AdamW, not {type(inner).__name__}"
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    tensors = master_tensors(engine)
    for tensor in tensors:
        state = inner.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if on_device else "cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(tensor.detach(), memory_format=torch.preserve_format)
    return {name: [inner.state[tensor][name] for tensor in tensors] for name in MOMENTS}


def get_steps(engine: Any) -> list[int]:
    """AdamW's step count of every master tensor. Call :func:`moments` first."""
    inner = _inner(engine.optimizer)
    return [int(inner.state[tensor]["step"]) for tensor in master_tensors(engine)]


def set_step(engine: Any, index: int, step: int) -> None:
    """Set AdamW's step count of one master tensor. Call :func:`moments` first."""
    _inner(engine.optimizer).state[master_tensors(engine)[index]]["step"].fill_(step)


@torch.no_grad()
def refresh_module(engine: Any) -> None:
    """Copy the master tensors into the module's weights on every rank. Collective over the data-parallel group."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()  # releases gathered parameters
        for weights, master in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat):
            weights.data.copy_(master.data)
        optimizer.checkpoint_event_epilogue()  # gathers those that always stay gathered
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


@contextmanager
def exchanged(engine: Any, tensors: list[Tensor]) -> Iterator[None]:
    """Run a block with the module's weights taken from ``tensors`` (shaped like the master tensors): an EMA.

    Collective; the master tensors are back, bit for bit, when the block ends. Do not step the optimizer inside.
    """

    def swap() -> None:
        for master, other in zip(master_tensors(engine), tensors, strict=True):
            kept = master.detach().clone()
            master.data.copy_(other)
            other.copy_(kept)
        refresh_module(engine)

    with torch.no_grad():
        swap()
    try:
        yield
    finally:
        with torch.no_grad():
            swap()
