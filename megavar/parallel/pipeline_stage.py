"""Pipeline stages: which part of a model one is, and what the engine asks of it."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavar.config.parallel import ParallelConfig


@runtime_checkable
class PipelineStage(Protocol):
    """One stage (or chunk of a stage, under virtual pipelining); the whole model where there is one stage."""

    config: TransformerConfig
    """Megatron-core's schedules read it."""
    balance: float
    """Weight of the routers' balance losses of a micro-batch in the pass that runs now; the engine sets it."""

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by the schedules with what the previous stage returned."""
        ...

    def payload_length(self, inputs: Any) -> int:
        """Rows of the packed tensor that stages exchange when the module is called with ``inputs``, times the
        tensor-parallel size under sequence parallelism: the schedules divide by it. Equal for all micro-batches of a
        pass; another step's inputs may have another length.
        """
        ...


@dataclass(frozen=True)
class Stage:
    """The part of the model that a rank holds: a range of blocks, perhaps with the first or the last modules."""

    first_block: int
    blocks: int
    is_first: bool
    is_last: bool

    @staticmethod
    def split(depth: int, parallel: ParallelConfig, pipeline_rank: int, chunk: int = 0) -> "Stage":
        """Stage of a pipeline rank; with virtual pipelining ``chunk`` counts its model chunks."""
        chunks = parallel.pipeline * parallel.virtual_pipeline
        position = chunk * parallel.pipeline + pipeline_rank
        blocks = depth // chunks
        return Stage(position * blocks, blocks, position == 0, position == chunks - 1)
