"""RAR's raster transformer."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.generators.raster_transformer import RasterTransformerConfig


class RARConfig(RasterTransformerConfig):
    """RAR (Yu et al. 2024, arXiv:2411.00776) and reAR: token by token, in raster or any other order.

    The defaults are RAR-B (260,923,648 parameters with MaskGIT-VQGAN's 1024 codes); RAR-L has width 1024, RAR-XL 1280
    and depth 32. reAR has S, B and L: depth 20, 24, 24 and width 768, 768, 1024. All have 16 heads.
    """

    implementation: ClassVar[str] = "megavar.generators.rar:RAR"
    weight_layouts: ClassVar[Mapping[str, str]] = {"rar": "megavar.generators.rar.published:RARLayout"}

    name: Literal["rar"] = "rar"
    feed_forward: int | None = Field(None, ge=1)
    """Hidden size of the feed-forward network. Default: 4 C."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout after attention and in and after the feed-forward network. RAR also drops attention's probabilities, at
    the same rate, which fused kernels cannot do for masks that belong to samples: left out."""
    spare_positions: int = Field(1024, ge=2)
    """Rows of the tables of positions beyond the image's tokens: the prefix's two, the others unused (published)."""
    spare_steps: int = Field(100, ge=2)
    """Rows of the table of steps beyond the image's tokens (published)."""

    @model_validator(mode="after")
    def _check(self) -> "RARConfig":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}: change one of them")
        return self

    @property
    def any_order(self) -> bool:
        """Yes."""
        return True

    @property
    def feed_forward_size(self) -> int:
        """Rows of the feed-forward network's first layer."""
        return self.feed_forward or 4 * self.width
