"""Names and shapes of parameters that do not depend on the layout.

A parameter of this rank may be a tensor-parallel shard, hold several experts stacked or two matrices one above the
other, or number its experts from its own first one. Its *logical tensors* are what a single process would hold: same
names, full shapes. Initialization, checkpoints and conversions speak of logical tensors only.

Naming rules: blocks carry their global number (``blocks.7.``) on every pipeline stage; experts carry their global
number (``experts.5.linear_fc1.weight``) whether an implementation keeps them in a list (Megatron-core's
``experts.local_experts.1.linear_fc1.weight``, DeepSpeed's ``experts.deepspeed_experts.1.linear_fc1.weight``) or stacked
(``experts.linear_fc1_weight`` of shape [E_local, ...]). The first layer of a gated network is two logical tensors
(``linear_fc1_gate.weight`` and ``linear_fc1_up.weight``), as in published checkpoints: each tensor-parallel rank keeps
its rows of the one above its rows of the other, so that no layout-independent tensor can hold both.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_LISTED_EXPERT = re.compile(r"(?<![^.])experts\.(?:local_experts|deepspeed_experts)\.(\d+)\.")
_STACKED_EXPERT = re.compile(r"(?<![^.])experts\.(linear_fc[12])_(weight|bias)$")
_GATED_LAYER = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc1_weight", "linear_fc1_bias")
_GATED_PARTS = ("gate", "up")


@dataclass(frozen=True)
class LogicalTensor:
    """One layout-independent tensor and where this rank keeps its part of it."""

    name: str
    """Layout-independent name."""
    parameter: str
    """Name of the local parameter (``module.named_parameters()``)."""
    row: int | None
    """Index into the first dimension of a stacked parameter, or None where the parameter is the tensor."""
    shape: tuple[int, ...]
    """Full shape."""
    sharded_dimension: int | None
    """Dimension split over the tensor-parallel ranks, or None where every rank holds the full tensor."""
    is_expert: bool
    part: tuple[int, int] | None = None
    """(number, count) of equal parts of the first dimension of which this is one; None where it is all of it."""

    def local(self, value: Tensor) -> Tensor:
        """This logical tensor's part of a local tensor shaped like the parameter (a view)."""
        value = value if self.row is None else value[self.row]
        return value if self.part is None else value.chunk(self.part[1])[self.part[0]]

    def shard(self, full: Tensor, tensor_rank: int, tensor_size: int) -> Tensor:
        """This rank's part of the ``full`` logical tensor (a view)."""
        if self.sharded_dimension is None or tensor_size == 1:
            return full
        return full.chunk(tensor_size, self.sharded_dimension)[tensor_rank]


def _parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties parameters between uses


def logical_tensors(module: nn.Module) -> list[LogicalTensor]:
    """The logical tensors of all parameters of ``module``, in the order of ``named_parameters``.

    Call it after ``topology.initialize`` (or in a single process without process groups).
    """
    from megatron.core import parallel_state

    initialized = parallel_state.model_parallel_is_initialized()
    tensor_size = parallel_state.get_tensor_model_parallel_world_size() if initialized else 1
    expert_rank = parallel_state.get_expert_model_parallel_rank() if initialized else 0
    result = []
    local_experts, gated = _local_expert_counts(module), _gated_parameters(module)
    for name, parameter in module.named_parameters():
        shape = _parameter_shape(parameter)
        listed, stacked = _LISTED_EXPERT.search(name), _STACKED_EXPERT.search(name)
        if listed:
            first = expert_rank * local_experts[name[: listed.start()]]
            logical = f"{name[: listed.start()]}experts.{first + int(listed.group(1))}.{name[listed.end() :]}"
            found = [LogicalTensor(logical, name, None, shape, None, True)]
        elif stacked:
            prefix, first = f"{name[: stacked.start()]}experts", expert_rank * shape[0]
            inner = f"{stacked.group(1)}.{stacked.group(2)}"
            found = [
                LogicalTensor(f"{prefix}.{first + row}.{inner}", name, row, shape[1:], None, True)
                for row in range(shape[0])
            ]
        else:
            dimension = None
            if tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False):
                dimension = int(parameter.partition_dim)  # type: ignore[attr-defined]
                shape = tuple(size * tensor_size if d == dimension else size for d, size in enumerate(shape))
            found = [LogicalTensor(name, name, None, shape, dimension, False)]
        result += [part for tensor in found for part in (_parts(tensor) if name in gated else [tensor])]
    return result


def _gated_parameters(module: nn.Module) -> set[str]:
    """Names of parameters that hold both parts of a gated network's first layer.

    They are the ``linear_fc1`` of modules that carry a Megatron-core configuration with ``gated_linear_unit``.
    """
    gated = {name for name, child in module.named_modules() if _is_gated(child)}
    own = {f"{name}.{layer}".lstrip(".") for name in gated for layer in _GATED_LAYER}
    return own & {name for name, _ in module.named_parameters()}


def _is_gated(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "gated_linear_unit", False))


def _parts(tensor: LogicalTensor) -> list[LogicalTensor]:
    """The two tensors that a gated first layer consists of."""
    before, after = tensor.name.rsplit("linear_fc1", 1)
    rows, count = tensor.shape[0], len(_GATED_PARTS)
    return [
        replace(
            tensor,
            name=f"{before}linear_fc1_{part}{after}",
            shape=(rows // count, *tensor.shape[1:]),
            part=(number, count),
        )
        for number, part in enumerate(_GATED_PARTS)
    ]


def _local_expert_counts(module: nn.Module) -> dict[str, int]:
    """Number of experts in each list of experts, by the prefix before ``experts.``."""
    counts: dict[str, int] = {}
    for name, _ in module.named_parameters():
        match = _LISTED_EXPERT.search(name)
        if match:
            prefix = name[: match.start()]
            counts[prefix] = max(counts.get(prefix, 0), int(match.group(1)) + 1)
    return counts


InitializationRule = Callable[[str, Tensor, torch.Generator], None]
"""Fills a full logical tensor in place, given its logical name and a generator of its own."""


def initialize_parameters(module: nn.Module, rule: InitializationRule, seed: int, prefix: str = "") -> None:
    """Give every parameter its initial value, the same under every layout.

    Each logical tensor is drawn in full from a generator keyed by (seed, logical name), then this rank keeps its part.
    Parameters that ZeRO-3 has sharded already are left alone.

    Args:
        prefix: of the names, where ``module`` is a part of the one that the names belong to.
    """
    from megatron.core import parallel_state

    from megavar.parallel import seeds

    initialized = parallel_state.model_parallel_is_initialized()
    tensor_rank = parallel_state.get_tensor_model_parallel_rank() if initialized else 0
    tensor_size = parallel_state.get_tensor_model_parallel_world_size() if initialized else 1
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for tensor in logical_tensors(module):
            parameter = parameters[tensor.parameter]
            if parameter.is_meta or isinstance(parameter, FakeTensor) or hasattr(parameter, "ds_id"):
                continue  # there is nothing to fill
            full, name = torch.empty(tensor.shape, dtype=torch.float32), prefix + tensor.name
            rule(name, full, seeds.generator(seed, f"initialize/{name}"))
            tensor.local(parameter).copy_(tensor.shard(full, tensor_rank, tensor_size))
