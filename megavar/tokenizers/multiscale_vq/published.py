"""VAR's published tokenizer checkpoints (``vae_ch160v4096z32.pth``): reading and writing them.

Such a file is a plain state dict. Our modules carry its key names, so nothing is renamed.
"""

from collections.abc import Mapping

from torch import Tensor

from megavar.weight_layout import NamedLayout, Shape

_USAGE = "quantize.ema_vocab_hit_SV"


class MultiScaleVQLayout(NamedLayout):
    """Our names and shapes are the authors'.

    One tensor may differ in shape: ``quantize.ema_vocab_hit_SV`` [K, V] counts code usage per scale, and one tokenizer
    serves several lists of scales (256 and 512 pixels). Like the reference, a file with another K is accepted:
    :meth:`load` then leaves the tensor out, and the model keeps its own counts.
    """

    belongs_to = "the tokenizer checkpoint"
    remedy = (
        "Give the checkpoint of a tokenizer with this configuration, or set the tokenizer keys of the config "
        "(base_channels, channel_multipliers, code_dimension, vocabulary_size, refinement, ...) to those the file was "
        "trained with."
    )

    def names(self, name: str) -> tuple[str, ...]:
        """The same name."""
        return (name,)

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.load`."""
        usage, own = state.get(_USAGE), expected.get(_USAGE)
        if usage is not None and own is not None and usage.shape[0] != own[0] and tuple(usage.shape[1:]) == own[1:]:
            state = {name: value for name, value in state.items() if name != _USAGE}
            expected = {name: shape for name, shape in expected.items() if name != _USAGE}
        return super().load(state, expected, passed)
