"""Imports DeepSpeed so that nothing is compiled or probed at start, and a machine without CUDA is no warning."""

import collections
import logging
import os
from typing import Any

import torch


def import_deepspeed() -> Any:
    """The ``deepspeed`` package. Everything in megavar imports it through this function first.

    Paths are relative to DeepSpeed 0.19.8. ``accelerator/real_accelerator.py:213`` warns where it finds no accelerator
    unless told. ``ops/__init__.py:16`` runs compilers to find out which of its extensions could be built, and
    ``comm/torch.py`` then builds one of them (``deepspeed_shm_comm``, 30 s) on a CPU: answer that none can.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if "__compatible_ops__" not in vars(deepspeed.ops):
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)  # type: ignore[attr-defined]
    return deepspeed
