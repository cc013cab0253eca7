"""VAR's tokenizer as its authors publish it, for tests that need such a file or read one."""

from pathlib import Path

import torch
from torch import Tensor

from megavar import frozen
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from megavar.tokenizers.multiscale_vq.published import MultiScaleVQLayout

LAYOUT = MultiScaleVQLayout(None, None)


def public_state(model: MultiScaleVQ) -> dict[str, Tensor]:
    """A copy of the model's tensors under the authors' names."""
    return LAYOUT.export({name: value.detach().clone() for name, value in model.state_dict().items()})


def save_public(model: MultiScaleVQ, path: Path) -> None:
    """Write the authors' file of ``model``."""
    torch.save(public_state(model), path)


def load_public(model: MultiScaleVQ, path: Path) -> None:
    """Read such a file as a run does that names it."""
    frozen.load(model, path, {"var": LAYOUT})
