"""Timing for ``tools/benchmark.py``: alternatives measured in turn, medians with spread, the machine they belong to."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SECONDS_PER_MEASUREMENT = 0.2
"""Work shorter than this is repeated until it is this long."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, from several measurements."""

    median: float
    lower: float
    """Lower quartile."""
    upper: float
    """Upper quartile."""
    samples: tuple[float, ...]
    """All measurements, in the order of the rounds."""
    calls: int
    """Calls of one measurement."""
    peak_bytes: int | None
    """Most memory allocated on the GPU during a call, weights included; None on a CPU."""

    def ratio(self, base: "Timing") -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of this time over ``base``'s of the same round."""
        return _quartiles([own / other for own, other in zip(self.samples, base.samples, strict=True)])


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Clock = Callable[[], float]


def _seconds(work: Callable[[], Any], calls: int, clock: Clock = time.perf_counter) -> float:
    synchronize()
    started = clock()
    for _ in range(calls):
        work()
    synchronize()
    return (clock() - started) / calls


def measure(
    alternatives: Mapping[str, Callable[[], Any]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Time each alternative ``repeats`` times, one after the other in turn.

    What the machine does meanwhile then meets all alike, so that their ratios hold even where it is not idle.

    Args:
        clock: ``time.process_time`` leaves out what other processes take of a busy CPU.
    """
    calls, peaks = {}, {}
    for name, work in alternatives.items():
        _seconds(work, 1)  # compilation, caches
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        calls[name] = max(1, round(SECONDS_PER_MEASUREMENT / max(_seconds(work, 1, clock), 1e-6)))
        peaks[name] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(repeats):
        for name, work in alternatives.items():
            samples[name].append(_seconds(work, calls[name], clock))
    return {name: _summary(values, calls[name], peaks[name]) for name, values in samples.items()}


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return lower, median, upper


def _summary(values: list[float], calls: int, peak: int | None) -> Timing:
    lower, median, upper = _quartiles(values)
    return Timing(median, lower, upper, tuple(values), calls, peak)


def trace(work: Callable[[], Any], path: Path) -> None:
    """Write a Chrome trace of three calls (open it in ui.perfetto.dev)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(3):
            work()
        synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def memory_snapshot(work: Callable[[], Any], path: Path) -> None:
    """Write every allocation of one call on the GPU (open it in pytorch.org/memory_viz)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        work()
        synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    information = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": _git_revision(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        information |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    return information


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_revision() -> str | None:
    root = Path(__file__).parent
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or None
