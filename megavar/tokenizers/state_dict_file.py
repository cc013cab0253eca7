"""Files that hold a plain state dict: reading them, and saying why one does not fit a model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megavar import weight_layout
from megavar.errors import CheckpointError


def read_state_dict(path: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pth`` state dict, on the CPU.

    Args:
        path: the file. Of a pickle only tensors and plain containers are accepted.
        what: what the file should be, for messages ("Tokenizer checkpoint").

    Raises:
        CheckpointError: the file is missing, cannot be read, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{what} {path} does not exist. Give the path of a downloaded or exported state dict (.pth, .safetensors)."
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except Exception as error:  # a file that is no pickle may raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{what} {path} cannot be read ({reason}). It is truncated or not a state dict of tensors: fetch or export "
            "it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{what} {path} is not a plain state dict (names to tensors). If it is a training checkpoint, extract the "
            "model's state dict from it first."
        )
    return dict(content)


def _load_pickle(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``given`` from being loaded strictly into a model with the tensors ``expected``, in words."""
    return weight_layout.differences(*({name: tuple(v.shape) for name, v in of.items()} for of in (expected, given)))
