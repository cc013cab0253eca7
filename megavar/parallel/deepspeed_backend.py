"""Imports DeepSpeed so that nothing is compiled or probed at start, and a machine without CUDA is no warning."""

import collections
import logging
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from megavar.parallel import cpu_backend


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


_abandoned: list[Any] = []
"""Groups of an earlier run. Kept, because in a process that was forked since, destroying one waits for its threads,
which only the parent has."""


def forget_process_groups() -> None:
    """Empty the globals in which DeepSpeed keeps process groups; the next run in this process has other ones."""
    if "deepspeed.comm.comm" not in sys.modules:
        return
    import deepspeed.comm.comm
    from deepspeed.utils import groups

    experts = (
        groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    )  # fmt: skip
    _abandoned.extend([deepspeed.comm.comm.cdb, groups._WORLD_GROUP, *(dict(known) for known in experts)])
    for known in experts:
        known.clear()
    groups._WORLD_GROUP = None
    deepspeed.comm.comm.cdb = None


def prepare_deepspeed() -> Any:
    """The ``deepspeed`` package, knowing this run's process groups."""
    cpu_backend.install()
    deepspeed = import_deepspeed()
    _forget_earlier_process_groups()
    return deepspeed


_default_groups: list[dist.ProcessGroup | None] = [None]
"""Of this process's runs. None is let go: in a fork, destroying the parent's group would wait for its threads."""


def _forget_earlier_process_groups() -> None:
    """DeepSpeed keeps groups in globals; a second run in this process has new ones."""
    import deepspeed.comm.comm

    if _default_groups[-1] is not dist.group.WORLD:
        forget_process_groups()
        _default_groups.append(dist.group.WORLD)
    if deepspeed.comm.comm.cdb is None:
        deepspeed.init_distributed(verbose=False)
