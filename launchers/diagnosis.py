"""Which failure of an attempt came first, and what to do about it."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.progress import STOP
from launchers.run_logs import Failure, RankLog, TaskEnd, main_thread, read_rank_log, read_task_ends
from megavar.errors import ExitCode

_REMEDIES = [  # the first pattern found in the failure's summary decides
    (
        r"OutOfMemoryError|CUDA out of memory|HIP out of memory",
        "The GPU ran out of memory: lower train.micro_batch_size, set parallel.recompute=full, or raise the ZeRO "
        "stage. `python -m megavar plan` predicts the need.",
    ),
    (
        r"No space left on device|Disk quota exceeded|Errno 28|Errno 122",
        "The disk is full: free space, or lower train.checkpoint.keep_last. Nothing but the steps since the last "
        "checkpoint is lost.",
    ),
    (
        r"Stale file handle|Input/output error|Transport endpoint|Errno 116|Errno 5\b",
        "The file system failed on this node: exclude the node (exclude in the cluster file) and submit again.",
    ),
    (
        r"EADDRINUSE|address already in use",
        "Another process of this node took the port between the look and its use: start again. If it happens again, "
        "a process of an earlier run was left behind.",
    ),
    (
        r"Bus error|shm|shared memory",
        "/dev/shm is too small for the data workers: lower data.workers or mount a larger /dev/shm.",
    ),
    (
        r"ModuleNotFoundError|ImportError|GLIBC|libcud",
        "The environment of this node differs: compare packages.txt in the run directory, and python and setup "
        "of the cluster file.",
    ),
    (
        r"uncorrectable|ECC|CUDA error|CUDNN_STATUS|Xid|device-side assert",
        "The GPU or its driver failed: look for Xid in dmesg of this node, exclude it, and submit again.",
    ),
    (
        r"DamagedSampleError|DataError|cannot identify image|UnidentifiedImage|truncated",
        "A sample cannot be read: verify the data, or set data.damaged_samples=skip-and-count.",
    ),
    (
        r"CheckpointError|manifest",
        "A checkpoint cannot be used: the message says why; older ones are tried by themselves.",
    ),
    (
        r"Error: invalid|ConfigError|ValidationError|error: ",
        "The configuration does not fit: the message names the key.",
    ),
]
_CODE_REMEDIES = {
    ExitCode.CONFIGURATION: "Correct what the message names and submit again.",
    ExitCode.NON_FINITE: "Lower optimizer.lr or optimizer.gradient_clipping, or look at the data around this step; "
    "metrics.jsonl holds the losses before it. Then submit again: the run continues from its last checkpoint.",
    ExitCode.PREFLIGHT: "The table in preflight-0000.log names what failed and where. Exclude the nodes or mend the "
    "file system, then submit again.",
}
_OUT_OF_MEMORY = re.compile(r"oom.kill|out of memory|OUT_OF_MEMORY", re.IGNORECASE)
_ENDED_BY_SLURM = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ DUE TO (TIME LIMIT|PREEMPTION|NODE FAILURE)")
_COLLECTIVE = re.compile(r"distributed_c10d|torch/distributed|all_reduce|barrier|deepspeed/comm")


@dataclass(frozen=True)
class Diagnosis:
    """The cause of an attempt's end."""

    cause: str
    """One line."""
    rank: int | None
    """None: all ranks alike, or not a rank's fault."""
    node: str | None
    step: int | None
    remedy: str
    evidence: str = ""
    """The lines that show it, and where they stand."""
    consequences: int = 0
    """Failures on other ranks that followed from it."""


