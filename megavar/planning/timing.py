"""How long a step takes, from FLOPs at an assumed utilization and bytes over links at their rates.

Nothing is assumed to overlap: ZeRO stages 0 and 1 reduce gradients after the last micro-batch in this trainer.
"""

from dataclasses import dataclass

from megavar.planning.breakdown import Breakdown
from megavar.planning.cost import Cost, RankParameters, TokenizerCost
from megavar.planning.hardware import (
    HOST_RATE,
    KERNELS_PER_BLOCK,
    LAUNCH_SECONDS,
    LINK_EFFICIENCY,
    TOKENIZER_UTILIZATION,
    Accelerator,
)
from megavar.planning.layout import Layout
from megavar.planning.memory import imbalance
from megavar.planning.passes import Work

_ADAM_BYTES = 30  # read and written per parameter: master, moments, gradient, weight


@dataclass(frozen=True)
class StepTime(Breakdown):
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


@dataclass(frozen=True)
class Machine:
    """The accelerators of a run."""

    gpu: Accelerator
    gpus_per_node: int
    block_floor: float = KERNELS_PER_BLOCK * LAUNCH_SECONDS
    """Seconds of a block forward and backward, however few images it has."""
    tokenizer_utilization: float = TOKENIZER_UTILIZATION
    """Share of the TF32 peak that the frozen tokenizer's convolutions reach."""
    link_efficiency: float = LINK_EFFICIENCY
    """Share of a link's rate that collectives reach; 1 where the rate is that of a collective."""

    def rate(self, ranks: int, stride: int) -> float:
        """Bytes per second of collectives over ``ranks`` ranks that lie ``stride`` apart.

        Between nodes the members of one node share the links that their GPUs have to the network.
        """
        if ranks * stride <= self.gpus_per_node:
            return self.gpu.link * self.link_efficiency
        members = max(1, self.gpus_per_node // stride)
        return min(self.gpu.link * self.link_efficiency, self.gpu.network * members * LINK_EFFICIENCY)


def step_flops(cost: Cost, work: Work, repetition: float = 1.0) -> float:
    """Model FLOPs of an image in all passes of a step.

    Args:
        cost: of the undivided generator.
        work: of its passes.
        repetition: factor by which recomputation prolongs those with a loss.
    """
    return work.trained * cost.model_flops * repetition + work.rolled_out * cost.forward_flops


def step_time(
    cost: Cost,
    layout: Layout,
    machine: Machine,
    *,
    whole: Cost,
    work: Work,
    utilization: float,
    element: int,
    tokenizer: TokenizerCost | None,
) -> StepTime:
    """Time of a step.

    Args:
        cost: of the generator under the layout's tensor-parallel size and recomputation.
        whole: of the undivided generator.
        work: of the passes of a step over the generator.
        utilization: model FLOPs over peak while blocks compute, without communication and encoding.
        element: bytes of a weight.
        tokenizer: of the frozen tokenizer; None where tokens are cached.
    """
    parallel, gpu = layout.parallel, machine.gpu
    share = layout.micro_batch * layout.micro_batches
    peak = gpu.bf16 if element == 2 else gpu.fp32
    # Utilization counts model FLOPs; what is computed twice takes its time besides.
    flops = step_flops(whole, work, cost.repetition) / (parallel.tensor * parallel.pipeline)
    one_image = flops / (peak * utilization)
    blocks = len(cost.kind_of_block) / parallel.pipeline
    launches = blocks * machine.block_floor * work.launched
    compute = layout.micro_batches * max(layout.micro_batch * one_image, launches)
    encoding = gpu.tf32 * machine.tokenizer_utilization
    encode = 0.0 if tokenizer is None else share * tokenizer.encode_flops / encoding
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    held = cost.parameters(parallel, 0)
    exchanges = _exchanges(cost, layout, work)
    return StepTime(
        compute=compute,
        encode=encode,
        bubble=compute * (stages - 1) / (layout.micro_batches * chunks),
        tensor=_tensor_seconds(cost, layout, machine) * exchanges,
        expert=_expert_seconds(cost, layout, machine) * exchanges,
        pipeline=_pipeline_seconds(cost, layout, machine) * (work.trained_tokens + work.rolled_out_tokens / 2),
        data=data_seconds(held, layout, machine, element),
        optimizer=optimizer_seconds(held, layout, machine),
    )


def _exchanges(cost: Cost, layout: Layout, work: Work) -> float:
    """How often a rank's blocks exchange activations in a step: twice forward, twice backward, and when repeated."""
    each = (6 if layout.parallel.recompute == "full" else 4) * work.trained_tokens + 2 * work.rolled_out_tokens
    return layout.micro_batches * len(cost.kind_of_block) / layout.parallel.pipeline * each


def _tensor_seconds(cost: Cost, layout: Layout, machine: Machine) -> float:
    """One all-reduce (or pair of gather and scatter) of hidden states."""
    tensor = layout.parallel.tensor
    if tensor == 1:
        return 0.0
    return 2 * (tensor - 1) / tensor * cost.hidden.at(layout.micro_batch) / machine.rate(tensor, 1)


def _expert_seconds(cost: Cost, layout: Layout, machine: Machine) -> float:
    """Tokens on their way to experts, or back."""
    parallel = layout.parallel
    if parallel.expert == 1:
        return 0.0
    if parallel.dispatcher == "alltoall":
        away = (parallel.expert - 1) / parallel.expert
        traffic = cost.exchanged.at(layout.micro_batch) * imbalance(parallel) * away
    else:
        traffic = cost.hidden.at(layout.micro_batch) / parallel.tensor * (parallel.expert - 1)
    return traffic / machine.rate(parallel.expert, 1)


def _pipeline_seconds(cost: Cost, layout: Layout, machine: Machine) -> float:
    """Transfers between stages of a pass forward and backward over all micro-batches."""
    parallel = layout.parallel
    if parallel.pipeline == 1:
        return 0.0
    stride = layout.world_size // parallel.pipeline
    transfers = 2 * layout.micro_batches * parallel.virtual_pipeline
    return transfers * cost.packed.at(layout.micro_batch) / machine.rate(parallel.pipeline, stride)


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
