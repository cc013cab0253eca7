"""Drawing of MAR."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.procedures.base import SamplingChoice


class MARSampling(SamplingChoice):
    """MAR's decoding (``sample_tokens``): in each iteration some of the masked tokens, more and more, by diffusion."""

    implementation: ClassVar[str] = "megavar.sampling.procedures.mar:MaskedDecoding"

    procedure: Literal["mar"] = "mar"
    iterations: int = Field(64, ge=1)
    """Passes over the image; at most as many as it has tokens (released: 64, or 256 for the printed FIDs). VGT's
    "acceleration" 4x of 256 tokens is 64."""
    guidance: float = Field(1.0, ge=1)
    """Classifier-free guidance g of the last iteration: u + g (c - u) of the noise (released: 2.9 to 3.2)."""
    guidance_schedule: Literal["linear", "constant"] = "linear"
    """``linear``: 1 + (g - 1) times the share of tokens that are known afterwards."""
    temperature: float = Field(1.0, gt=0)
    """Multiplies the noise of every diffusion step."""
    steps: int = Field(100, ge=1)
    """Diffusion steps, of 1000 times."""
    spacing: Literal["even", "strided"] = "even"
    """Which times: from first to last, or at a whole distance (released: "100", "ddim100")."""

    @property
    def guided(self) -> bool:
        """With any guidance."""
        return self.guidance > 1

    @model_validator(mode="after")
    def _strides_exist(self) -> "MARSampling":
        if self.spacing == "strided" and not any(len(range(0, 1000, by)) == self.steps for by in range(1, 1000)):
            raise ValueError(f"steps={self.steps}: no whole distance gives so many of 1000 times; choose spacing=even")
        return self
