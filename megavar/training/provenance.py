"""Where a run comes from: code, packages, machine, environment."""

import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavar.config.secret import looks_secret

_ENVIRONMENT = ("CUDA_*", "NCCL_*", "TORCH_*", "OMP_*", "SLURM_JOB_ID", "SLURM_NODELIST", "SLURM_NTASKS", "MEGAVAR_*",
                "MASTER_*", "RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_*", "DS_ACCELERATOR", "PYTORCH_*")  # fmt: skip
_PACKAGES = ("torch", "torchvision", "megatron-core", "deepspeed", "numpy", "webdataset", "wandb", "pydantic")


def provenance(config: Mapping[str, Any]) -> dict[str, str]:
    """Where a checkpoint comes from: hash of the resolved configuration, commit of the checkout."""
    text = json.dumps(config, sort_keys=True)
    return {"config_sha256": hashlib.sha256(text.encode()).hexdigest(), "commit": git("rev-parse", "HEAD").strip()}


def now() -> str:
    """Local time with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def host() -> str:
    """Name of this machine: Slurm's, where it is a node of a cluster."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def git(*arguments: str) -> str:
    """What git says of the checkout; nothing where there is none."""
    root = Path(__file__).resolve().parents[2]
    if "site-packages" in root.parts:  # installed; a repository around it is another one
        return ""
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def of_this_start() -> dict[str, Any]:
    """Time, host, code and packages of this process."""
    variables = {
        name: value for name, value in sorted(os.environ.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _ENVIRONMENT) and not looks_secret(name, value)
    }  # fmt: skip
    return {
        "started_at": now(),
        "host": host(),
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD").strip(),
        "changed_files": git("status", "--porcelain").splitlines()[:50],
        "packages": {package: _version(package) for package in _PACKAGES},
        "environment": variables,
    }
