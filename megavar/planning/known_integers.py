"""Values of integers while other tensors have none: sizes of windows and the like, which code asks for."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_MOST = 1 << 20
"""Elements of a tensor whose values are kept."""


class KnownIntegers(TorchDispatchMode):
    """Inside ``FakeTensorMode``: integers that follow from other known ones are computed, and may be read.

    Everything else stays without values, floating-point numbers above all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = (arguments, options or {})
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in function.tags or not all(map(self._is_known, tensors)):
            return function(*arguments, **given[1])
        if not tensors:  # made of nothing: whether of integers, its twin without memory says
            result = function(*arguments, **given[1])
            if not _integers(result):
                return result
        with unset_fake_temporarily():
            places, names = tree_map(self._value, given)
            found = function(*places, **names)
        if not _integers(found):
            return found if not isinstance(found, Tensor) else function(*arguments, **given[1])
        return tree_map(lambda value: self._twin(value, tensors), found)

    def _is_known(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) or tensor in self._values

    def _value(self, leaf: Any) -> Any:
        return self._values[leaf] if isinstance(leaf, FakeTensor) else leaf

    def _twin(self, value: Any, tensors: list[Tensor]) -> Any:
        """The fake tensor whose value is ``value``."""
        if not isinstance(value, Tensor):
            return value
        for tensor in tensors:  # changed in place
            if isinstance(tensor, FakeTensor) and self._values[tensor] is value:
                return tensor
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        self._values[twin] = value
        return twin


def _integers(result: Any) -> bool:
    """Whether it is a small tensor of integers or truth values, or several."""
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return bool(leaves) and all(
        not leaf.is_floating_point() and not leaf.is_complex() and leaf.numel() <= _MOST for leaf in leaves
    )
