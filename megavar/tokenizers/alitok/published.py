"""The published ``AliTok.pth``: the authors' state dict, whose key names our modules carry."""

from typing import ClassVar

from megavar.tokenizers.published import SameNamesLayout


class AliTokLayout(SameNamesLayout):
    """Our names and shapes are the authors'."""

    belongs_to = "an AliTok checkpoint"
    ours: ClassVar[tuple[str, ...]] = (*SameNamesLayout.ours, "trained_stage")
    remedy = (
        "Set image_side, patch, prefix, encoder, decoder, registers, causal, code_dimension and vocabulary_size of the "
        "section tokenizer to those of the file."
    )
