"""VAR's published tokenizer checkpoints (``vae_ch160v4096z32.pth``): reading and writing them.

Such a file is a plain state dict. Our modules carry its key names, so nothing is renamed. One tensor may differ in
shape: ``quantize.ema_vocab_hit_SV`` [K, V] counts code usage per scale, and one tokenizer serves several lists of
scales (256 and 512 pixels); like the reference, a file with another K is accepted and the counts start at zero.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megavar.errors import CheckpointError

USAGE_KEY = "quantize.ema_vocab_hit_SV"


def export(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in the published layout: float32 tensors on the CPU that share no memory with the model."""
    return {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, tensor in model.state_dict().items()}


def load(model: nn.Module, path: str | Path) -> None:
    """Load a published checkpoint into ``model``, strictly.

    Raises:
        CheckpointError: the file is missing, is not a state dict, or belongs to a model of another configuration; the
            model is then unchanged.
    """
    tensors = read(Path(path))
    expected = model.state_dict()
    usage, own_usage = tensors.get(USAGE_KEY), expected.get(USAGE_KEY)
    if usage is not None and own_usage is not None and usage.shape != own_usage.shape \
            and usage.shape[-1:] == own_usage.shape[-1:]:
        tensors[USAGE_KEY] = torch.zeros_like(own_usage)
    problems = _differences(expected, tensors)
    if problems:
        raise CheckpointError(
            f"{path} does not belong to this tokenizer: {'; '.join(problems)}. Give the checkpoint of a tokenizer with "
            "this configuration, or set the tokenizer keys of the config (base_channels, channel_multipliers, "
            "code_dimension, vocabulary_size, refinement, ...) to those the file was trained with.")
    model.load_state_dict(tensors, strict=True)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pth`` state dict (no other Python objects are unpickled)."""
    if not path.is_file():
        raise CheckpointError(f"Tokenizer checkpoint {path} does not exist. Give the path of a downloaded or exported "
                              "state dict (.pth or .safetensors).")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"Tokenizer checkpoint {path} cannot be read ({reason}). It is truncated or not a state "
                              "dict of tensors: fetch or export it again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"Tokenizer checkpoint {path} is not a plain state dict (names to tensors). If it is a "
                              "training checkpoint, extract the tokenizer's state dict from it first.")
    return dict(content)


def _differences(expected: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """What keeps ``given`` from being loaded strictly, in words."""
    shapes = [f"{name} is {_shape(given[name])} in the file and {_shape(expected[name])} in the model"
              for name in expected.keys() & given.keys() if given[name].shape != expected[name].shape]
    return [
        *_some("keys missing from the file", expected.keys() - given.keys()),
        *_some("keys unknown to the model", given.keys() - expected.keys()),
        *_some("other shapes", shapes),
    ]


def _some(what: str, names: Iterable[str], shown: int = 4) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{what}: {', '.join(names[:shown])}{rest}"]


def _shape(tensor: Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape) or "scalar"
