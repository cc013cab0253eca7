"""The single checks of preflight. Each returns a :class:`Finding`; what it raises is a failure, too."""

import csv
import math
import os
import resource
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launchers.history import read_metrics
from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.errors import MegavarError
from megavar.storage import fsync_directory

Status = Literal["pass", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check on one node."""

    check: str
    status: Status
    detail: str
    value: float | None = None
    """A measurement that is compared between nodes."""


def guarded(check: str, seconds: float, action: Callable[[], Finding | str]) -> Finding:
    """Run ``action`` in a thread for at most ``seconds``. A string is the detail of a pass.

    A thread that hangs, for example in a dead file system, cannot be ended; it is left behind, and the process must
    leave with ``os._exit``.
    """
    found: list[Finding] = []

    def work() -> None:
        try:
            result = action()
            found.append(result if isinstance(result, Finding) else Finding(check, "pass", result))
        except MegavarError as error:
            found.append(Finding(check, "fail", str(error)))
        except Exception as error:  # a check must not take the others with it
            found.append(Finding(check, "fail", f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=work, name=check, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Finding(check, "fail", f"no result within {seconds:.0f} s")


# -- the run ----------------------------------------------------------------------------------------------------------


def configuration(config: Config, world_size: int) -> str:
    """Check the layout and the DeepSpeed JSON, and split the batch over ``world_size`` ranks."""
    from megavar.planning.plan import configured_layout

    layout, notes = configured_layout(config, world_size)
    batch = f"batch {layout.global_batch} = {layout.data} data-parallel ranks x {layout.micro_batches} x "
    return "; ".join([f"{batch}{layout.micro_batch}, ZeRO stage {layout.zero.stage}", *notes])


def data(config: Config) -> str:
    """Open the training data as the trainer does, and read the first and the last sample."""
    from megavar.assembly import check_consistency
    from megavar.data.build import build_source

    source = build_source(config.data)
    check_consistency(config, source)
    if len(source) < config.train.global_batch_size:
        raise ValueError(f"{len(source)} samples do not fill one batch of {config.train.global_batch_size}")
    for index in (0, len(source) - 1):
        source.read(index)
    return f"{len(source)} samples in {source.num_classes} classes"


def weights(config: Config) -> str:
    """The tokenizer's weights exist, or a run that is required will make them."""
    path = getattr(config.recipe, "tokenizer_weights", None)
    if path is None:
        return "the recipe needs none"
    if Path(path).exists():
        return f"{path} exists"
    coming = [load_config(required).run.path for required in config.run.requires]
    if Path(path).absolute() in [Path(run).absolute() for run in coming]:
        return f"{path} will be trained first"
    raise FileNotFoundError(f"recipe.tokenizer_weights: {path} does not exist and no required run makes it")


# -- the run directory ------------------------------------------------------------------------------------------------


def checkpoint_bytes(config: Config, run_directory: Path) -> int:
    """Size of the newest checkpoint; before the first, what the parameters will take.

    That is 12 bytes per parameter (float32 weights and two moments of Adam), 16 with a moving average.
    """
    from megavar.planning.parameters import count_parameters
    from megavar.planning.shape import GeneratorShape
    from megavar.planning.tokenizer_cost import autoencoder_cost

    manifests = sorted((run_directory / "checkpoints").glob("step-*/manifest.json"))
    if manifests:
        return sum(file.stat().st_size for file in manifests[-1].parent.rglob("*") if file.is_file())
    if config.generator is not None:
        parameters = count_parameters(GeneratorShape.of(config)).total
    else:
        parameters = autoencoder_cost(config.tokenizer).parameters
    return parameters * (12 if config.train.ema is None else 16)


def free_space(run_directory: Path, size: int) -> Finding:
    """Room for three more checkpoints of ``size`` bytes."""
    usage = os.statvfs(run_directory)
    free = usage.f_bavail * usage.f_frsize
    if usage.f_files and not usage.f_favail:
        return Finding("space", "fail", f"no inodes left in {run_directory}: delete files")
    detail = f"{free / GIB:.2f} GiB free, three checkpoints take {3 * size / GIB:.2f} GiB"
    if free >= 3 * size:
        return Finding("space", "pass", detail)
    return Finding("space", "fail", f"{detail}: free space, or lower train.checkpoint.keep_last")


def write_rate(folder: Path, name: str, size: int = 64 * 2**20) -> float:
    """Bytes per second of writing ``size`` bytes durably into ``folder``."""
    block, path = os.urandom(2**20), folder / f"{name}.bandwidth"
    try:
        began = time.monotonic()
        with path.open("wb") as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.monotonic() - began)
    finally:
        path.unlink(missing_ok=True)


def save_time(run_directory: Path, size: int, bytes_per_second: float, lead: float | None) -> Finding:
    """Whether a save fits between the signal and the end of the job, with a factor of two to spare.

    The time is that of the slowest recent saves where the run has some, otherwise size over bandwidth.
    """
    rate = f"{bytes_per_second / 2**20:.0f} MiB/s over all nodes"
    measured = [record["last_save_seconds"] for record in read_metrics(run_directory) if "last_save_seconds" in record]
    if measured:
        seconds = sorted(measured[-20:])[math.ceil(0.95 * len(measured[-20:])) - 1]
    else:
        seconds = size / bytes_per_second
    detail = f"a save takes {seconds:.0f} s ({rate})"
    if lead is None:
        return Finding("save bandwidth", "pass", detail)
    detail += f", the signal leads by {lead:.0f} s"
    if seconds > lead:
        return Finding("save bandwidth", "fail", f"{detail}: raise signal_lead_seconds in the cluster file")
    if 2 * seconds > lead:
        return Finding("save bandwidth", "warn", f"{detail}: raise signal_lead_seconds to {2 * seconds:.0f}")
    return Finding("save bandwidth", "pass", detail)


