"""Who am I: one mapping from torchrun, srun or a single process to rank, world size and device."""

import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megavar.errors import ClusterError


@dataclass(frozen=True)
class Environment:
    """The place of this process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    """``torchrun``, ``srun`` or ``single``."""

    @property
    def device(self) -> torch.device:
        """The accelerator of this rank, or the CPU where there is none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def backend(self) -> str:
        """The process-group backend: NCCL for GPUs (with gloo beside it for CPU tensors), gloo otherwise."""
        return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "PALS_LOCAL_SIZE")
"""How many ranks mpirun has started: Open MPI, MPICH and Intel MPI, MVAPICH, and others for one node."""


def read_environment(variables: Mapping[str, str]) -> Environment:
    """Map environment ``variables`` to an :class:`Environment`.

    torchrun's variables win over Slurm's, because torchrun may itself have been started by srun. Slurm's variables
    count only inside a job step: in the batch script itself ``SLURM_STEP_ID`` is absent, and a single process is meant.

    Raises:
        ClusterError: a launcher's variables are incomplete or contradict each other.
    """
    variables = {name: value for name, value in variables.items() if value.strip()}  # an empty one is an unset one
    for launcher, names in _LAUNCHERS.items():
        present = [name for name in names if name in variables]
        if not present or (launcher == "srun" and "SLURM_STEP_ID" not in variables):
            continue
        missing = sorted(set(names) - set(present))
        if missing:
            raise ClusterError(
                f"The environment looks like {launcher} ({', '.join(present)} set) but lacks {', '.join(missing)}. "
                f"Start with torchrun or srun, or unset these variables to run a single process."
            )
        odd = next((name for name in names if not variables[name].strip().isdecimal()), None)
        if odd is not None:
            raise ClusterError(
                f"{odd}={variables[odd]!r} is not a number. Start with torchrun or srun, or unset these variables to "
                f"run a single process."
            )
        rank, world_size, local_rank = (int(variables[name]) for name in names)
        if not 0 <= rank < world_size:
            raise ClusterError(
                f"{names[0]}={rank} is not below {names[1]}={world_size}. The variables of two launchers are mixed: "
                f"start from a clean shell."
            )
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if world_size > 1 and name not in variables:
                raise ClusterError(
                    f"{name} is not set for a run of {world_size} processes started by {launcher}. "
                    f"Submit with `python -m launchers.slurm submit`, or export it in your batch script."
                )
        return Environment(rank, world_size, local_rank, launcher)
    for name in _MPI_SIZES:
        if variables.get(name, "1").strip() not in ("0", "1"):
            raise ClusterError(
                f"{name}={variables[name]}: this process was started by MPI, whose variables are not read, so every "
                f"rank would train alone. Start with torchrun or srun, or let each rank set RANK, WORLD_SIZE, "
                f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT from MPI's variables."
            )
    return Environment(0, 1, 0, "single")


def environment() -> Environment:
    """The :class:`Environment` of this process."""
    return read_environment(os.environ)


def limit_threads(count: int | None) -> None:
    """Let this process use ``count`` threads on the CPU; None leaves PyTorch's choice (or OMP_NUM_THREADS)."""
    if count is not None:
        torch.set_num_threads(count)


def choose_kernels(precision: str, tf32: bool | None, deterministic: bool) -> None:
    """Tell PyTorch which CUDA kernels this process may use; nothing on a machine without CUDA.

    Args:
        precision, tf32, deterministic: the keys of ``train`` (:class:`megavar.config.train.TrainConfig`).
    """
    if not torch.cuda.is_available():
        return
    # The older switch: it sets the newer one, too, and compilers ask for either.
    torch.backends.cuda.matmul.allow_tf32 = precision == "bf16" if tf32 is None else tf32
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first product runs
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_name() -> str:
    """What this rank computes on, in the words of its driver or of the operating system."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()
