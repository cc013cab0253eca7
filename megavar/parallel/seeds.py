"""Counter-based randomness: every draw is a function of a seed and what it is for, never of a rank or of call order.

The same sample gets the same label drop, crop, drop path and sampling noise whatever the number of ranks, the
micro-batch size, or the point at which a run was resumed.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically: clear the sign bits


def _mix(x: Tensor) -> Tensor:
    """The output function of splitmix64 on int64 tensors (products wrap modulo 2^64)."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _stream_key(seed: int, stream: str) -> int:
    return _signed(int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little"))


def random_bits(seed: int, stream: str, *keys: int | Tensor) -> Tensor:
    """64 random bits per key, as int64.

    Args:
        seed: the run's seed.
        stream: what the numbers are for, for example ``"label_drop"``.
        keys: integers or int64 tensors, broadcast against each other; the result has their common shape and device.
    """
    device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    state = torch.tensor(_stream_key(seed, stream), dtype=torch.int64, device=device)
    for key in keys:
        state = _mix(state ^ _mix(torch.as_tensor(key, dtype=torch.int64, device=device)))
    return _mix(state)


def uniform(seed: int, stream: str, *keys: int | Tensor) -> Tensor:
    """Uniform float64 numbers in [0, 1), one per key; see :func:`random_bits`."""
    return _shift_right(random_bits(seed, stream, *keys), 11).to(torch.float64) * 2.0**-53


def gumbel(seed: int, stream: str, *keys: int | Tensor) -> Tensor:
    """Standard Gumbel float32 noise, one per key; see :func:`random_bits`."""
    u = uniform(seed, stream, *keys) + 2.0**-54  # never 0
    return (-torch.log(-torch.log(u))).to(torch.float32)


def generator(seed: int, stream: str, *keys: int) -> torch.Generator:
    """A CPU generator for draws that need a distribution torch offers only through a generator."""
    return torch.Generator().manual_seed(int(random_bits(seed, stream, *keys)) & ((1 << 63) - 1))
