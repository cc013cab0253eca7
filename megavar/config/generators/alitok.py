"""AliTok's transformer."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.generators.raster_transformer import RasterTransformerConfig


class AliTokConfig(RasterTransformerConfig):
    """AliTok's autoregressive transformer (Wu et al. 2025, arXiv:2506.05289): Llama's blocks, token by token.

    The defaults are AliTok-B (177,048,064 parameters with 4096 codes); L has width 1024 (317,851,648), XL 1280 and
    depth 32 (662,141,696). All have 16 heads.
    """

    implementation: ClassVar[str] = "megavar.generators.alitok:AliTok"
    weight_layouts: ClassVar[Mapping[str, str]] = {"alitok": "megavar.generators.alitok.published:AliTokLayout"}

    name: Literal["alitok"] = "alitok"
    feed_forward: int | None = Field(None, ge=1)
    """Hidden size of the gated network. Default: 8 C / 3, rounded up to a multiple of 256."""
    prefix_tokens: int = Field(17, ge=0)
    """Tokens before those of the grid: they turn by their place on a line (AliTok's tokenizer: 17)."""
    grid: int = Field(16, ge=1)
    """Side of the grid of the other tokens: they turn by their row and column, counted on from ``prefix_tokens``."""
    target_positions: bool = False
    """Whether each row is told, by a learned vector, the place of the token that it predicts, as RAR's rows are: then
    ``recipe.random_order`` can be trained (reAR Table 2, RAR-B-AliTok: 0.2 M parameters more, still 177 M)."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout after attention and after the feed-forward network. AliTok also drops attention's probabilities, at the
    same rate, which fused kernels cannot do for masks that belong to samples: left out, as in ``rar``."""
    token_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of embedded tokens."""

    @model_validator(mode="after")
    def _check(self) -> "AliTokConfig":
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width={self.width} is not a multiple of 4 heads={4 * self.heads}: pairs of a head's channels turn by "
                f"row and by column. Change one of them"
            )
        return self

    @property
    def any_order(self) -> bool:
        """Where rows know what they predict."""
        return self.target_positions

    @property
    def feed_forward_size(self) -> int:
        """Rows of each half of the feed-forward network's first layer."""
        return self.feed_forward or -(-(8 * self.width // 3) // 256) * 256
