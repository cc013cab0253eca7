"""The published ``FlexVAE.pth``: the authors' state dict, whose key names our modules carry."""

from megavar.weight_layout import NamedLayout


class LlamaGenVQLayout(NamedLayout):
    """Our names and shapes are the authors'."""

    belongs_to = "a LlamaGen VQ checkpoint"
    remedy = (
        "Give the checkpoint of a tokenizer with this configuration, or set the tokenizer keys of the config "
        "(base_channels, channel_multipliers, latent_channels, code_dimension, vocabulary_size, ...) to those the file "
        "was trained with."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The same name."""
        return (name,)
