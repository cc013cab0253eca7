"""Decoding of FlexVAR: any list of scales."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.errors import ConfigError

Sides = Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)]


class FlexVARSampling(NextScaleSampling):
    """Next-scale decoding with the rules of FlexVAR's ``autoregressive_infer_cfg``.

    The defaults are the released evaluation's at 256 pixels; at 512 it uses guidance 3.0 and lists up to 32.
    """

    implementation: ClassVar[str] = "megavar.sampling.procedures.flexvar:FlexVARDecoding"

    procedure: Literal["flexvar"] = "flexvar"  # type: ignore[assignment]
    guidance: float = Field(2.5, ge=0)
    """Classifier-free guidance, see ``guidance_form``."""
    top_p: float = Field(0.95, ge=0, le=1)
    """Then keep the smallest set of most likely tokens whose probability exceeds p; 0 keeps all."""
    scales: Sides | None = None
    """Side lengths of the token maps to draw, coarse to fine. The last one decides the image's size. Default: the
    tokenizer's. FlexVAR's paper draws 6 to 14 scales, its release 1 2 3 4 5 7 10 13 16 by default."""
    guidance_form: Literal["var", "llamagen"] = "var"
    """``var``: logits (1 + t) c - t u with t rising over the first scales; ``llamagen``: u + guidance (c - u)."""
    guidance_rise: int = Field(9, ge=1)
    """t = guidance x k / min(K - 1, this) at scale k of K: beyond 10 scales it exceeds the guidance (as released)."""
    largest: int = Field(16, ge=1)
    """Largest side that training has seen: above it t is the guidance itself, and tokens are the most likely ones."""
    sampled_sides: Sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)
    """Sides up to ``largest`` whose tokens are drawn; at all others the most likely ones are taken (as released)."""

    @model_validator(mode="after")
    def _coarse_to_fine(self) -> "FlexVARSampling":
        if self.scales is not None and any(b <= a for a, b in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales {list(self.scales)} do not all grow: list side lengths from coarse to fine")
        return self

    def tokenizer_of(self, trained: TokenizerChoice) -> TokenizerChoice:
        """The same tokenizer at ``scales``."""
        if self.scales is None:
            return trained
        values: dict[str, Any] = trained.model_dump()
        if "scales" not in values:
            raise ConfigError(
                f"sampling.scales asks for maps of other sides, but tokens of the tokenizer {trained.name!r} are no "
                f"maps of scales. Leave sampling.scales out."
            )
        return type(trained)(**(values | {"scales": self.scales}))
