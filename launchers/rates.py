"""Speed of a node's processors and of its network, measured to find the node that is slower than the others."""

import time

import torch
import torch.distributed as dist
from torch import Tensor


def matmul_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Floating-point operations per second of square matrix products: bfloat16 on a GPU, float32 on the CPU."""
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (
        torch.randn(size, size, device=device, dtype=dtype),
        torch.randn(size, size, device=device, dtype=dtype),
    )
    out = torch.empty_like(left)
    for _ in range(3):
        torch.matmul(left, right, out=out)
    _synchronize(device)
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        for _ in range(10):
            torch.matmul(left, right, out=out)
        _synchronize(device)
        count += 10
    return 2.0 * size**3 * count / (time.monotonic() - began)


def matmul_rates(gpus: int) -> list[float]:
    """Those of all GPUs of this node, or of its CPU where it has none."""
    devices = [torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")]
    return [matmul_rate(device) for device in devices]


def all_reduce_rate(rank: int, world_size: int, device: torch.device, size: int | None = None) -> float:
    """Bytes per second of this node's best all-reduce with one neighbour. Collective over one process per node.

    A ring over all nodes is as slow as its slowest member for everyone. Pairs tell nodes apart, and two rounds of them
    keep a slow neighbour from being blamed on a node: (0 1)(2 3)... and (1 2)(3 4)...(n-1 0).
    """
    size = size or (256 * 2**20 if device.type == "cuda" else 8 * 2**20)
    own, theirs = (torch.ones(size // 4, device=device) for _ in range(2))
    best = 0.0
    for shift in (0, 1):
        for first in range(shift, shift + world_size - 1, 2):
            pair = (first % world_size, (first + 1) % world_size)
            if rank in pair:
                best = max(best, _all_reduce_pair(own, theirs, pair[0] if rank == pair[1] else pair[1]))
        dist.barrier()
    return best


def _all_reduce_pair(own: Tensor, theirs: Tensor, peer: int, repeats: int = 3) -> float:
    """Exchange and add: with two members that is an all-reduce, and it needs no process group for every pair."""
    began = 0.0
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first one connects
            _synchronize(own.device)
            began = time.monotonic()
        operations = [dist.P2POp(dist.isend, own, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        own.add_(theirs)
    _synchronize(own.device)
    return repeats * own.numel() * own.element_size() / (time.monotonic() - began)


def all_reduce_rate_within(gpus: int, size: int = 256 * 2**20, repeats: int = 5) -> float:
    """Bytes per second of an all-reduce over all GPUs of this node."""
    tensors = [torch.ones(size // 4, device=torch.device("cuda", index)) for index in range(gpus)]
    torch.cuda.nccl.all_reduce(tensors)
    for index in range(gpus):
        torch.cuda.synchronize(index)
    began = time.monotonic()
    for _ in range(repeats):
        torch.cuda.nccl.all_reduce(tensors)
    for index in range(gpus):
        torch.cuda.synchronize(index)
    return repeats * size / (time.monotonic() - began)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
