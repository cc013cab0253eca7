"""Counter-based randomness: every draw is a function of a seed and what it is for, never of a rank or of call order.

The same sample gets the same label drop, crop, drop path and sampling noise whatever the number of ranks, the
micro-batch size, or the point at which a run was resumed.
"""

import hashlib
import math

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


def _mix_number(x: int) -> int:
    """:func:`_mix` of one number."""
    unsigned = (1 << 64) - 1
    x = (x + _GOLDEN) & unsigned
    x = ((x ^ (x >> 30)) * _MIX_1) & unsigned
    x = ((x ^ (x >> 27)) * _MIX_2) & unsigned
    return _signed(x ^ (x >> 31))


def _mixed(x: int | Tensor) -> int | Tensor:
    return _mix(x) if isinstance(x, Tensor) else _mix_number(x)


@torch.compiler.assume_constant_result  # of seed and stream, which a compiled block guards
def _stream_key(seed: int, stream: str) -> int:
    return _signed(int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little"))


def random_bits(seed: int, stream: str, *keys: int | Tensor) -> Tensor:
    """64 random bits per key, as int64.

    Args:
        seed: the run's seed.
        stream: what the numbers are for, for example ``"label_drop"``.
        keys: integers or int64 tensors, broadcast against each other; the result has their common shape and device.
    """
    return _tensor(_mixed(_absorbed(_stream_key(seed, stream), keys)))


def begin(seed: int, stream: str, *keys: int | Tensor) -> Tensor:
    """The first keys of draws that :func:`go_on` makes with the others, as int64:
    ``random_bits(seed, stream, *first, *others)`` is ``go_on(begin(seed, stream, *first), *others)``."""
    return _tensor(_absorbed(_stream_key(seed, stream), keys))


def go_on(state: Tensor, *keys: int | Tensor) -> Tensor:
    """64 random bits per key, as int64; see :func:`begin`."""
    return _tensor(_mixed(_absorbed(state, keys)))


def _absorbed(state: int | Tensor, keys: tuple[int | Tensor, ...]) -> int | Tensor:
    # Numbers are mixed on the host: a tensor of one number would make the host wait for its copy to the device.
    device = next((key.device for key in (state, *keys) if isinstance(key, Tensor)), None)
    for key in keys:
        key = key.to(device, torch.int64) if isinstance(key, Tensor) else _signed(key)
        state = _mixed(state ^ _mixed(key))
    return state


def _tensor(state: int | Tensor) -> Tensor:
    return state if isinstance(state, Tensor) else torch.tensor(state, dtype=torch.int64)


def uniform(seed: int, stream: str, *keys: int | Tensor) -> Tensor:
    """Uniform float64 numbers in [0, 1), one per key; see :func:`random_bits`."""
    return _shift_right(random_bits(seed, stream, *keys), 11).to(torch.float64) * 2.0**-53


def normal(seed: int, stream: str, *keys: int | Tensor) -> Tensor:
    """Standard normal float64 numbers, one per key (Box and Muller 1958); see :func:`random_bits`."""
    bits = random_bits(seed, stream, *keys)
    radius = (-2 * torch.log1p(-_shift_right(bits, 11).to(torch.float64) * 2.0**-53)).sqrt()
    angle = 2 * math.pi * _shift_right(_mix(bits), 11).to(torch.float64) * 2.0**-53
    return radius * angle.cos()


def normal_tokens(seed: int, stream: str, epochs: Tensor, samples: Tensor, tokens: int, channels: int) -> Tensor:
    """Standard normal vectors of samples' tokens, float32 [B, tokens, channels].

    Args:
        epochs: int64 [B].
        samples: int64 [B], their numbers.
    """
    places, channel = torch.arange(tokens, device=samples.device), torch.arange(channels, device=samples.device)
    keys = epochs[:, None, None], samples[:, None, None], places[:, None], channel
    return normal(seed, stream, *keys).float()


def lanes(bits: Tensor, first: int, count: int) -> Tensor:
    """Many 16-bit numbers from each 64 random bits: the splitmix64 sequence that starts there, four numbers a step.

    Args:
        bits: int64 [...], as :func:`random_bits` gives them.
        first, count: which numbers of the sequence; any range gives the numbers that the whole sequence has there.

    Returns:
        int16 [..., count], uniform over all of its values.
    """
    skipped = first % 4
    steps = torch.arange(first // 4, -(-(first + count) // 4), device=bits.device)
    return _mix(bits[..., None] + steps * _signed(_GOLDEN)).view(torch.int16)[..., skipped : skipped + count]


def generator(seed: int, stream: str, *keys: int) -> torch.Generator:
    """A CPU generator for draws that need a distribution torch offers only through a generator."""
    return torch.Generator().manual_seed(int(random_bits(seed, stream, *keys)) & ((1 << 63) - 1))
