"""What the accelerators can do, from their data sheets, and what is assumed about how much of it a run reaches.

Peaks are dense (without structured sparsity), in operations per second; rates are bytes per second in one direction.
"""

from dataclasses import dataclass

from megavar.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One GPU as it stands in a node."""

    name: str
    memory: float
    """Bytes that a process can allocate."""
    bf16: float
    tf32: float
    fp32: float
    link: float
    """To the other GPUs of the node (NVLink, or PCIe where there is none)."""
    network: float
    """Share of one GPU in its node's network; a common configuration of such nodes, not a property of the GPU."""
    bandwidth: float
    """Of its own memory."""
    utilization: float
    """Assumed model FLOPs utilization of a dense generator."""


ACCELERATORS = {
    gpu.name: gpu
    for gpu in (
        Accelerator("h200", 139 * GIB, 989e12, 494e12, 67e12, 450e9, 50e9, 4.8e12, 0.35),
        Accelerator("h100", 79 * GIB, 989e12, 494e12, 67e12, 450e9, 50e9, 3.35e12, 0.35),
        Accelerator("h100-pcie", 79 * GIB, 756e12, 378e12, 51e12, 64e9, 50e9, 2.0e12, 0.30),
        Accelerator("b200", 178 * GIB, 2250e12, 1125e12, 75e12, 900e9, 50e9, 8.0e12, 0.25),
        Accelerator("a100", 79 * GIB, 312e12, 156e12, 19.5e12, 300e9, 25e9, 2.0e12, 0.40),
        Accelerator("a100-40gb", 39 * GIB, 312e12, 156e12, 19.5e12, 300e9, 25e9, 1.55e12, 0.40),
        Accelerator("l40s", 44 * GIB, 362e12, 183e12, 91.6e12, 32e9, 25e9, 0.86e12, 0.30),
        Accelerator("rtx4090", 23.5 * GIB, 165e12, 82.6e12, 82.6e12, 32e9, 12.5e9, 1.0e12, 0.40),
    )
}
"""By the name that ``--gpu`` takes."""

EXPERTS_UTILIZATION = 0.6
"""Utilization with experts over that of a dense generator: small experts wait for their dispatch."""
EXPERT_IMBALANCE = 1.25
"""Tokens of the busiest rank's experts over the mean, under expert parallelism. An assumption; a working balance loss
keeps it near 1."""
TOKENIZER_UTILIZATION = 0.3
"""Share of the TF32 peak that the frozen tokenizer's convolutions reach."""
LINK_EFFICIENCY = 0.7
"""Share of a link's rate that collectives reach."""
LAUNCH_SECONDS = 6e-6
"""Time to launch one kernel."""
KERNELS_PER_BLOCK = 150
"""Kernels of a block forward and backward, without compilation."""
HOST_RATE = 20e9
"""Bytes per second and GPU at which an offloaded optimizer works, transfers included."""
RESERVED = 1.5 * GIB
"""CUDA context, cuBLAS workspaces and NCCL buffers."""
FRAGMENTATION = 0.06
"""Share of what is allocated and freed within a step that the allocator cannot use."""

_BY_DEVICE_NAME = (
    ("h200", "h200"), ("h100 pcie", "h100-pcie"), ("h100", "h100"), ("h800", "h100"), ("gh200", "h100"),
    ("b200", "b200"), ("a100-sxm4-40gb", "a100-40gb"), ("a100-pcie-40gb", "a100-40gb"), ("a100", "a100"),
    ("a800", "a100"), ("l40s", "l40s"), ("4090", "rtx4090"),
)  # fmt: skip


def accelerator(name: str) -> Accelerator:
    """The accelerator called ``name``.

    Raises:
        ConfigError: nothing is known about it.
    """
    if name.lower() not in ACCELERATORS:
        raise ConfigError(f"--gpu {name} is not known. Choose one of {', '.join(ACCELERATORS)}.")
    return ACCELERATORS[name.lower()]


def name_of_device(device_name: str) -> str | None:
    """Which of :data:`ACCELERATORS` calls itself ``device_name``; None for others, such as CPUs."""
    lowered = device_name.lower()
    return next((name for part, name in _BY_DEVICE_NAME if part in lowered), None)


def peak_of_device(device_name: str, precision: str) -> float | None:
    """Peak operations per second of the device that calls itself ``device_name`` (``torch.cuda.get_device_name``).

    Args:
        precision: ``bf16`` or ``fp32``; PyTorch computes the latter without TF32 unless told otherwise.

    Returns:
        None for devices that are not in the table, such as CPUs.
    """
    name = name_of_device(device_name)
    if name is None:
        return None
    return ACCELERATORS[name].bf16 if precision == "bf16" else ACCELERATORS[name].fp32
