"""The published ``FlexVAE.pth``: the authors' state dict, whose key names our modules carry."""

from collections.abc import Mapping

from torch import Tensor

from megavar.weight_layout import NamedLayout, Shape

_USAGE = "quantize.usage_average"


class LlamaGenVQLayout(NamedLayout):
    """Our names and shapes are the authors'.

    They have no ``quantize.usage_average``, which our training keeps: an export leaves it out, and :meth:`load` does,
    so that the model keeps its own.
    """

    belongs_to = "a LlamaGen VQ checkpoint"
    remedy = (
        "Give the checkpoint of a tokenizer with this configuration, or set the tokenizer keys of the config "
        "(base_channels, channel_multipliers, latent_channels, code_dimension, vocabulary_size, ...) to those the file "
        "was trained with."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The same name."""
        return (name,)

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.export`."""
        return super().export({name: value for name, value in tensors.items() if name != _USAGE})

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.load`."""
        return super().load(state, {name: shape for name, shape in expected.items() if name != _USAGE}, passed)
