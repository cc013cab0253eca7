"""The mesh: which rank is what, and the process groups behind it (Megatron-core's ``parallel_state``)."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megavar.config.parallel import ParallelConfig
from megavar.errors import ClusterError, ConfigError
from megavar.parallel import cpu_backend
from megavar.parallel.environment import Environment, free_port


@dataclass(frozen=True)
class Topology:
    """Sizes of all parallel dimensions and the coordinates of this rank in them."""

    config: ParallelConfig
    world_size: int
    rank: int
    data: int
    """Data-parallel size."""
    expert_data: int
    """Ranks that hold the same experts."""
    tensor_rank: int = 0
    data_rank: int = 0
    pipeline_rank: int = 0
    expert_rank: int = 0


def data_parallel_size(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Data-parallel and expert-data-parallel size of ``world_size`` ranks.

    Raises:
        ConfigError: the sizes do not divide the world.
    """
    model = config.tensor * config.pipeline
    if world_size % model:
        raise ConfigError(
            f"parallel: tensor={config.tensor} x pipeline={config.pipeline} = {model} does not divide the world size "
            f"{world_size}. Start a multiple of {model} processes, or lower parallel.tensor or parallel.pipeline."
        )
    ranks_per_stage = world_size // config.pipeline
    if ranks_per_stage % config.expert:
        raise ConfigError(
            f"parallel.expert={config.expert} does not divide the {ranks_per_stage} ranks of a pipeline stage "
            f"(world size {world_size} / pipeline {config.pipeline}). Choose parallel.expert among the divisors of "
            f"{ranks_per_stage}."
        )
    return world_size // model, ranks_per_stage // config.expert


def initialize(config: ParallelConfig, environment: Environment, timeout_minutes: float = 30.0) -> Topology:
    """Create the process groups of this run (again, if an earlier run of this process left others).

    Every run owns a default process group, a single process included, so that there is one code path.
    """
    cpu_backend.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    data, expert_data = data_parallel_size(config, environment.world_size)
    # DeepSpeed insists on torchrun's names (deepspeed/__init__.py, engine.py), whoever started the process.
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(environment.rank), str(environment.world_size)
    os.environ["LOCAL_RANK"] = str(environment.local_rank)
    if torch.cuda.is_available():
        if environment.local_rank >= (seen := torch.cuda.device_count()):
            raise ClusterError(
                f"Process {environment.local_rank} of this node (counted from 0) sees {seen} GPUs. "
                f"Start as many processes per node as it has GPUs, and let each see all of them (--gpus-per-task hides "
                f"the others')."
            )
        torch.cuda.set_device(environment.device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if environment.world_size == 1:
            dist.init_process_group(
                environment.backend, init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(
                environment.backend,
                init_method="env://",
                rank=environment.rank,
                world_size=environment.world_size,
                timeout=timeout,
            )
    _destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,
    )
    # Our randomness is counter-based (parallel/seeds.py); the tracker must exist for Megatron's checkpointing.
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return Topology(
        config=config,
        world_size=environment.world_size,
        rank=environment.rank,
        data=data,
        expert_data=expert_data,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
    )


def ensure_single(device: torch.device) -> None:
    """A mesh of this process alone, for a whole model in another program; nothing where there is one.

    Raises:
        ConfigError: this process is a part of a larger model.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        before = {name: os.environ.get(name) for name in names}
        initialize(ParallelConfig(), Environment(0, 1, device.index or 0, "single"))
        for name, value in before.items():  # the other program's processes are not ranks of ours
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if parallel_state.get_model_parallel_group().size() > 1:
        raise ConfigError(
            "This process holds a part of a model (tensor or pipeline parallelism). Load whole models in another one."
        )


def shutdown() -> None:
    """Destroy all process groups."""
    _destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _destroy_model_parallel() -> None:
    """Destroy all groups of the mesh, if there is one.

    Megatron-core's ``destroy_model_parallel`` only forgets them, and some not even that: each of Gloo's groups keeps
    three threads that never sleep for long (2,900 of them after 46 runs in one process), and a process forked later
    would hang in their destructors.
    """
    from megatron.core import parallel_state

    groups = []
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            groups.append(value)
            setattr(parallel_state, name, None)
        elif isinstance(value, (list, tuple)):
            groups += [group for group in value if isinstance(group, dist.ProcessGroup)]
    if parallel_state.model_parallel_is_initialized() or groups:
        parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    for group in {id(group): group for group in groups}.values():
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def describe(config: ParallelConfig, world_size: int) -> str:
    """A picture of the mesh: one line per pipeline stage and data-parallel replica.

    Rank order is Megatron-core's: tensor fastest, then data, pipeline slowest. Within a stage the ranks form expert
    groups of ``parallel.expert`` neighbours.
    """
    data, expert_data = data_parallel_size(config, world_size)
    lines = [
        f"mesh of {world_size} ranks: data {data} x tensor {config.tensor} x pipeline {config.pipeline}"
        f" (expert {config.expert} x expert-data {expert_data} within a stage"
        f"{', sequence parallel' if config.sequence else ''})"
    ]
    for stage in range(config.pipeline):
        for replica in range(data):
            first = stage * data * config.tensor + replica * config.tensor
            ranks = range(first, first + config.tensor)
            cells = " ".join(f"{rank}[e{(rank % (data * config.tensor)) % config.expert}]" for rank in ranks)
            lines.append(f"  stage {stage}  replica {replica}  tensor ranks {cells}")
    return "\n".join(lines[:65] + ([f"  ... {len(lines) - 65} more lines"] if len(lines) > 65 else []))


class DeepSpeedTopology:
    """The ``mpu`` object DeepSpeed asks for, answered by Megatron-core's ``parallel_state``."""

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share one replica of the model."""
        return self.get_tensor_model_parallel_world_size() * self.get_pipeline_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        """The tensor coordinate only.

        DeepSpeed counts unsharded parameters in the gradient norm where this is 0 (runtime/utils.py:394,
        zero/stage3.py:376); every pipeline stage owns different parameters and must count its own.
        """
        return self.get_tensor_model_parallel_rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())
