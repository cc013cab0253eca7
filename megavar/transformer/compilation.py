"""Compiling the blocks of a model, and whether this machine can."""

import shutil

import torch
from torch import nn

from megavar.errors import ConfigError
from megavar.transformer.block import Block


def compile_blocks(model: nn.Module, backend: str, device: torch.device) -> None:
    """Let every block of ``model`` run as a compiled graph (``train.compile: blocks``), compiled at the first pass.

    Raises:
        ConfigError: this machine has no compiler for the device.
    """
    if backend == "inductor":
        _check_compiler(device)
    for block in model.modules():
        if isinstance(block, Block):
            block.compile_graph(backend)


def _check_compiler(device: torch.device) -> None:
    from torch._inductor.config import cpp
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise ConfigError(
                "train.compile=blocks needs the package triton on a GPU, and it does not load here. Install the one "
                "that belongs to this PyTorch, or set train.compile=none."
            )
        return
    found = [name for name in (cpp.cxx if isinstance(cpp.cxx, tuple) else (cpp.cxx,)) if name and shutil.which(name)]
    if not found:
        raise ConfigError(
            "train.compile=blocks needs a C++ compiler on a CPU (g++, or the one that CXX names), and there is none. "
            "Install one, or set train.compile=none or train.compile_backend=aot_eager."
        )
