"""Lets Megatron-core 0.16 run on CPUs over gloo. Does nothing where CUDA is available.

Megatron-core assumes a CUDA device in a handful of places. Each adaptation names the place that needs it
(paths relative to ``megatron/core``); nothing else in megavar knows about it.
"""

import contextlib
import functools
from typing import Any

import torch
import torch.utils._device

_installed = False

# Factories that pipeline_parallel/schedules.py:596,983,2138 and p2p_communication.py call with device="cuda".
_FACTORIES = ("tensor", "zeros", "empty", "ones", "full", "arange", "rand", "randn", "zeros_like",
              "empty_like", "ones_like")


class _NoStream:
    """Stands for ``torch.cuda.Stream`` and ``Event`` (transformer/moe/token_dispatcher.py, p2p_communication.py)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *args: Any) -> "_NoStream":
        return self

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


class _SplitSizes(list):
    """Split sizes with the ``tolist`` of the NumPy array that token_dispatcher.py expects."""

    def tolist(self) -> list:
        return list(self)


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _same(tensor_or_module: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor_or_module


def install() -> None:
    """Adapt Megatron-core to a machine without CUDA; call it before Megatron-core modules are built."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    # tensor_parallel/layers.py, pipeline_parallel/*, transformer/moe/*: the current device and its streams.
    cuda.current_device = lambda: cpu
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda *args: None
    tensor: Any = torch.Tensor
    tensor.cuda = _same
    tensor.record_stream = lambda self, stream: None
    module: Any = torch.nn.Module
    module.cuda = _same
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    # tensor_parallel/random.py: the tracker of device generators that activation checkpointing replays.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # Let PyTorch remember its factories first: `with torch.device("meta")` recognizes them by identity.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # transformer/moe/moe_utils.py:1093 converts split sizes only `if tensor.is_cuda`.
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def split_sizes(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return _SplitSizes(value.tolist()) if torch.is_tensor(value) and as_numpy else value

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes  # type: ignore[assignment]
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]  # used without Transformer Engine installed
