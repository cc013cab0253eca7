"""What the trainer is given: a run, and the arithmetic of its batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from megavar.config.logging import LoggingConfig
from megavar.config.optimizer import OptimizerConfig
from megavar.config.train import TrainConfig
from megavar.data.batch import Batch
from megavar.errors import ConfigError, MegavarError
from megavar.parallel.topology import Topology
from megavar.recipes.base import Recipe
from megavar.training.checkpoint.initial import InitialWeights
from megavar.training.observers import Observer
from megavar.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, on what, and where its results go."""

    name: str
    """For logs and W&B."""
    train: TrainConfig
    optimizer: OptimizerConfig
    logging: LoggingConfig
    deepspeed: Mapping[str, Any]
    """Content of the DeepSpeed JSON, validated."""
    deepspeed_origin: str
    """Its path, for errors."""
    config: Mapping[str, Any]
    """The whole resolved configuration as plain values, kept in the run directory."""
    directory: RunDirectory
    recipe: Recipe
    samples: int
    """Length of the training data."""
    loader: Callable[[int, int], Iterable[list[Batch]]]
    """(first step of the data, micro-batch size) -> per step this rank's micro-batches, on the device, without end."""
    topology: Topology
    initial: InitialWeights | None = None
    """Weights with which a new run begins."""
    preview: "Callable[[int], Image.Image | None] | None" = None
    """step -> a picture of samples on rank 0, None elsewhere. Called on all ranks at the same steps, while the modules
    hold the averaged weights if there are any."""
    flops_per_image: float | None = None
    """Floating-point operations of forward and backward, for the model's FLOPs utilization."""
    peak_flops: float | None = None
    """Peak of one device in operations per second."""
    observers: Sequence[Observer] = ()
    """What watches, on every rank alike."""


def micro_batch_size(train: TrainConfig, topology: Topology) -> int:
    """Samples of one micro-batch: the most that split a rank's share evenly, up to ``train.micro_batch_size``.

    Raises:
        ConfigError: the global batch cannot be split evenly.
    """
    share, rest = divmod(train.global_batch_size, topology.data)
    if rest or not share:
        nearest = max(1, round(train.global_batch_size / topology.data)) * topology.data
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} cannot be split evenly over {topology.data} "
            f"data-parallel ranks. Set it to a multiple of {topology.data}, for example {nearest}, or change the "
            f"number of processes. It is never rounded silently, because the learning rate follows it."
        )
    limit = min(train.micro_batch_size or share, share)
    return next(size for size in range(limit, 0, -1) if share % size == 0)


def first_error(error: MegavarError | None) -> MegavarError | None:
    """The error of the lowest rank that has one, on every rank: they end together. Collective over the CPU backend."""
    none = dist.get_world_size()
    rank = torch.tensor(none if error is None else dist.get_rank(), dtype=torch.int32)
    dist.all_reduce(rank, op=dist.ReduceOp.MIN)
    if rank.item() == none:
        return None
    shared = [error]
    dist.broadcast_object_list(shared, src=int(rank.item()))
    return shared[0]


def on_first_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; what it returns, or raises for people, is returned or raised on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [None, action()]
        except (MegavarError, OSError) as error:
            outcome = [error, None]
    dist.broadcast_object_list(outcome, src=0)
    raised, value = outcome
    if raised is not None:
        raise raised
    return value
