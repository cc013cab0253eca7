"""TiTok's first stage."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.base import PathText
from megavar.config.recipes.base import RecipeChoice
from megavar.config.recipes.tokenizer import CodebookConfig


class ProxyCodesConfig(RecipeChoice):
    """Training of a tokenizer to predict the codes of another one (TiTok section 3.3, "warm-up" stage; 1d-tokenizer
    ``ReconstructionLoss_Stage1``). The recipe ``tokenizer`` with ``trained: decoder`` is the second stage, which begins
    with a run of this one (``train.initial_weights``)."""

    implementation: ClassVar[str] = "megavar.recipes.tokenizer.proxy_codes:ProxyCodes"
    trains: ClassVar[Literal["generator", "tokenizer", "teacher"]] = "tokenizer"

    name: Literal["proxy_codes"] = "proxy_codes"
    proxy_weights: PathText
    """The VQGAN whose codes are predicted: a run of ours, or a public file (``maskgit-vqgan-imagenet-f16-256.bin``).
    Its sizes are ``tokenizer.pixel``."""
    quantizer_weight: float = Field(1.0, ge=0)
    """Weight of the codebook and commitment loss (released configurations: 1)."""
    codebook: CodebookConfig = CodebookConfig(draw_from_data=False, revive_every=0)
    """Dead codes: none is replaced, as in the public code, whose codes have unit length."""

    def frozen_weights(self) -> dict[str, str]:
        """The proxy."""
        return {"proxy": self.proxy_weights}

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The proxy's encoder."""
        return ("the encoder of the proxy",)
