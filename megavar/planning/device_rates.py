"""How fast a device does single things: matrix products, copies, launches, reductions. Measured, not looked up."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SECONDS_PER_RATE = 0.1
"""Work is repeated until it takes as long."""


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, at_least: float = SECONDS_PER_RATE) -> float:
    """Seconds of one call of ``work``, best of three rounds of as many calls as take ``at_least`` seconds together."""

    def round_of(calls: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    round_of(1)  # kernels are chosen and compiled
    calls = max(1, round(at_least / max(round_of(1), 1e-6)))
    return min(round_of(calls) for _ in range(3))


def product_seconds(device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """Of [rows, inner] x [inner, columns] on random numbers (zeros would take less energy, and less time)."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return seconds_of(lambda: torch.mm(left, right.t(), out=out), device)


def launch_seconds(device: torch.device) -> float:
    """What the host takes to give the device one small kernel, if it never waits."""
    number = torch.zeros(1, device=device)

    def hundred() -> None:
        for _ in range(100):
            number.add_(1.0)

    return seconds_of(hundred, device, 0.05) / 100


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of a copy of ``size`` bytes within the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def all_reduce_seconds(device: torch.device, size: int) -> float:
    """Of an all-reduce of ``size`` bytes over all ranks. Collective: as many rounds on every rank."""
    values = torch.ones(size // 4, device=device)
    dist.all_reduce(values)
    times = []
    for _ in range(5):
        synchronize(device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)
