"""One way to run a configuration: sizes of the mesh, ZeRO, micro-batch. What plans are made of."""

from dataclasses import dataclass
from typing import Any

from megavar.config.parallel import ParallelConfig
from megavar.parallel.topology import data_parallel_size

BUCKET = 500_000_000
"""DeepSpeed's default for ``reduce_bucket_size``, in elements."""
SHIPPED_BUCKET = 50_000_000
"""What ``configs/deepspeed/zero1.json``, ``zero2.json`` and ``zero3.json`` say."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default for ``stage3_max_live_parameters``."""


@dataclass(frozen=True)
class Zero:
    """What the DeepSpeed JSON decides about memory."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = BUCKET
    """Elements of a gradient bucket."""
    buckets: int = 1
    """Two where communication overlaps with the backward pass."""
    live_parameters: int = LIVE_PARAMETERS

    @staticmethod
    def of(content: dict[str, Any], stage: int | None = None) -> "Zero":
        """From a DeepSpeed JSON's content; ``stage`` is the one that runs in place of the one it asks for."""
        zero = content.get("zero_optimization", {})

        def offloaded(name: str) -> bool:
            section = zero.get(name)
            return isinstance(section, dict) and section.get("device", "none") != "none"

        def number(names: tuple[str, ...], default: int) -> int:
            values = [zero[name] for name in names if zero.get(name, "auto") != "auto"]
            return int(values[0]) if values else default

        runs = int(zero.get("stage", 0)) if stage is None else stage
        return Zero(
            stage=runs,
            offload_optimizer=offloaded("offload_optimizer"),
            offload_parameters=offloaded("offload_param"),
            bucket=number(("reduce_bucket_size",), BUCKET),
            buckets=2 if runs == 2 and zero.get("overlap_comm") else 1,
            live_parameters=number(("max_live_parameters", "stage3_max_live_parameters"), LIVE_PARAMETERS),
        )


@dataclass(frozen=True)
class Layout:
    """A mesh with its ZeRO settings and micro-batch."""

    parallel: ParallelConfig
    zero: Zero
    world_size: int
    global_batch: int
    micro_batch: int
    """Images that a rank computes at a time."""

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return data_parallel_size(self.parallel, self.world_size)[0]

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return data_parallel_size(self.parallel, self.world_size)[1]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank per step."""
        return self.global_batch // (self.data * self.micro_batch)