def write_mark(folder: Path, name: str) -> None:
    """Make a file appear durably by a rename, as checkpoints do."""
    temporary = folder / f".{name}.tmp"
    temporary.write_text(name)
    temporary.rename(folder / name)
    fsync_directory(folder)


def read_marks(folder: Path, names: Sequence[str], seconds: float) -> list[str]:
    """The ``names`` that cannot be read from ``folder`` within ``seconds``; network file systems show them late."""
    missing, end = list(names), time.monotonic() + seconds
    while missing and time.monotonic() < end:
        missing = [name for name in missing if not _reads(folder / name, name)]
        if missing:
            time.sleep(0.2)
    return missing


def _reads(path: Path, expected: str) -> bool:
    try:
        list(path.parent.iterdir())  # makes NFS look again
        return path.read_text() == expected
    except OSError:
        return False


# -- the node ---------------------------------------------------------------------------------------------------------


def host_names(master: str) -> Finding:
    """The master's address and the own name can be resolved."""
    address = socket.gethostbyname(master)
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return Finding(
            "host names", "warn", f"the own name {socket.gethostname()} does not resolve; ranks meet at {address}"
        )
    return Finding("host names", "pass", f"ranks meet at {address}")


def limits(gpus: int) -> Finding:
    """Open files and locked memory."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if files != resource.RLIM_INFINITY and files < 1024:
        return Finding("limits", "fail", f"{files} open files are too few for data workers: raise `ulimit -n`")
    problems = []
    if files != resource.RLIM_INFINITY and files < 4096:
        problems.append(f"{files} open files (hard limit {hard}): raise `ulimit -n` in setup")
    if gpus and locked != resource.RLIM_INFINITY:
        problems.append(f"{locked} bytes of locked memory: InfiniBand wants `ulimit -l unlimited`")
    return Finding("limits", "warn" if problems else "pass", "; ".join(problems) or f"{files} open files")


def shared_memory(workers: int, path: Path = Path("/dev/shm")) -> Finding:
    """Data workers hand over batches in /dev/shm."""
    if not path.exists():
        return Finding("shared memory", "fail" if workers else "warn", f"{path} does not exist")
    free = shutil.disk_usage(path).free
    detail = f"{free / GIB:.2f} GiB free in {path}"
    if workers and free < 0.25 * GIB:
        return Finding("shared memory", "fail", f"{detail}: mount a larger one, or set data.workers=0")
    if workers and free < workers * 0.25 * GIB:
        return Finding("shared memory", "warn", f"{detail} for {workers} workers")
    return Finding("shared memory", "pass", detail)


def gpus(expected: int) -> Finding:
    """As many GPUs as the ranks need, without strangers' memory in use and without uncorrected memory errors."""
    import torch

    count = torch.cuda.device_count()
    if count != expected:
        return Finding("gpus", "fail", f"{count} GPUs are visible, {expected} are expected")
    if not expected:
        return Finding("gpus", "pass", "none expected")
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if total - free > 2 * GIB:
            return Finding(
                "gpus", "fail", f"GPU {index} has {(total - free) / GIB:.1f} GiB in use: a process was left behind"
            )
    damaged = uncorrected_errors()
    if damaged:
        return Finding("gpus", "fail", f"uncorrected memory errors on GPU {', '.join(map(str, damaged))}")
    return Finding("gpus", "pass", f"{count} idle {torch.cuda.get_device_name(0)}")


def uncorrected_errors() -> list[int]:
    """GPUs whose ECC counts errors that could not be corrected; none where nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(output.splitlines())]
    return [int(row[0]) for row in rows if len(row) == 2 and row[1].isdigit() and int(row[1]) > 0]


# -- comparisons between nodes ----------------------------------------------------------------------------------------


def slow(values: Mapping[str, float], tolerance: float) -> list[str]:
    """Names whose value is far below the median: by ``tolerance`` of it and by five median absolute deviations.

    Fewer than three values cannot tell who is slow.
    """
    if len(values) < 3:
        return []
    median = statistics.median(values.values())
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values.values())
    threshold = median - max(tolerance * median, 5 * deviation)
    return [name for name, value in values.items() if value < threshold]


def compare(
    check: str, unit: str, values: Mapping[str, float], *, tolerance: float, verdict: Status = "fail"
) -> dict[str, Finding]:
    """A finding per node for a rate that should be the same everywhere; ``verdict`` is the status of slow ones."""
    if not values:
        return {}
    outliers, median = slow(values, tolerance), statistics.median(values.values())
    found: dict[str, Finding] = {}
    for node, value in values.items():
        if node in outliers:
            found[node] = Finding(check, verdict, f"{value:.3g} {unit}, the median is {median:.3g}", value)
        else:
            found[node] = Finding(check, "pass", f"{value:.3g} {unit}", value)
    return found


def clock(offsets: Mapping[str, float]) -> dict[str, Finding]:
    """Offsets in seconds to the first node's clock: logs of several nodes are compared by time."""
    found: dict[str, Finding] = {}
    for node, offset in offsets.items():
        status: Status = "fail" if abs(offset) > 60 else "warn" if abs(offset) > 1 else "pass"
        found[node] = Finding("clock", status, f"{offset:+.3f} s" + ("" if status == "pass" else ": synchronize it"))
    return found


def as_dict(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """For JSON."""
    return [finding.__dict__ for finding in findings]
