"""VAR's published tokenizer checkpoints (``vae_ch160v4096z32.pth``): reading and writing them.

Such a file is a plain state dict. Our modules carry its key names, so nothing is renamed. One tensor may differ in
shape: ``quantize.ema_vocab_hit_SV`` [K, V] counts code usage per scale, and one tokenizer serves several lists of
scales (256 and 512 pixels); like the reference, a file with another K is accepted and the model keeps its own counts.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from megavar.errors import CheckpointError
from megavar.tokenizers.state_dict_file import differences, read_state_dict

USAGE_KEY = "quantize.ema_vocab_hit_SV"


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
    tensors = read_state_dict(path, "Tokenizer checkpoint")
    expected = model.state_dict()
    usage, own_usage = tensors.get(USAGE_KEY), expected[USAGE_KEY]
    if usage is not None and usage.shape != own_usage.shape and usage.shape[1:] == own_usage.shape[1:]:
        tensors[USAGE_KEY] = own_usage
    problems = differences(expected, tensors)
    if problems:
        raise CheckpointError(
            f"{path} does not belong to this tokenizer: {'; '.join(problems)}. Give the checkpoint of a tokenizer with "
            "this configuration, or set the tokenizer keys of the config (base_channels, channel_multipliers, "
            "code_dimension, vocabulary_size, refinement, ...) to those the file was trained with."
        )
    model.load_state_dict(tensors, strict=True)
