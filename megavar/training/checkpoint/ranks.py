"""Small agreements between all ranks, over a gloo group of their own."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megavar.errors import CheckpointAccessError
from megavar.parallel.environment import environment

T = TypeVar("T")


def once_per_node(work: Callable[[], T]) -> T:
    """What ``work`` returns or raises, done by one rank of each node for all ranks of it. Collective where there are
    process groups; a single process does it itself.

    For reading and hashing what all ranks need: on a shared file system every reader more is a burden.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    node, local = socket.gethostname(), environment().local_rank
    outcome: tuple[str, Any, BaseException | None] | None = None
    if local == 0:
        try:
            outcome = node, work(), None
        except Exception as error:
            outcome = node, None, error
    outcomes: list[tuple[str, Any, BaseException | None] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    _, value, failure = next(found for found in outcomes if found is not None and found[0] == node)
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


class Ranks:
    """All ranks of the run, for Python objects on the CPU.

    The group is separate from those that train, so that a background thread may talk while a step is running. Only one
    thread may use one instance at a time.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo")

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def agree(self, error: BaseException | str | None, what: str) -> None:
        """Raise on every rank if any rank had an ``error`` while doing ``what``.

        Raises:
            CheckpointAccessError: names the first ranks that failed and why.
        """
        errors = self.gather(None if error is None else f"{error}" or type(error).__name__)
        failed = [(rank, text) for rank, text in enumerate(errors) if text is not None]
        if failed:
            others = f" ({len(failed)} of {self.size} ranks failed)" if len(failed) > 1 else ""
            raise CheckpointAccessError(f"{what} failed on rank {failed[0][0]}{others}: {failed[0][1]}")
