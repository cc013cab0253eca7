"""Counter-based randomness."""

import torch

from megavar.parallel import seeds


def reference_bits(seed_key: int, *keys: int) -> int:
    """splitmix64 chaining with Python integers."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    state = seed_key & mask
    for key in keys:
        state = mix(state ^ mix(key & mask))
    return mix(state)


def test_bits_equal_integer_arithmetic() -> None:
    start = seeds._stream_key(7, "test")
    for keys in [(0,), (1, 2), (-5, 1 << 40), (123456789, 3, 9)]:
        expected = reference_bits(start, *keys)
        assert int(seeds.random_bits(7, "test", *keys)) & ((1 << 64) - 1) == expected


def test_draws_do_not_depend_on_what_is_drawn_beside_them() -> None:
    together = seeds.uniform(0, "label_drop", 3, torch.arange(100))
    alone = torch.stack([seeds.uniform(0, "label_drop", 3, index) for index in range(100)])
    assert torch.equal(together, alone)


def test_streams_seeds_and_keys_are_independent() -> None:
    index = torch.arange(20000)
    draws = [
        seeds.uniform(0, "a", index),
        seeds.uniform(0, "b", index),
        seeds.uniform(1, "a", index),
        seeds.uniform(0, "a", 1, index),
    ]
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.03
    for draw in draws:
        assert draw.min() >= 0 and draw.max() < 1
        assert abs(draw.mean() - 0.5) < 0.01 and abs(draw.var() - 1 / 12) < 0.005


def test_generators_repeat() -> None:
    first = torch.rand(3, generator=seeds.generator(1, "x", 2))
    again = torch.rand(3, generator=seeds.generator(1, "x", 2))
    other = torch.rand(3, generator=seeds.generator(1, "x", 3))
    assert torch.equal(first, again) and not torch.equal(first, other)
