"""Which implementation of the experts runs, and which layouts it cannot serve.

All of them compute Eq. 6 with our router's raw softmax gates; none is used with its own gate. DeepSpeed's top-2 gate
and Tutel's default one renormalize, and both divide the balance loss differently from Eq. 10.
"""

import importlib.util

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
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


def check_backend(experts: ExpertsChoice, parallel: ParallelConfig) -> None:
    """Refuse what the chosen backend cannot do.

    Raises:
        ConfigError: the layout does not fit, or the package is not installed.
    """
    backend = experts.backend
    if experts.number % parallel.expert:
        raise ConfigError(
            f"generator.experts.number={experts.number} is not a multiple of parallel.expert={parallel.expert}: every "
            f"rank holds the same number of experts. Change one of them."
        )
    if backend in ("tutel", "deepspeed") and parallel.dispatcher != "alltoall":
        raise ConfigError(
            f"generator.experts.backend={backend} exchanges tokens by its own all-to-all, but "
            f"parallel.dispatcher={parallel.dispatcher} is asked for. Set parallel.dispatcher=alltoall, or choose the "
            f"backend megatron or grouped."
        )
    if backend == "deepspeed" and parallel.tensor > 1:
        raise ConfigError(
            f"generator.experts.backend=deepspeed cannot run with parallel.tensor={parallel.tensor}: DeepSpeed-MoE "
            f"expects every tensor-parallel rank to hold all tokens (deepspeed/moe/sharded_moe.py drops duplicates), "
            f"while each of ours holds a share of them. Choose the backend megatron, grouped or tutel."
        )
    if backend == "tutel" and importlib.util.find_spec("tutel") is None:
        raise ConfigError(
            "generator.experts.backend=tutel needs the package tutel, which is not installed. Install it from "
            "https://github.com/microsoft/tutel (on a machine without GPU with NO_CUDA=1), or choose another backend."
        )
