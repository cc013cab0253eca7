"""The published ``maskgit-vqgan-imagenet-f16-256.bin``: ``encoder.*``, ``decoder.*``, ``quantize.embedding.weight``."""

from megavar.tokenizers.published import SameNamesLayout


class MaskGITVQGANLayout(SameNamesLayout):
    """Our names and shapes are those of the public port, but for ``quantize.usage_average`` of our training."""

    belongs_to = "a MaskGIT-VQGAN checkpoint"
    remedy = (
        "Give the checkpoint of a tokenizer with this configuration, or set base_channels, channel_multipliers, "
        "residual_blocks, code_dimension and vocabulary_size of the section tokenizer to those of the file."
    )
