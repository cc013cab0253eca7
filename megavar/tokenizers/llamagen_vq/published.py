"""The published ``FlexVAE.pth``: the authors' state dict, whose key names our modules carry."""

from megavar.tokenizers.published import SameNamesLayout


class LlamaGenVQLayout(SameNamesLayout):
    """Our names and shapes are the authors', but for ``quantize.usage_average``, which our training keeps."""

    belongs_to = "a LlamaGen VQ checkpoint"
    remedy = (
        "Give the checkpoint of a tokenizer with this configuration, or set the tokenizer keys of the config "
        "(base_channels, channel_multipliers, latent_channels, code_dimension, vocabulary_size, ...) to those the file "
        "was trained with."
    )
