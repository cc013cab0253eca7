"""How long a step takes, from FLOPs at an assumed utilization and bytes over links at their rates.

Nothing is assumed to overlap: ZeRO stages 0 and 1 reduce gradients after the last micro-batch in this trainer.
"""

from dataclasses import dataclass, fields

from megavar.planning.activations import MicroBatch, expert_tokens
from megavar.planning.flops import hardware_flops, model_flops
from megavar.planning.hardware import (
    HOST_RATE,
    KERNELS_PER_BLOCK,
    LAUNCH_SECONDS,
    LINK_EFFICIENCY,
    TOKENIZER_UTILIZATION,
    Accelerator,
)
from megavar.planning.layout import Layout
from megavar.planning.parameters import RankParameters, rank_parameters
from megavar.planning.shape import GeneratorShape
from megavar.planning.tokenizer_cost import TokenizerCost

_ADAM_BYTES = 30  # read and written per parameter: master, moments, gradient, weight


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank."""

    compute: float
    """The generator at the stated utilization, recomputation included."""
    encode: float = 0.0
    """The frozen tokenizer."""
    bubble: float = 0.0
    """Waiting at the ends of the pipeline."""
    tensor: float = 0.0
    """Collectives of tensor and sequence parallelism."""
    expert: float = 0.0
    """Tokens on their way to experts and back."""
    pipeline: float = 0.0
    """Transfers between stages."""
    data: float = 0.0
    """Gradients and weights between data-parallel ranks."""
    optimizer: float = 0.0
    """The update, with transfers where it is offloaded."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def parts(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Machine:
    """The accelerators of a run."""

    gpu: Accelerator
    gpus_per_node: int

    def rate(self, ranks: int, stride: int) -> float:
        """Bytes per second of collectives over ``ranks`` ranks that lie ``stride`` apart.

        Between nodes the members of one node share the links that their GPUs have to the network.
        """
        if ranks * stride <= self.gpus_per_node:
            return self.gpu.link * LINK_EFFICIENCY
        members = max(1, self.gpus_per_node // stride)
        return min(self.gpu.link, self.gpu.network * members) * LINK_EFFICIENCY


def step_time(
    shape: GeneratorShape,
    layout: Layout,
    machine: Machine,
    *,
    utilization: float,
    element: int,
    kernel: str,
    tokenizer: TokenizerCost | None,
) -> StepTime:
    """Time of a step.

    Args:
        utilization: model FLOPs over peak while blocks compute, without communication and encoding.
        element: bytes of a weight and of an activation.
        kernel: attention kernel.
        tokenizer: of the frozen tokenizer; None where tokens are cached.
    """
    parallel, gpu = layout.parallel, machine.gpu
    batch = MicroBatch(shape, parallel, layout.micro_batch, element, kernel)
    share = layout.micro_batch * layout.micro_batches
    peak = gpu.bf16 if element == 2 else gpu.fp32
    # Utilization counts model FLOPs; what is computed twice takes its time besides.
    repeated = hardware_flops(shape, kernel, parallel.recompute) / hardware_flops(shape, kernel, "none")
    one_image = model_flops(shape) * repeated / (parallel.tensor * parallel.pipeline) / (peak * utilization)
    launches = shape.depth / parallel.pipeline * KERNELS_PER_BLOCK * LAUNCH_SECONDS
    compute = layout.micro_batches * max(layout.micro_batch * one_image, launches)
    encode = 0.0 if tokenizer is None else share * tokenizer.encode_flops / (gpu.tf32 * TOKENIZER_UTILIZATION)
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    held = rank_parameters(shape, parallel, 0)
    return StepTime(
        compute=compute,
        encode=encode,
        bubble=compute * (stages - 1) / (layout.micro_batches * chunks),
        tensor=_tensor_seconds(batch, layout, machine),
        expert=_expert_seconds(batch, layout, machine),
        pipeline=_pipeline_seconds(batch, layout, machine),
        data=data_seconds(held, layout, machine, element),
        optimizer=optimizer_seconds(held, layout, machine),
    )


def _tensor_seconds(batch: MicroBatch, layout: Layout, machine: Machine) -> float:
    """Two all-reduces a block forward and two backward (or as many pairs of gather and scatter)."""
    parallel = batch.parallel
    if parallel.tensor == 1:
        return 0.0
    passes = 6 if parallel.recompute == "full" else 4
    blocks = batch.shape.depth / parallel.pipeline
    traffic = 2 * (parallel.tensor - 1) / parallel.tensor * batch.unit * passes * blocks
    return layout.micro_batches * traffic / machine.rate(parallel.tensor, 1)


def _expert_seconds(batch: MicroBatch, layout: Layout, machine: Machine) -> float:
    """Tokens to their experts and back, forward and backward."""
    parallel = batch.parallel
    if batch.shape.experts is None or parallel.expert == 1:
        return 0.0
    blocks = batch.shape.depth / parallel.pipeline
    away = (parallel.expert - 1) / parallel.expert
    if parallel.dispatcher == "alltoall":
        traffic = expert_tokens(batch) * batch.shape.width * batch.element * away
    else:
        traffic = batch.unit / parallel.tensor * (parallel.expert - 1)
    passes = 6 if parallel.recompute == "full" else 4
    return layout.micro_batches * blocks * passes * traffic / machine.rate(parallel.expert, 1)


def _pipeline_seconds(batch: MicroBatch, layout: Layout, machine: Machine) -> float:
    parallel = batch.parallel
    if parallel.pipeline == 1:
        return 0.0
    stride = layout.world_size // parallel.pipeline
    transfers = 2 * layout.micro_batches * parallel.virtual_pipeline
    return transfers * batch.unit / batch.between / machine.rate(parallel.pipeline, stride)


def data_seconds(held: RankParameters, layout: Layout, machine: Machine, element: int) -> float:
    """Gradients reduced and weights gathered, as often as the ZeRO stage does it."""
    times = {0: 2, 1: 2, 2: 1 + layout.micro_batches, 3: 3 * layout.micro_batches}[layout.zero.stage]
    seconds = 0.0
    for scalars, ranks, stride in (
        (held.replicated, layout.data, layout.parallel.tensor),
        (held.experts, layout.expert_data, layout.parallel.expert),
    ):
        if ranks > 1 and scalars:
            traffic = times * (ranks - 1) / ranks * scalars * element
            seconds += traffic / machine.rate(ranks, stride)
    return seconds


def optimizer_seconds(held: RankParameters, layout: Layout, machine: Machine) -> float:
    """The update of this rank's part of the optimizer state, limited by memory or, offloaded, by the host."""
    sharded = layout.zero.stage >= 1
    updated = held.replicated / (layout.data if sharded else 1) + held.experts / (layout.expert_data if sharded else 1)
    return updated * _ADAM_BYTES / (HOST_RATE if layout.zero.offload_optimizer else machine.gpu.bandwidth)
