"""TiTok's public files: ``tokenizer_titok_*_imagenet`` (``model.safetensors``) and the checkpoints of its stages."""

from typing import ClassVar

from megavar.tokenizers.published import SameNamesLayout

_FUSED = ".attn.in_proj."


class TiTokLayout(SameNamesLayout):
    """Our names, but for ``attn.in_proj_weight`` and ``attn.in_proj_bias``."""

    belongs_to = "a TiTok checkpoint"
    remedy = (
        "Set tokens, encoder, decoder, patch, decoder_patch, code_dimension, vocabulary_size, quantization, legacy and "
        "pixel of the section tokenizer to those of the file."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The public name."""
        return (name.replace(_FUSED, ".attn.in_proj_"),)


class TiTokStage1Layout(TiTokLayout):
    """Without the pixel decoder, which the first stage does not have: the model keeps its own."""

    ours: ClassVar[tuple[str, ...]] = (*TiTokLayout.ours, "pixel_decoder.", "pixel_quantize.")
