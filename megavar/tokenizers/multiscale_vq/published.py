"""VAR's published tokenizer checkpoints (``vae_ch160v4096z32.pth``): reading and writing them.

Such a file is a plain state dict. Our modules carry its key names, so nothing is renamed.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megavar.errors import CheckpointError
from megavar.weight_file import read_state_dict
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


def export(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in the published layout: float32 tensors on the CPU that share no memory with the model."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def load(model: nn.Module, path: str | Path) -> None:
    """Load a published checkpoint into ``model``, strictly.

    Raises:
        CheckpointError: the file is missing, is not a state dict, or belongs to a model of another configuration; the
            model is then unchanged.
    """
    own, state = model.state_dict(), read_state_dict(path, "Tokenizer checkpoint")
    try:
        tensors = MultiScaleVQLayout(None, None).load(state, {name: tuple(value.shape) for name, value in own.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model.load_state_dict(own | tensors, strict=True)
