"""FlexVAR's tokenizer."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from megavar.config.tokenizers.convolutional import MultiScaleConfig


class LlamaGenVQConfig(MultiScaleConfig):
    """LlamaGen's VQ autoencoder, whose feature map FlexVAR quantizes at every scale by itself (arXiv:2502.20313).

    The defaults are the published 256-pixel model ``FlexVAE.pth``: LlamaGen's ``VQ-16`` with codes of 32 channels.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.llamagen_vq:LlamaGenVQ"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "flexvar": "megavar.tokenizers.llamagen_vq.published:LlamaGenVQLayout"
    }

    name: Literal["llamagen_vq"] = "llamagen_vq"
    vocabulary_size: Annotated[int, Field(ge=2)] = 8912
    """Number of code vectors, shared by all scales. The published file has 8912 (not 8192) rows."""
    code_dimension: PositiveInt = 32
    """Channels of a code vector."""
    latent_channels: PositiveInt = 256
    """Channels between the autoencoder and the 1x1 convolutions around the quantizer."""
    usage_window: PositiveInt = 65536
    """Entries of the published buffer ``codebook_used``, which only the authors' training reads."""

    @model_validator(mode="after")
    def _scales_grow(self) -> "LlamaGenVQConfig":
        if any(b <= a for a, b in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales {list(self.scales)} do not all grow: list side lengths from coarse to fine")
        return self
