"""What of one trained module goes into a checkpoint, under names and shapes that no layout can be read off.

Keys are ``<module>/<kind>/<logical name>`` with the kinds ``weight`` (float32 master values), ``exp_avg``,
``exp_avg_sq``, ``average`` (exponential moving average of the weights) and ``buffer``. Tensor-parallel shards are
DTensors on the tensor-parallel mesh, so that torch's distributed checkpoint stores one tensor and can cut it anew.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from megavar.parallel.logical import LogicalTensor, logical_tensors
from megavar.training.checkpoint import master
from megavar.training.checkpoint.manifest import ModuleEntry
from megavar.training.checkpoint.ranks import Ranks
from megavar.training.checkpoint.tensors import Bucket, gather, make_buckets, spread

WEIGHT, AVERAGE, BUFFER = "weight", "average", "buffer"


@dataclass(frozen=True)
class ModuleState:
    """A trained module as checkpoints see it."""

    engine: Any
    """The DeepSpeed engine around the module."""
    average: list[Tensor] | None = None
    """Exponential moving average of the weights: tensors shaped like ``master_tensors(engine)``, or None."""


def key(module: str, kind: str, name: str) -> str:
    """Key of one tensor in the checkpoint."""
    return f"{module}/{kind}/{name}"


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state of ``module``, by layout-independent name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for _, chunk in _chunks(module)
        for prefix, child in chunk.named_modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and name not in child._non_persistent_buffers_set
    }


_meshes: dict[int, DeviceMesh] = {}


def as_stored(tensor: LogicalTensor, local: Tensor) -> Tensor:
    """Wrap this rank's part of a logical tensor so that the distributed checkpoint knows what part it is."""
    if tensor.sharded_dimension is None:
        return local
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    if id(group) not in _meshes:
        _meshes[id(group)] = DeviceMesh.from_group(group, "cpu")
    return DTensor.from_local(local, _meshes[id(group)], [Shard(tensor.sharded_dimension)], run_check=False)


