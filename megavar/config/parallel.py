"""How the model is spread over devices."""

from typing import Literal

from pydantic import Field

from megavar.config.base import Section


class ParallelConfig(Section):
    """Sizes of the parallel dimensions. The data-parallel size is what remains: world size / (tensor x pipeline)."""

    tensor: int = Field(1, ge=1)
    """Tensor parallel size: ranks that share each attention and feed-forward matrix."""
    sequence: bool = False
    """Sequence parallel: shard the activations between blocks over the tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages: consecutive groups of blocks."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per pipeline stage (interleaved 1F1B schedule) when above 1."""
    expert: int = Field(1, ge=1)
    """Expert parallel size: ranks that share the experts of a layer. It divides tensor x data-parallel size."""
    context: Literal[1] = 1
    """Context parallel size. Sequences of visual tokens are short: only 1 is offered."""
    dispatcher: Literal["allgather", "alltoall"] = "alltoall"
    """How tokens travel to their experts (Megatron-core token dispatcher)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: nothing, the attention core of each block, or whole blocks."""
