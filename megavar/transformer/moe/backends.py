"""Which implementation of the experts runs. What each cannot do is said by the choice (``ExpertsChoice.check``).

All of them compute Eq. 6 with our routers' raw gates; none is used with its own gate. DeepSpeed's top-2 gate and
Tutel's default one renormalize, and both divide the balance loss differently from Eq. 10.
"""

import importlib.util

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavar.errors import ConfigError


def choose_backend(name: str, config: TransformerConfig) -> str:
    """The backend ``name``; ``auto`` is ``grouped`` on CUDA, if the sizes allow it, and ``megatron`` elsewhere.

    Raises:
        ConfigError: ``grouped`` is asked for with sizes that grouped matrix products do not take.
    """
    hidden = config.moe_ffn_hidden_size
    assert hidden is not None
    multiple = 16 // config.params_dtype.itemsize  # rows must start at multiples of 16 bytes
    aligned = config.hidden_size % multiple == 0 and hidden % multiple == 0
    if name == "auto":
        return "grouped" if torch.cuda.is_available() and aligned else "megatron"
    if name == "grouped" and not aligned:
        raise ConfigError(
            f"generator.experts.backend=grouped needs generator.width={config.hidden_size} and the experts' hidden "
            f"size {hidden} (width x generator.feed_forward_ratio) to be multiples of {multiple} in this precision. "
            f"Change them, or choose the backend megatron."
        )
    return name


def check_installed(backend: str) -> None:
    """Refuse a backend whose package is missing on this machine.

    Raises:
        ConfigError: it is.
    """
    if backend == "tutel" and importlib.util.find_spec("tutel") is None:
        raise ConfigError(
            "generator.experts.backend=tutel needs the package tutel, which is not installed. Install it from "
            "https://github.com/microsoft/tutel (on a machine without GPU with NO_CUDA=1), or choose another backend."
        )
