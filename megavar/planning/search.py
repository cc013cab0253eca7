"""Searches the layouts that a run could use instead, and ranks those that fit by their step time."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Literal

from megavar.errors import ConfigError
from megavar.parallel.rules import check_layout
from megavar.planning.layout import SHIPPED_BUCKET, Layout, Zero
from megavar.planning.workload import Prediction, Workload

STAGES = (1, 2, 3)
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
EQUAL = 0.01
"""Times and memories whose ratio is closer to 1 than this count as equal: then the simpler layout wins."""


def _sizes(largest: int) -> Iterator[int]:
    size = 1
    while size <= largest:
        yield size
        size *= 2


def candidates(workload: Workload, base: Layout) -> Iterator[Layout]:
    """Layouts of the same ranks and the same global batch, simplest first; the rules may forbid some."""
    limits, world = workload.limits, base.world_size
    experts = 1 if limits is None or limits.experts is None else limits.experts.number
    recomputations = RECOMPUTE if limits is not None else RECOMPUTE[:1]
    for tensor in _sizes(min(world, workload.machine.gpus_per_node) if limits is not None else 1):
        for pipeline in _sizes(min(world // tensor, limits.depth) if limits is not None else 1):
            for expert in _sizes(min(world // pipeline, experts)):
                parallel = base.parallel.model_copy(
                    update={"tensor": tensor, "sequence": tensor > 1, "pipeline": pipeline, "virtual_pipeline": 1,
                            "expert": expert}
                )  # fmt: skip
                data = world // (tensor * pipeline)
                if world % (tensor * pipeline) or base.global_batch % data:
                    continue
                share = base.global_batch // data
                for stage in STAGES if pipeline == 1 else (1,):
                    for micro in (size for size in range(share, 0, -1) if share % size == 0):
                        for recompute in recomputations:
                            yield Layout(
                                parallel.model_copy(update={"recompute": recompute}), _zero(base, stage), world,
                                base.global_batch, micro,
                            )  # fmt: skip


def _zero(base: Layout, stage: int) -> Zero:
    """DeepSpeed's settings of ``configs/deepspeed/zero<stage>.json``, or the base's own where it has that stage."""
    if stage == base.zero.stage and not base.zero.offload_optimizer:
        return base.zero
    return Zero(stage, bucket=SHIPPED_BUCKET, buckets=2 if stage == 2 else 1)


def is_allowed(workload: Workload, layout: Layout) -> bool:
    """Whether the rules of layouts allow it."""
    try:
        check_layout(
            layout.parallel,
            workload.limits,
            zero_stage=layout.zero.stage,
            world_size=layout.world_size,
            micro_batches=layout.micro_batches,
        )
    except ConfigError:
        return False
    return True


def allowed_candidates(workload: Workload, base: Layout) -> list[Layout]:
    """:func:`candidates` that the rules allow."""
    return [layout for layout in candidates(workload, base) if is_allowed(workload, layout)]


def _mesh(layout: Layout) -> tuple:
    parallel = layout.parallel
    return parallel.tensor, parallel.pipeline, parallel.expert, layout.zero.stage


def complexity(layout: Layout) -> tuple:
    """Order of preference among equally fast layouts."""
    parallel = layout.parallel
    return (
        parallel.pipeline,
        parallel.tensor,
        layout.zero.stage,
        RECOMPUTE.index(parallel.recompute),
        parallel.expert,
        layout.micro_batches,
    )


def suggest(workload: Workload, base: Layout, count: int) -> list[Prediction]:
    """The ``count`` best layouts that fit, fastest first, one per mesh and ZeRO stage.

    Where nothing fits, the same with ZeRO-3 and everything offloaded is tried last.
    """
    allowed = allowed_candidates(workload, base)
    found = _fitting(workload, allowed)
    if not found:
        offloaded = Zero(3, offload_optimizer=True, offload_parameters=True)
        layouts = [dataclasses.replace(layout, zero=offloaded) for layout in allowed if layout.zero.stage == 3]
        found = _fitting(workload, layouts)
    best: dict[tuple, Prediction] = {}
    for prediction in found:
        best.setdefault(_mesh(prediction.layout), prediction)
    chosen: list[Prediction] = []
    for prediction in best.values():  # in the order of their times: a later one must at least need less memory
        if all(prediction.memory.total < other.memory.total * (1 - EQUAL) for other in chosen):
            chosen.append(prediction)
    return chosen[:count]


def _fitting(workload: Workload, layouts: Iterable[Layout]) -> list[Prediction]:
    capacity = workload.machine.gpu.memory
    fitting = [prediction for prediction in map(workload.predict, layouts) if prediction.fits(capacity)]

    def rank(prediction: Prediction) -> tuple:
        return round(math.log(prediction.time.total) / EQUAL), complexity(prediction.layout)

    return sorted(fitting, key=rank)
