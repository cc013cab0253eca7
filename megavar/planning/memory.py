"""Memory of one rank, part by part. Bytes per parameter follow what DeepSpeed's ZeRO stages really allocate.

With w bytes per weight (2 under bf16, 4 under fp32) and d data-parallel ranks, per parameter:

======  =========  =========  ==============  ==========
stage   weights    gradients  fp32 master     moments
======  =========  =========  ==============  ==========
0       w          w          none            8
1       w          w          4 / d           8 / d
2       w          w / d      4 / d           8 / d
3       w / d      w / d      4 / d           8 / d
======  =========  =========  ==============  ==========

plus buckets in which gradients are reduced, and under stage 3 the parameters gathered at a time. Experts count with the
number of ranks that hold the same experts. DeepSpeed keeps the fp32 master copy under fp32, too. Checked against the
tensors of real engines in tests/planning/test_memory.py.
"""

from dataclasses import dataclass

from megavar.config.parallel import ParallelConfig
from megavar.planning.breakdown import Breakdown
from megavar.planning.cost import Cost, RankParameters, TokenizerCost
from megavar.planning.hardware import EXPERT_IMBALANCE, FRAGMENTATION, RESERVED
from megavar.planning.layout import Layout

FLOAT32 = 4
SEARCH_BYTES = 2**28
"""The tokenizer's distances to its codes (``quantizer.py``)."""


@dataclass(frozen=True)
class Memory(Breakdown):
    """Bytes on the device at the fullest moment of a step, by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    """Master weights and both moments."""
    ema: float
    buckets: float
    """Gradient buckets, and parameters gathered by ZeRO-3."""
    activations: float
    logits: float = 0.0
    """Head, logits and cross entropy."""
    working: float = 0.0
    """Gradients inside a block and, under full recomputation, its activations; beyond what the logits leave, which are
    gone by then."""
    tokenizer: float = 0.0
    """The frozen tokenizer's weights, and the step's images and features."""
    encoding: float = 0.0
    """What encoding a micro-batch takes beyond the room that training leaves at that moment."""
    reserved: float = 0.0
    """CUDA context, libraries, fragmentation."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank that stay from step to step, and the gradients."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    host: float
    """Offloaded to the memory of the node."""


def state_bytes(parameters: RankParameters, layout: Layout, element: int, *, ema: bool) -> StateBytes:
    """Weights, gradients and optimizer state of a rank."""
    zero = layout.zero
    # Without expert and tensor parallelism DeepSpeed sees experts as ordinary parameters.
    ranks = {True: layout.data, False: layout.expert_data}
    held = {True: parameters.replicated, False: parameters.experts}

    def spread(bytes_per_parameter: float, sharded: bool) -> float:
        return sum(held[kind] * bytes_per_parameter / (ranks[kind] if sharded else 1) for kind in held)

    weights = spread(element, zero.stage == 3)
    optimizer = spread(12 if zero.stage else 8, zero.stage >= 1)
    host = (optimizer if zero.offload_optimizer else 0.0) + (weights if zero.offload_parameters else 0.0)
    return StateBytes(
        weights=0.0 if zero.offload_parameters else weights,
        gradients=spread(element, zero.stage >= 2),
        optimizer=0.0 if zero.offload_optimizer else optimizer,
        ema=spread(FLOAT32, zero.stage >= 1) if ema else 0.0,
        host=host,
    )


def bucket_bytes(parameters: RankParameters, layout: Layout, element: int) -> float:
    """Gradient buckets, and parameters that ZeRO-3 gathers at a time."""
    zero = layout.zero
    if zero.stage == 0:
        return 0.0
    gathered = min(parameters.total, zero.live_parameters) * element if zero.stage == 3 else 0.0
    return zero.bucket * element * zero.buckets + gathered


def imbalance(parallel: ParallelConfig) -> float:
    """Tokens of the busiest rank's experts over the mean."""
    return EXPERT_IMBALANCE if parallel.expert > 1 else 1.0


def chunks_in_flight(parallel: ParallelConfig, pipeline_rank: int, micro_batches: int) -> int:
    """Forward passes of a model chunk whose backward pass is still to come, at most (Megatron-core's schedules)."""
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks == 1:
        return min(micro_batches, stages - pipeline_rank)
    warmup = (stages - pipeline_rank - 1) * 2 + (chunks - 1) * stages
    return min(micro_batches * chunks, warmup + 1)


@dataclass(frozen=True)
class ActivationBytes(Breakdown):
    """What forward and backward passes hold on a rank at its fullest moment."""

    blocks: float
    """Kept by the blocks of all micro-batches whose backward pass is still to come."""
    head: float
    """Head, logits and loss; none on earlier pipeline stages."""
    working: float
    """Inside the fullest block, beyond the room that the head leaves, which is done by then."""


def activation_bytes(
    cost: Cost, layout: Layout, pipeline_rank: int, busiest: float | None = None, largest: float = 1.0
) -> ActivationBytes:
    """Activations of a rank.

    Args:
        busiest: tokens of this rank's experts over the mean; None assumes :func:`imbalance`.
        largest: tokens of the fullest pass of a step over those of its images.
    """
    parallel, images = layout.parallel, layout.micro_batch * largest
    spread = imbalance(parallel) if busiest is None else busiest
    is_last = pipeline_rank == parallel.pipeline - 1
    held = cost.stage(parallel, pipeline_rank)
    blocks = held[pipeline_rank == 0 : len(held) - is_last]
    kept = sum(block.saved.at(images) + block.routed.at(images) * spread for block in blocks)
    kept /= parallel.virtual_pipeline  # of one chunk
    if parallel.pipeline > 1:
        kept += cost.packed.at(images)
    head = cost.head.peak.at(images) if is_last else 0.0
    working = max(block.peak.at(images) + (spread - 1) * block.routed.at(images) for block in blocks)
    in_flight = chunks_in_flight(parallel, pipeline_rank, layout.micro_batches)
    return ActivationBytes(kept * in_flight, head, max(0.0, working - head))


def rank_memory(
    cost: Cost,
    layout: Layout,
    *,
    pipeline_rank: int,
    element: int,
    ema: bool,
    tokenizer: TokenizerCost | None,
    image_bytes: float,
    largest: float = 1.0,
) -> Memory:
    """Memory of a rank of one pipeline stage.

    Args:
        cost: of the generator under the layout's tensor-parallel size and recomputation.
        element: bytes of a weight.
        ema: whether a moving average of the weights is kept.
        tokenizer: costs of the frozen tokenizer; None where tokens are cached.
        image_bytes: of one prepared image: pixels, tokens, features.
        largest: tokens of the fullest pass of a step over those of its images.
    """
    parameters = cost.parameters(layout.parallel, pipeline_rank)
    state = state_bytes(parameters, layout, element, ema=ema)
    activations = activation_bytes(cost, layout, pipeline_rank, largest=largest)
    buckets = bucket_bytes(parameters, layout, element)
    training = state.gradients + buckets + activations.total
    encoding = 0.0 if tokenizer is None else layout.micro_batch * tokenizer.encode_bytes + SEARCH_BYTES
    inputs = layout.micro_batch * layout.micro_batches * image_bytes
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        ema=state.ema,
        buckets=buckets,
        activations=activations.blocks,
        logits=activations.head,
        working=activations.working,
        tokenizer=inputs + (0.0 if tokenizer is None else tokenizer.parameters * FLOAT32),
        encoding=max(0.0, encoding - training),
        reserved=RESERVED + FRAGMENTATION * max(training, encoding),
    )
