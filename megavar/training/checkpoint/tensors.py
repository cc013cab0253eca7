"""Between the pieces that ranks hold and whole parameters: gathering to owners, spreading from owners.

Parameters that share a data-parallel group are put into buckets of neighbours, and every bucket has one *owner* among
the group's ranks. Only the owner ever holds the bucket's parameters whole, in CPU memory, so that saving or loading
costs each rank about as much memory as its own partition of the optimizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavar.training.checkpoint.master import Holding

LARGEST_BUCKET = 64 * 2**20
"""Elements of one exchange (256 MiB), unless a single parameter is larger."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters that are exchanged at once."""

    holdings: tuple[Holding, ...]
    owner: int
    """Rank within the group."""

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that share these parameters."""
        return self.holdings[0].group

    @property
    def owned(self) -> bool:
        """Whether this rank is the owner."""
        return dist.get_rank(self.group) == self.owner

    def spans(self) -> Iterator[tuple[Holding, int, int]]:
        """Each parameter with the first element and the number of elements of its place in the buffer."""
        start = 0
        for holding in self.holdings:
            numel = torch.Size(holding.shape).numel()
            yield holding, start, numel
            start += numel

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(numel for _, _, numel in self.spans())


def make_buckets(holdings: list[Holding]) -> list[Bucket]:
    """Divide ``holdings`` into buckets, at least one per rank of a group where there are enough parameters."""
    by_group: dict[tuple[int, bool], list[Holding]] = {}
    for holding in holdings:
        by_group.setdefault((id(holding.group), holding.replicated), []).append(holding)
    buckets = []
    for members in by_group.values():
        size = dist.get_world_size(members[0].group)
        total = sum(torch.Size(holding.shape).numel() for holding in members)
        limit = min(LARGEST_BUCKET, -(-total // size))
        owner, filled = 0, 0
        current: list[Holding] = []
        for holding in members:
            numel = torch.Size(holding.shape).numel()
            if current and filled + numel > limit:
                buckets.append(Bucket(tuple(current), owner % size))
                owner, current, filled = owner + 1, [], 0
            current.append(holding)
            filled += numel
        buckets.append(Bucket(tuple(current), owner % size))
    return buckets


@torch.no_grad()
def gather(buckets: list[Bucket], tensors: list[Tensor], device: torch.device) -> dict[str, Tensor]:
    """Whole float32 parameters, on the CPU, of the buckets that this rank owns, by local parameter name.

    Args:
        buckets: the same on every rank of their groups.
        tensors: master tensors, or tensors shaped like them.
        device: where the exchange happens.
    """
    result = {}
    for bucket in buckets:
        exchange = not bucket.holdings[0].replicated and dist.get_world_size(bucket.group) > 1
        if not exchange and not bucket.owned:
            continue
        buffer = torch.zeros(bucket.numel, dtype=torch.float32, device=device)
        for holding, start, _ in bucket.spans():
            if holding.piece is not None:
                buffer.narrow(0, start + holding.piece.start, holding.piece.numel).copy_(holding.piece.of(tensors))
        if exchange:  # sums of bit patterns with zeros: exact even for negative zeros
            destination = dist.get_global_rank(bucket.group, bucket.owner)
            dist.reduce(buffer.view(torch.int32), destination, group=bucket.group)
        if bucket.owned:
            host = buffer.cpu()
            for holding, start, numel in bucket.spans():
                result[holding.name] = host.narrow(0, start, numel).view(holding.shape)
    return result


@torch.no_grad()
def spread(buckets: list[Bucket], values: dict[str, Tensor], tensors: list[Tensor], device: torch.device) -> None:
    """Write whole parameters into the pieces of every rank; the inverse of :func:`gather`.

    Args:
        buckets: the same on every rank of their groups.
        values: whole parameters of the buckets that this rank owns, by local parameter name.
        tensors: master tensors, or tensors shaped like them: filled in place.
        device: where the exchange happens.
    """
    for bucket in buckets:
        buffer = torch.empty(bucket.numel, dtype=torch.float32, device=device)
        if bucket.owned:
            for holding, start, numel in bucket.spans():
                buffer.narrow(0, start, numel).copy_(values[holding.name].reshape(-1))
        if dist.get_world_size(bucket.group) > 1:
            dist.broadcast(buffer, dist.get_global_rank(bucket.group, bucket.owner), group=bucket.group)
        for holding, start, _ in bucket.spans():
            if holding.piece is not None:
                source = buffer.narrow(0, start + holding.piece.start, holding.piece.numel)
                holding.piece.of(tensors).copy_(source)
