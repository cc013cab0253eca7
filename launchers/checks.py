"""The single checks of preflight. Each returns a :class:`Finding`; what it raises is a failure, too."""

import csv
import itertools
import math
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.errors import CheckpointError, DataError, ExitCode, MegavarError
from megavar.records.history import read_metrics
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
    of_the_run: bool = False
    """A failure for which no node can be blamed, unless only some nodes see it: starting again cannot help."""


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
            found.append(Finding(check, "fail", str(error), of_the_run=error.exit_code == ExitCode.CONFIGURATION))
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


def data(config: Config, world_size: int) -> str:
    """Open the training data as the trainer does; read the first and the last sample, or the first rank's first batch.

    The latter of streams, which also checks that there are enough shards for ``world_size`` ranks.
    """
    import torch

    from megavar.assembly import check_consistency
    from megavar.data.build import build_loader, build_source, build_transform
    from megavar.data.reading import SampleReader
    from megavar.data.streaming import ShardStreams
    from megavar.parallel.topology import data_parallel_size

    source, batch = build_source(config.data), config.train.global_batch_size
    check_consistency(config, source)
    if len(source) < batch:
        raise DataError(f"{len(source)} samples do not fill one batch of {batch}: lower train.global_batch_size.")
    if isinstance(source, ShardStreams):
        ranks = data_parallel_size(config.parallel, world_size)[0]
        here = config.data.model_copy(update={"workers": 0})
        next(iter(build_loader(here, source, seed=config.train.seed, global_batch_size=batch, data_parallel_size=ranks,
                               micro_batch_size=max(1, batch // ranks))))  # fmt: skip
    else:
        transform, damaged = build_transform(config.data), config.data.damaged_samples
        reader = SampleReader(source, transform, seed=config.train.seed, damaged=damaged)
        reader.read(torch.zeros(2, dtype=torch.int64), torch.tensor([0, len(source) - 1]))
    return f"{len(source)} samples in {source.num_classes} classes"


def weights(config: Config, run_directory: Path) -> str:
    """Frozen weights exist, or a run that is required will make them; so do those that a new run begins with."""
    wanted = config.frozen_weights
    if config.train.initial_weights is not None and not manifests_in(run_directory):
        wanted["initial weights"] = config.train.initial_weights.path
    coming = [Path(load_config(required).run.path).absolute() for required in config.run.requires]
    for name, path in wanted.items():
        if not Path(path).exists() and Path(path).absolute() not in coming:
            raise CheckpointError(
                f"The weights of {name!r} in {path} do not exist and no required run makes them. Correct the path in "
                f"the configuration (recipe, train.initial_weights), or list the run that makes them in run.requires."
            )
    found = [f"{path} {'exists' if Path(path).exists() else 'will be trained first'}" for path in wanted.values()]
    return ", ".join(found) or "the run needs none"


def evaluation(config: Config) -> str:
    """What comes after training can be done: the suite fits, and its files are there."""
    if not config.evaluation.after_training:
        return "nothing is scored after training"
    from megavar.scoring import check

    check(config)
    return "can be scored after training"


# -- the run directory ------------------------------------------------------------------------------------------------


def manifests_in(run_directory: Path) -> list[Path]:
    """Those of all checkpoints, oldest first."""
    return sorted((run_directory / "checkpoints").glob("step-*/manifest.json"))


def checkpoint_bytes(config: Config, run_directory: Path) -> int:
    """Size of the newest checkpoint; before the first, what the parameters will take.

    That is 12 bytes per parameter (float32 weights and two moments of Adam), 16 with a moving average.
    """
    from megavar.planning.efficiency import trained_parameters

    manifests = manifests_in(run_directory)
    if manifests:
        return sum(file.stat().st_size for file in manifests[-1].parent.rglob("*") if file.is_file())
    return trained_parameters(config) * (12 if config.train.ema is None else 16)


def free_space(run_directory: Path, size: int, existing: int = 0) -> Finding:
    """Room for three checkpoints of ``size`` bytes with those that exist, and for one more at least.

    More is not needed to go on: older ones are deleted as newer ones come.
    """
    count = max(1, 3 - existing)
    usage = os.statvfs(run_directory)
    free = usage.f_bavail * usage.f_frsize
    if usage.f_files and not usage.f_favail:
        return Finding("space", "fail", f"no inodes left in {run_directory}: delete files")
    detail = f"{free / GIB:.2f} GiB free, {count} more checkpoints take {count * size / GIB:.2f} GiB"
    if free >= count * size:
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

    The time is that of the slowest of recent saves where the run has some, otherwise size over bandwidth.
    """
    rate = f"{bytes_per_second / 2**20:.0f} MiB/s over all nodes"
    logged = [record["last_save_seconds"] for record in read_metrics(run_directory) if "last_save_seconds" in record]
    saves = [seconds for seconds, _ in itertools.groupby(logged)]  # every line repeats that of the last one
    if saves:
        seconds = sorted(saves[-20:])[math.ceil(0.95 * len(saves[-20:])) - 1]
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


def write_mark(folder: Path, name: str) -> str:
    """Make a file appear durably by a rename, as checkpoints do."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.tmp"
    temporary.write_text(name)
    temporary.rename(folder / name)
    fsync_directory(folder)
    return f"{folder} is writable"


def read_marks(folder: Path, names: Sequence[str], seconds: float) -> list[str]:
    """The ``names`` that cannot be read from ``folder`` within ``seconds``; network file systems show them late."""
    missing, end = list(names), time.monotonic() + seconds
    while missing and time.monotonic() < end:
        missing = [name for name in missing if not _reads(folder / name, name)]
        if missing:
            time.sleep(0.2)
    return missing


def visibility(node: str, unseen: Mapping[str, Sequence[str]], directory: Path) -> Finding:
    """Whether ``node`` sees what the others write into ``directory``, and they what it writes.

    A node that is cut off from most others fails alone: the others are not blamed for not seeing it.

    Args:
        unseen: for every node, whose files it did not see.
    """

    def cut_off(name: str) -> bool:
        unseen_by = sum(name in names for names in unseen.values())
        return 2 * max(len(unseen.get(name, ())), unseen_by) > len(unseen) - 1

    missing, unseen_by = list(unseen[node]), [other for other, names in unseen.items() if node in names]
    if cut_off(node) or any(not cut_off(other) for other in missing):
        what = [f"files of {', '.join(missing[:9])} in {directory} are not seen here"] if missing else []
        what += [f"its files are not seen by {', '.join(unseen_by[:9])}"] if unseen_by else []
        return Finding("run directory", "fail", f"{'; '.join(what)}: is {directory} shared?")
    return Finding("run directory", "pass", f"{directory} is {'shared' if len(unseen) > 1 else 'writable'}")


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
    """As many GPUs as the ranks need, idle, and without uncorrected memory errors."""
    import torch

    states = gpu_states()  # before CUDA is used here, which takes memory itself
    count = torch.cuda.device_count()
    if count != expected:
        return Finding("gpus", "fail", f"{count} GPUs are visible, {expected} are expected")
    if not expected:
        return Finding("gpus", "pass", "none expected")
    failures = [text for state in states for text in state.failures()]
    if failures:
        return Finding("gpus", "fail", "; ".join(failures))
    warnings = [text for state in states for text in state.warnings()] if states else ["nvidia-smi does not answer"]
    return Finding("gpus", "warn" if warnings else "pass", "; ".join(warnings) or f"{count} idle GPUs")


@dataclass(frozen=True)
class GpuState:
    """What nvidia-smi says of a GPU; None where it cannot tell."""

    index: int
    uuid: str
    memory_mib: int | None
    temperature: int | None
    uncorrected: int | None
    """Errors of its memory since the driver was loaded."""
    processes: tuple[str, ...] = ()
    """Ids of those that compute on it."""

    def failures(self) -> list[str]:
        """Why no run should start on it."""
        found = []
        if self.processes:
            found.append(f"GPU {self.index} is used by process {', '.join(self.processes)}, which was left behind")
        elif (self.memory_mib or 0) > 2048:
            found.append(f"GPU {self.index} has {self.memory_mib} MiB in use: a process was left behind")
        if self.uncorrected:
            found.append(f"GPU {self.index} has had {self.uncorrected} uncorrected memory errors")
        return found

    def warnings(self) -> list[str]:
        """What is odd. A GPU is still warm when the job before has just ended, so heat alone fails nothing."""
        found = []
        if (self.memory_mib or 0) > 500:
            found.append(f"GPU {self.index} has {self.memory_mib} MiB in use before anything runs")
        if (self.temperature or 0) >= 60:
            found.append(f"GPU {self.index} has {self.temperature} degrees Celsius before anything runs")
        return found


def gpu_states() -> list[GpuState]:
    """The GPUs that this job may use; none where nvidia-smi does not answer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    only = [f"--id={visible}"] if visible else []
    wanted = "index,uuid,memory.used,temperature.gpu,ecc.errors.uncorrected.volatile.total"
    rows = _nvidia_smi(f"--query-gpu={wanted}", *only)
    users = [row for row in _nvidia_smi("--query-compute-apps=gpu_uuid,pid", *only) if len(row) == 2]

    def number(text: str) -> int | None:
        return int(text) if text.isdigit() else None

    return [
        GpuState(int(index), uuid, number(memory), number(temperature), number(uncorrected),
                 tuple(pid for place, pid in users if place == uuid))
        for index, uuid, memory, temperature, uncorrected in (row for row in rows if len(row) == 5)
    ]  # fmt: skip


def _nvidia_smi(*options: str) -> list[list[str]]:
    command = ["nvidia-smi", *options, "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(output.splitlines())]


def settings(config: Config, gpus: int) -> Finding:
    """Variables that decide the speed and memory of CUDA and that nothing else looks at."""
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "unset"))
    detail = f"CUDA_DEVICE_MAX_CONNECTIONS {connections}, PYTORCH_CUDA_ALLOC_CONF {allocator}"
    if gpus and config.parallel.tensor > 1 and connections != "1":
        return Finding("settings", "warn", f"{detail}: before Blackwell, parallel.tensor overlaps communication only "
                       f"with CUDA_DEVICE_MAX_CONNECTIONS=1 (environment of the cluster file)")  # fmt: skip
    return Finding("settings", "pass", detail)


def as_dict(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """For JSON."""
    return [finding.__dict__ for finding in findings]
