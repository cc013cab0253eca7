"""Which layouts are allowed: one function, asked by the trainer before anything is built and by ``megavar plan``.

Every refusal names the keys, the reason and a remedy. Where a library is the reason, its place is named.
"""

from megavar.config.generators.base import Limits
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.parallel.topology import data_parallel_size


def check_layout(
    parallel: ParallelConfig,
    limits: Limits | None,
    *,
    zero_stage: int,
    world_size: int,
    micro_batches: int,
) -> None:
    """Refuse a layout that cannot run or would compute something else.

    Args:
        limits: of the generator; None while a tokenizer is trained.
        zero_stage: ZeRO stage that the DeepSpeed JSON asks for.
        world_size: number of ranks.
        micro_batches: micro-batches that a data-parallel rank computes per step.

    Raises:
        ConfigError: the first rule that is broken.
    """
    data_parallel_size(parallel, world_size)
    if limits is None:
        _check_tokenizer(parallel)
        return
    _check_tensor(parallel, limits)
    _check_pipeline(parallel, limits, micro_batches)
    check_zero(parallel, zero_stage)
    _check_experts(parallel, limits)


def _check_tokenizer(parallel: ParallelConfig) -> None:
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "expert": parallel.expert}
    for name, size in sizes.items():
        if size > 1:
            raise ConfigError(
                f"parallel.{name}={size} is not offered while a tokenizer is trained: convolutions are replicated, "
                f"only data parallelism and ZeRO spread them. Set parallel.{name}=1."
            )


def _check_tensor(parallel: ParallelConfig, limits: Limits) -> None:
    tensor = parallel.tensor
    for what, number in limits.shared.items():
        if number % tensor:
            raise ConfigError(
                f"parallel.tensor={tensor} does not divide the {number} {what} that tensor-parallel ranks share. "
                f"Choose parallel.tensor among the divisors of {number}."
            )


def _check_pipeline(parallel: ParallelConfig, limits: Limits, micro_batches: int) -> None:
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks > 1 and stages == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={chunks} needs pipeline stages to interleave, but parallel.pipeline=1. Set "
            f"parallel.pipeline above 1 or parallel.virtual_pipeline=1."
        )
    if limits.depth % (stages * chunks):
        raise ConfigError(
            f"generator.depth={limits.depth} blocks cannot be split evenly into parallel.pipeline={stages} x "
            f"parallel.virtual_pipeline={chunks} = {stages * chunks} parts. Choose sizes whose product divides "
            f"{limits.depth}."
        )
    if chunks > 1 and micro_batches % stages:
        raise ConfigError(
            f"parallel.virtual_pipeline={chunks} needs the number of micro-batches per step to be a multiple of "
            f"parallel.pipeline={stages}, but it is {micro_batches} (Megatron-core's interleaved schedule works "
            f"through them in groups of that size). Change train.micro_batch_size, or set parallel.virtual_pipeline=1."
        )


def check_zero(parallel: ParallelConfig, stage: int) -> None:
    """Refuse a ZeRO stage that cannot run with the pipeline stages.

    Raises:
        ConfigError: it cannot.
    """
    if parallel.pipeline > 1 and stage > 1:
        raise ConfigError(
            f"ZeRO stage {stage} does not work with parallel.pipeline={parallel.pipeline}: it reduces gradients after "
            f"every micro-batch, in an order that differs between interleaved stages (DeepSpeed 0.19.8 raises in "
            f"zero/stage_1_and_2.py:2860 or waits for ever). Name a DeepSpeed JSON with stage 1, or set "
            f"parallel.pipeline=1."
        )


def check_compiled(parallel: ParallelConfig, limits: Limits | None, zero_stage: int) -> None:
    """Refuse ``train.compile: blocks`` where blocks cannot be graphs.

    Raises:
        ConfigError: they cannot.
    """
    if limits is None:
        raise ConfigError(
            "train.compile=blocks, but a tokenizer is trained, which has no transformer blocks. Set train.compile=none."
        )
    if parallel.tensor > 1:
        raise ConfigError(
            f"train.compile=blocks does not work with parallel.tensor={parallel.tensor}: the collectives that Megatron-"
            f"core starts beside its matrix products (tensor_parallel/layers.py:544) cannot be traced. Set "
            f"parallel.tensor=1, or train.compile=none."
        )
    if zero_stage == 3:
        raise ConfigError(
            "train.compile=blocks does not work with ZeRO stage 3, whose hooks gather parameters in the middle of a "
            "block. Name a DeepSpeed JSON with stage 2, or set train.compile=none."
        )


def _check_experts(parallel: ParallelConfig, limits: Limits) -> None:
    experts = limits.experts
    if experts is None:
        if parallel.expert > 1:
            raise ConfigError(
                f"parallel.expert={parallel.expert}, but the generator has no experts. Add generator.experts or set "
                f"parallel.expert=1."
            )
        return
    experts.check(parallel)