def tensor_place() -> tuple[int, int]:
    """This rank's place among its tensor-parallel ranks, and their number."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def to_local(value: Tensor) -> Tensor:
    """The inverse of :func:`as_stored`."""
    return value.to_local() if isinstance(value, DTensor) else value


def logical_by_parameter(module: nn.Module) -> dict[str, list[LogicalTensor]]:
    """Logical tensors of each parameter by its local name. A ``ModuleList`` holds the chunks of virtual stages."""
    result: dict[str, list[LogicalTensor]] = {}
    for prefix, chunk in _chunks(module):
        for tensor in logical_tensors(chunk):
            result.setdefault(prefix + tensor.parameter, []).append(tensor)
    return result


def _chunks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList):
        return [(f"{index}.", chunk) for index, chunk in enumerate(module)]
    return [("", module)]


def _kinds(state: ModuleState) -> dict[str, list[Tensor]]:
    kinds = {WEIGHT: master.weight_tensors(state.engine), **master.moments(state.engine)}
    return kinds | ({AVERAGE: state.average} if state.average is not None else {})


def _buckets(state: ModuleState) -> tuple[list[Bucket], list[Bucket]]:
    """Buckets of all parameters (for weights) and of the trained ones (for everything else)."""
    holdings = master.holdings(state.engine)
    trained = [holding for holding in holdings if holding.trained]
    every = make_buckets(holdings)
    return every, every if len(trained) == len(holdings) else make_buckets(trained)


def stage(name: str, state: ModuleState) -> dict[str, Tensor]:
    """CPU copies of what this rank is going to write of module ``name``. Collective."""
    names = logical_by_parameter(state.engine.module)
    every, trained = _buckets(state)
    result: dict[str, Tensor] = {}
    for kind, tensors in _kinds(state).items():
        whole = gather(every if kind == WEIGHT else trained, tensors, state.engine.device)
        for parameter, value in whole.items():
            for logical in names[parameter]:
                result[key(name, kind, logical.name)] = as_stored(logical, logical.local(value))
    if _is_first_replica():
        for buffer_name, buffer in persistent_buffers(state.engine.module).items():
            result[key(name, BUFFER, buffer_name)] = buffer.detach().cpu().clone()
    return result


def _is_first_replica() -> bool:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank() == 0


def describe(state: ModuleState, ranks: Ranks) -> ModuleEntry:
    """What the manifest says about a module: shapes, buffers, step counts; equal on every rank. Collective."""
    names = logical_by_parameter(state.engine.module)
    master.moments(state.engine)
    all_steps = master.get_steps(state.engine)
    tensors, steps = {}, {}
    for holding in master.holdings(state.engine):
        if dist.get_rank(holding.group) == 0:
            tensors.update({logical.name: list(logical.shape) for logical in names[holding.name]})
        if holding.trained and holding.piece is not None and holding.piece.start == 0:
            steps.update({logical.name: all_steps[holding.piece.index] for logical in names[holding.name]})
    step = max(ranks.gather(max(all_steps, default=0)))
    exceptions = {name: count for name, count in steps.items() if count != step}
    buffers = sorted(persistent_buffers(state.engine.module)) if _is_first_replica() else []
    merged_tensors: dict[str, list[int]] = {}
    merged_exceptions: dict[str, int] = {}
    merged_buffers: set[str] = set()
    for other_tensors, other_exceptions, other_buffers in ranks.gather((tensors, exceptions, buffers)):
        merged_tensors |= other_tensors
        merged_exceptions |= other_exceptions
        merged_buffers |= set(other_buffers)
    return ModuleEntry(
        tensors=dict(sorted(merged_tensors.items())),
        step=step,
        step_exceptions=dict(sorted(merged_exceptions.items())),
        buffers=sorted(merged_buffers),
        has_average=state.average is not None,
    )


class Restorer:
    """Puts one module of a checkpoint into an engine, whatever layout wrote it and whatever layout reads it.

    ``templates`` are filled by the reader between construction and :meth:`finish`, so that no rank writes into the
    engine before all ranks have read what they need.
    """

    def __init__(self, name: str, state: ModuleState, entry: ModuleEntry) -> None:
        self.name, self.state, self.entry = name, state, entry
        self._names = logical_by_parameter(state.engine.module)
        self._every, self._trained = _buckets(state)
        self._stored_kinds = {WEIGHT} | ({AVERAGE} if entry.has_average else set())
        self._stored_kinds |= set(master.MOMENTS) if entry.has_moments else set()
        self._whole: dict[str, dict[str, Tensor]] = {}
        self.templates: dict[str, Tensor] = {}
        """What this rank has to read, by key."""
        for kind in self._stored_kinds & set(_kinds(state)):
            self._whole[kind] = {}
            for bucket in self._buckets_of(kind):
                for holding in bucket.holdings if bucket.owned else ():
                    value = torch.empty(holding.shape, dtype=torch.float32)
                    self._whole[kind][holding.name] = value
                    for logical in self._names[holding.name]:
                        self.templates[key(name, kind, logical.name)] = as_stored(logical, logical.local(value))
        self._buffers = persistent_buffers(state.engine.module)
        for buffer_name in set(self._buffers) & set(entry.buffers):
            template = torch.empty_like(self._buffers[buffer_name], device="cpu")
            self.templates[key(name, BUFFER, buffer_name)] = template

    def _buckets_of(self, kind: str) -> list[Bucket]:
        return self._every if kind == WEIGHT else self._trained

    @torch.no_grad()
    def finish(self) -> None:
        """Copy what was read into master weights, moments, average, buffers and the module itself. Collective."""
        engine = self.state.engine
        for kind, tensors in _kinds(self.state).items():
            if kind in self._stored_kinds:
                spread(self._buckets_of(kind), self._whole.pop(kind), tensors, engine.device)
            elif kind in master.MOMENTS:
                torch._foreach_zero_(tensors)
        if self.state.average is not None and not self.entry.has_average:  # averaging was switched on: start here
            for average, weight in zip(self.state.average, master.master_tensors(engine), strict=True):
                average.copy_(weight)
        self._restore_steps()
        for buffer_name, buffer in self._buffers.items():
            stored = self.templates.get(key(self.name, BUFFER, buffer_name))
            if stored is not None:
                buffer.copy_(stored)
        master.refresh_module(engine)

    def _step(self, name: str) -> int:
        return self.entry.step_exceptions.get(name, self.entry.step)

    def _restore_steps(self) -> None:
        steps = dict.fromkeys(range(len(master.master_tensors(self.state.engine))), self.entry.step)
        if self.entry.step_exceptions:
            seen: dict[int, int] = {}
            for holding in master.holdings(self.state.engine):
                if holding.trained and holding.piece is not None:
                    names = [tensor.name for tensor in self._names[holding.name]]
                    index = holding.piece.index
                    seen[index] = max(seen.get(index, 0), *(self._step(name) for name in names))
            steps |= seen
        for index, step in steps.items():
            master.set_step(self.state.engine, index, step)
