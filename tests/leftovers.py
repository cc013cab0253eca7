"""What a file's tests must not leave behind in the process, because later files of the same worker would meet it."""

import gc
import logging
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Not SIGALRM, which pytest-timeout uses, nor SIGCHLD, for which torch's DataLoader leaves a handler that looks after
its own workers only."""


def state() -> dict[str, Any]:
    """Everything of this process that tests of other files depend on, by what it is called in an error."""
    found: dict[str, Any] = {
        "default process group": dist.is_available() and dist.is_initialized(),
        "working directory": _directory(),
        "umask": _umask(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_NOFILE", "RLIMIT_FSIZE")},
        "signal handlers": {number.name: signal.getsignal(number) for number in _SIGNALS},
        "threads": sorted(thread.name for thread in threading.enumerate() if not thread.daemon),
        "torch's defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "torch's threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "garbage collection": gc.isenabled(),
        "log handlers": {name: list(logging.getLogger(name).handlers) for name in ("", "megavar")},
    }
    if "megatron.core.parallel_state" in sys.modules:
        groups = vars(sys.modules["megatron.core.parallel_state"])
        found["Megatron-core's groups"] = sorted(k for k, v in groups.items() if isinstance(v, dist.ProcessGroup))
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line per thing that has changed; what was imported in between counts as absent before."""
    lines = []
    for name, value in after.items():
        earlier = before.get(name, [])
        if value != earlier:
            lines.append(f"{name}: {earlier} before, {value} after")
    return lines


def _directory() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "deleted"


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
