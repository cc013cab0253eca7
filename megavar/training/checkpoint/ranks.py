"""Small agreements between all ranks, over a gloo group of their own."""

from typing import Any, TypeVar

import torch.distributed as dist

from megavar.errors import CheckpointAccessError

T = TypeVar("T")


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
