"""Configuration of checkpoints."""

from pydantic import Field

from megavar.config.base import Section


class CheckpointConfig(Section):
    """When to save and what to keep."""

    interval: int = Field(1000, ge=1)
    """Steps between checkpoints. The last step and an agreed stop are saved in any case."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Keep checkpoints whose step is a multiple of this for ever; 0 keeps none for ever."""
    asynchronous: bool = False
    """Write in the background while training goes on. Costs a copy in host memory: 12 bytes per parameter (16 with an
    EMA), divided by the data-parallel size."""
