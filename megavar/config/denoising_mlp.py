"""Sizes of the small network that predicts how a single token is denoised (MAR's diffusion head, VGT's flow head)."""

from pydantic import Field, model_validator

from megavar.config.base import Section


class DenoisingMLPConfig(Section):
    """Residual blocks of two layers, modulated by time and condition; no token sees another.

    The defaults are VGT's (150.6, 151.6, 152.4 M parameters on language models of width 896, 1536, 2048).
    """

    width: int = Field(1536, ge=1)
    """Hidden size W."""
    depth: int = Field(12, ge=1)
    """Blocks."""
    expansion: float = Field(1.0, gt=0)
    """Inner size of a block's network divided by W."""
    decoder_width: int | None = Field(None, ge=1)
    """Hidden size of a second, wider stack that only sees what the first made of the token and its time (DDT, Wang et
    al. 2025; in VGT's code, used by none of its configurations). None: there is none."""
    decoder_depth: int = Field(0, ge=0)
    """Its blocks."""

    @model_validator(mode="after")
    def _both(self) -> "DenoisingMLPConfig":
        if (self.decoder_width is None) != (self.decoder_depth == 0):
            raise ValueError("a second stack needs both decoder_width and decoder_depth")
        return self

    def inner(self, width: int) -> int:
        """Inner size of a block of this width."""
        return int(width * self.expansion)

    def shared(self, key: str) -> dict[str, int]:
        """What tensor-parallel ranks share of it; ``key`` names the section in messages."""
        found = {
            f"channels of the head ({key}.width)": self.width,
            f"inner channels of the head ({key}.width, expansion)": self.inner(self.width),
        }
        if self.decoder_width is not None:
            found[f"channels of the head's second stack ({key}.decoder_width)"] = self.decoder_width
        return found
