"""Where experts are used (MEPA Fig. 4)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class RoutingMapsAnalysis(ObservedChoice):
    """How often each expert is chosen at each place of each scale."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.routing_maps:RoutingMaps"

    kind: Literal["routing_maps"] = "routing_maps"
    block: int | None = Field(None, ge=0)
    """Number, from 0, of the block that is drawn. Default: the last but one with experts, as in the paper."""
