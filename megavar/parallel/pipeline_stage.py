"""What the engine asks of a module that can be cut into pipeline stages."""

from typing import Any, Protocol, runtime_checkable

from megatron.core.transformer import TransformerConfig
from torch import Tensor


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
