"""Logical tensors put together again from the parts that the ranks of a layout hold."""

import torch
from megatron.core import parallel_state

from megavar.parallel.logical import logical_tensors


def parts(module, of):
    """This rank's parts by logical name: (tensor rank, sharded dimension or None, value).

    Args:
        of: parameter -> tensor of its shape, for example its gradient.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    parameters = dict(module.named_parameters())
    return {
        tensor.name: (rank, tensor.sharded_dimension, tensor.local(of(parameters[tensor.parameter])).detach().clone())
        for tensor in logical_tensors(module)
    }


def whole(ranks):
    """Complete logical tensors from :func:`parts` of all ranks; replicas must agree."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    dimensions = {}
    for given in ranks:
        for name, (rank, dimension, value) in given.items():
            dimensions[name] = dimension
            kept = found.setdefault(name, {})
            place = rank if dimension is not None else 0
            if place in kept:
                torch.testing.assert_close(value, kept[place], rtol=1e-5, atol=1e-7, msg=f"replicas of {name} differ")
            kept[place] = value
    return {
        name: torch.cat([kept[place] for place in sorted(kept)], dimensions[name]) if len(kept) > 1 else kept[0]
        for name, kept in found.items()
    }
