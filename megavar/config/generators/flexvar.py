"""FlexVAR's next-scale transformer."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.generators.scale_transformer import ScaleTransformerConfig


class FlexVARConfig(ScaleTransformerConfig):
    """FlexVAR (Jiao et al. 2025, arXiv:2502.20313): VAR's transformer for any list of scales.

    No embedding of the scale's number; one learned map of positions, resized to each scale. With the published 8912
    codes: d16 315,561,936, d20 607,513,952, d24 1,041,314,576 parameters.
    """

    implementation: ClassVar[str] = "megavar.generators.flexvar:FlexVAR"
    weight_layouts: ClassVar[Mapping[str, str]] = {"flexvar": "megavar.generators.flexvar.published:FlexVARLayout"}

    name: Literal["flexvar"] = "flexvar"
    position_side: int = Field(32, ge=1)
    """Side of the learned map of positions (published: 32, the last scale of 512-pixel images)."""
