"""Counts operations and follows memory while modules run, with tensors that have memory or with fake ones."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_FUSED_BACKWARD = (  # they compute the scores once more: five products, of which the mathematics needs four
    "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_flash_attention_backward", "_efficient_attention_backward",
)  # fmt: skip


def flop_formula(packet: Any) -> Callable[..., int] | None:
    """PyTorch's formula for the operations of a kernel; before 2.12 it had none for attention on CPUs."""
    alike = getattr(torch.ops.aten, packet.__name__.replace("_for_cpu", ""), None)
    return flop_registry.get(packet) or (flop_registry.get(alike) if "_for_cpu" in packet.__name__ else None)


class LiveBytes(TorchDispatchMode):
    """Follows the memory of all tensors made within it, from creation to release."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """Tensors in ``existing``, and views of them, do not count."""
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._release, key, size)
        self.peak = max(self.peak, self.live)
        return result


class Ledger(LiveBytes):
    """Operations and memory by *account*, the part of a model that is at work (:meth:`enter`).

    Matrix products, convolutions and attention count as operations, two per multiply-add, elementwise work does not (as
    in PyTorch's ``FlopCounterMode``).
    """

    def __init__(self, existing: Iterable[Tensor] = (), images: int = 0) -> None:
        """``images``: matrix products with so many rows multiply weights that meet an image once."""
        super().__init__(existing)
        self.images = images
        self.account = ""
        self.forward: dict[str, float] = defaultdict(float)
        """Operations outside the backward pass."""
        self.once: dict[str, float] = defaultdict(float)
        """Those of them that are matrix products of one row per image."""
        self.products: dict[str, float] = defaultdict(float)
        """Those of them that are other matrix products of rows and weights."""
        self.needed: dict[str, float] = defaultdict(float)
        """Operations that the mathematics needs, and whatever recomputation repeats of them."""
        self.done: dict[str, float] = defaultdict(float)
        """Operations of the kernels: what attention masks or computes twice, too."""
        self.peaks: dict[str, int] = defaultdict(int)
        """Most memory that was live while an account was at work."""
        self.saved: dict[str, int] = defaultdict(int)
        """Bytes that autograd keeps of the forward pass."""
        self._is_backward = False

    def enter(self, account: str) -> None:
        """What follows belongs to ``account``."""
        self.account = account

    def count(self, needed: float, done: float) -> None:
        """Add operations."""
        self.needed[self.account] += needed
        self.done[self.account] += done
        if not self._is_backward:
            self.forward[self.account] += needed

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, arguments, options)
        self.peaks[self.account] = max(self.peaks[self.account], self.live)
        packet = function._overloadpacket
        formula = flop_formula(packet)
        if formula is not None:
            flops = formula(*arguments, **(options or {}), out_val=result)
            self.count(flops * (0.8 if packet.__name__ in _FUSED_BACKWARD else 1.0), flops)
            if not self._is_backward and packet.__name__ in ("mm", "addmm"):
                rows = arguments[1 if packet.__name__ == "addmm" else 0].shape[0]
                (self.once if rows == self.images else self.products)[self.account] += flops
        return result

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The backward pass runs within."""
        self._is_backward = True
        yield
        self._is_backward = False

    @contextmanager
    def forward_pass(self, ignored: Iterable[Tensor]) -> Iterator[None]:
        """The forward pass runs within: what autograd saves of it, ``ignored`` left out, is found in ``saved``."""
        known = {tensor.untyped_storage()._cdata for tensor in ignored}
        kept: list[Any] = []

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                kept.append(storage)  # alive, so that its address is not given to another one
                self.saved[self.account] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield
        kept.clear()  # the hooks may live as long as the graph


def saved_bytes(work: Callable[[], Any], ignored: list[Tensor]) -> int:
    """Bytes of the distinct memory that autograd saves during ``work``, that of ``ignored`` tensors left out."""
    ledger = Ledger()
    with ledger.forward_pass(ignored):
        result = work()
    del result
    return sum(ledger.saved.values())