@dataclass(frozen=True)
class Attempt:
    """One attempt: its entry in the ledger and what it left in its log directory."""

    entry: dict[str, Any]
    directory: Path
    batch_log: str = ""
    """What the job's batch script and slurmd wrote."""

    @property
    def ranks(self) -> list[RankLog]:
        """The parsed logs of its ranks."""
        return [read_rank_log(path) for path in sorted(self.directory.glob("rank-*.log"))]

    @property
    def task_ends(self) -> list[TaskEnd]:
        """How its tasks ended, where srun or the local launcher said so."""
        path = self.directory / "tasks.txt"
        return read_task_ends(path.read_text(errors="replace")) if path.exists() else []

    @property
    def vanished(self) -> bool:
        """Whether its batch script wrote no end into the ledger."""
        return bool(self.entry) and "ended" not in self.entry

    @property
    def failed_checks(self) -> list[tuple[str, str, str]]:
        """(node, check, what it said) of what preflight found wrong."""
        path = self.directory / "preflight.json"
        try:
            report = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError):  # cut off: what it says is in the logs, too
            report = {}
        return [(node, item["check"], item["detail"]) for node, items in report.items() for item in items
                if item["status"] == "fail"]  # fmt: skip

    def node_of(self, rank: int) -> str | None:
        """Ranks are distributed in blocks: consecutive ones share a node."""
        nodes, per_node = self.entry.get("nodes", []), self.entry.get("tasks_per_node", 1)
        return nodes[rank // per_node] if rank // per_node < len(nodes) else None


def diagnose(attempt: Attempt) -> Diagnosis:
    """Find the earliest failure that is not the consequence of another one.

    A process that a signal ended first leaves no traceback; the others then fail in the collective that it left. Errors
    of communication therefore count only where nothing else is found; NCCL's watchdog aborts a process because of them.
    Where Slurm ended the job, the signals were its own.
    """
    logs, ends = attempt.ranks, attempt.task_ends
    failures = sorted((failure for log in logs for failure in _first_of_each_kind(log)), key=lambda item: item.time)
    own = [failure for failure in failures if failure.kind in ("exception", "user_error")]
    by_slurm = attempt.entry.get("action") == STOP or _ENDED_BY_SLURM.search(attempt.batch_log) is not None
    lost_touch = {failure.rank for failure in failures if failure.kind == "communication"}
    death = next((end for end in ends if end.how != "Terminated"), None)
    if death is not None and death.how.startswith("Aborted") and death.rank in lost_touch:
        death = None
    if death is not None and death.is_death and not by_slurm and not any(item.rank == death.rank for item in own):
        return _from_death(attempt, death, logs, len(failures))
    if own:
        return _from_failure(attempt, own[0], failures)
    if by_slurm:
        return _from_scheduler(attempt, ends, logs)
    if not logs and (failed := attempt.failed_checks):
        return _from_preflight(attempt, failed)
    hangs = [failure for failure in failures if failure.kind == "hang"]
    if hangs:
        return _from_hang(attempt, hangs)
    if attempt.vanished and not ends:  # srun, too, died with its node
        return _from_vanished(attempt, failures, logs)
    if failures:
        return _from_communication(attempt, failures, ends)
    return _from_scheduler(attempt, ends, logs)


def _first_of_each_kind(log: RankLog) -> list[Failure]:
    """The trainer logs an exception, and Python prints it once more."""
    found: dict[str, Failure] = {}
    for failure in log.failures:
        found.setdefault(failure.kind, failure)
    return list(found.values())


def _from_failure(attempt: Attempt, failure: Failure, failures: list[Failure]) -> Diagnosis:
    same = {item.rank for item in failures if item.summary == failure.summary}
    everywhere = len(same) > 1 and len(same) == len(attempt.ranks)
    code = attempt.entry.get("outcome", "")
    remedy = next((text for pattern, text in _REMEDIES if re.search(pattern, failure.summary)), None)
    if failure.kind == "user_error":
        remedy = _CODE_REMEDIES.get(ExitCode.__members__.get(code, ExitCode.CONFIGURATION), remedy)
    return Diagnosis(
        cause=failure.summary,
        rank=None if everywhere else failure.rank,
        node=None if everywhere else attempt.node_of(failure.rank),
        step=failure.step,
        remedy=remedy or "Read the traceback: it stands below and in the log.",
        evidence=_excerpt(attempt, failure),
        consequences=sum(item.rank not in same for item in failures),
    )


def _from_death(attempt: Attempt, end: TaskEnd, logs: list[RankLog], consequences: int) -> Diagnosis:
    log = next((log for log in logs if log.rank == end.rank), None)
    own_text = log.path.read_text(errors="replace") if log is not None else ""
    if end.how.startswith("Out Of Memory") or _OUT_OF_MEMORY.search(own_text + attempt.batch_log):
        cause = "was killed because the node ran out of memory"
        remedy = "Ask for more memory (memory in the cluster file), or lower data.workers and data.prefetch."
    elif end.how.startswith("Killed"):
        cause = "was killed (SIGKILL) without a word"
        remedy = (
            "Look for the out-of-memory killer (dmesg) and for failed hardware on this node. If there is "
            "nothing, somebody or the node's monitoring ended it; the run continues from its last checkpoint."
        )
    else:
        cause = f"died: {end.how}"
        remedy = next(
            (text for pattern, text in _REMEDIES if re.search(pattern, end.how)),
            "A native library crashed: if it happens again on the same node, exclude the node.",
        )
    return Diagnosis(
        f"rank {end.rank} {cause}",
        end.rank,
        end.node,
        _last_step(logs),
        remedy,
        evidence=f"{attempt.directory}/tasks.txt: {end.node}: task {end.rank}: {end.how}",
        consequences=consequences,
    )


def _from_hang(attempt: Attempt, hangs: list[Failure]) -> Diagnosis:
    """All ranks dump their stacks; the one that is not waiting in a collective keeps the others waiting."""
    outside = [hang for hang in hangs if not any(_COLLECTIVE.search(frame) for frame in main_thread(hang.detail))]
    silent = [log.rank for log in attempt.ranks if not log.failures]
    suspect: int | None = None
    if outside and len(outside) < len(hangs):
        suspect = outside[0].rank
    elif silent:
        suspect = silent[0]
    else:
        places = Counter(map(_place, hangs))
        if len(places) > 1:
            rarest = min(places, key=places.__getitem__)
            suspect = next(hang.rank for hang in hangs if _place(hang) == rarest)
    shown = next((hang for hang in hangs if hang.rank == suspect), hangs[0])
    who, place = "every rank" if suspect is None else f"rank {suspect}", f"stands in {_place(shown)}"
    if suspect is not None and shown.rank != suspect:
        place = f"left no stacks: it is in native code, or its node is gone; rank {shown.rank} {place}"
    return Diagnosis(
        cause=f"a step did not end; {who} {place}",
        rank=suspect,
        node=attempt.node_of(suspect) if suspect is not None else None,
        step=shown.step,
        remedy="Compare the stacks of all ranks, and with NCCL the flight_recorder folder. A rank outside of any "
        "collective (data, file system, GPU) is the cause; if all wait in the same one, suspect the network.",
        evidence=_excerpt(attempt, shown),
        consequences=len(hangs) - 1,
    )


def _place(hang: Failure) -> str:
    return (main_thread(hang.detail) or ["an unknown place"])[0]


def _from_communication(attempt: Attempt, failures: list[Failure], ends: list[TaskEnd]) -> Diagnosis:
    first, failed = failures[0], {failure.rank for failure in failures}
    silent = [log.rank for log in attempt.ranks if log.rank not in failed]
    suspect = silent[0] if len(silent) == 1 else None
    ended = next((f" (rank {suspect}: {end.how})" for end in ends if end.rank == suspect), "")
    return Diagnosis(
        cause=f"communication failed first on rank {first.rank}, with no other error{ended}: {first.summary}",
        rank=suspect,
        node=attempt.node_of(suspect) if suspect is not None else None,
        step=first.step,
        remedy=(f"Rank {suspect} said nothing: look at its node first. " if suspect is not None else "")
        + "Check network and nodes with `python -m launchers.preflight`; a killed process leaves no traceback.",
        evidence=_excerpt(attempt, first),
        consequences=len(failures) - 1,
    )


def _from_vanished(attempt: Attempt, failures: list[Failure], logs: list[RankLog]) -> Diagnosis:
    """The batch script runs on the first node; ranks elsewhere may have time to say that they lost the others."""
    lost = {failure.rank for failure in failures}
    return Diagnosis(
        "the job vanished without an end"
        + (f"; {len(lost)} of {len(logs)} ranks lost the others" if lost else " (or it still runs)"),
        rank=None,
        node=attempt.node_of(0) if lost else None,
        step=_last_step(logs),
        remedy="If it is not running, the first node failed: look at its state with `sinfo -R`. The run continues from "
        "its last checkpoint.",
        evidence=_excerpt(attempt, failures[0]) if failures else "",
        consequences=len(failures),
    )


def _last_step(logs: list[RankLog]) -> int | None:
    return max((log.last_step for log in logs if log.last_step is not None), default=None)


def _from_preflight(attempt: Attempt, failed: list[tuple[str, str, str]]) -> Diagnosis:
    nodes = {node for node, _, _ in failed}
    first = next((item for item in failed if item[1] in ("configuration", "data", "weights")), failed[0])
    remedy = _CODE_REMEDIES.get(ExitCode.__members__.get(attempt.entry.get("outcome", ""), ExitCode.PREFLIGHT))
    return Diagnosis(
        cause=f"preflight failed: {first[1]}: {first[2]}",
        rank=None,
        node=first[0] if len(nodes) == 1 else None,
        step=None,
        remedy=remedy or _CODE_REMEDIES[ExitCode.PREFLIGHT],
        evidence="\n".join([f"{attempt.directory}/preflight.json:", *(": ".join(item) for item in failed[:9])]),
    )


def _from_scheduler(attempt: Attempt, ends: list[TaskEnd], logs: list[RankLog]) -> Diagnosis:
    reason = _ENDED_BY_SLURM.findall(attempt.batch_log)
    step = _last_step(logs)
    if reason:
        return Diagnosis(
            f"Slurm ended the job: {reason[-1].lower()}",
            None,
            None,
            step,
            "`sinfo -R` names the node that failed. The run continues from its last checkpoint."
            if reason[-1] == "NODE FAILURE"
            else "The run continues from its last checkpoint. If it lost much, save more often "
            "(train.checkpoint.interval) or raise signal_lead_seconds in the cluster file.",
        )
    if attempt.entry.get("action") == STOP:
        return Diagnosis("the job was cancelled (scancel)", None, None, step, "Submit it again to continue.")
    codes = [end for end in ends if end.exit_code]
    if codes:
        end = codes[0]
        log = next((log for log in logs if log.rank == end.rank), None)
        code = end.exit_code
        remedy = _CODE_REMEDIES.get(ExitCode(code)) if code in set(ExitCode) else None
        cause = f"rank {end.rank} left with exit code {code}; its last line: {log.last_text if log else ''}"
        return Diagnosis(
            cause, end.rank, end.node, step, remedy or "Read the end of its log.", f"{attempt.directory}/tasks.txt"
        )
    if not attempt.entry:
        return Diagnosis(
            "no error was written: the run still goes on, or was killed",
            None,
            None,
            step,
            "Start the same command again to continue from the last checkpoint. `python -m launchers.local` would have "
            "recorded how each process ended.",
        )
    return Diagnosis(
        "nothing in the logs explains the end",
        None,
        None,
        step,
        f"Read the batch log logs/slurm-{attempt.entry.get('job', '*')}.out.",
    )


def _excerpt(attempt: Attempt, failure: Failure, limit: int = 14) -> str:
    lines = failure.detail.splitlines()
    if len(lines) > limit:
        lines = [*lines[:3], "    ...", *lines[3 - limit :]]
    return "\n".join([f"{attempt.directory}/rank-{failure.rank:04d}.log:", *lines])
