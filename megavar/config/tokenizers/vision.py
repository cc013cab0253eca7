"""What tokenizers of vision transformers share."""

from pydantic import PositiveInt, model_validator

from megavar.config.base import Section


class VisionTransformerConfig(Section):
    """Sizes of a vision transformer."""

    width: PositiveInt
    """Hidden size."""
    depth: PositiveInt
    """Number of blocks."""
    heads: PositiveInt
    """Attention heads."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "VisionTransformerConfig":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}: change one of them")
        return self
