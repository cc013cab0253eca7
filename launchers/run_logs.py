"""Reads what an attempt left behind: the logs of its ranks and the messages about how its tasks ended.

Formats relied on, all in ``logs/attempt-0001/`` (or ``logs/`` itself for runs started without a launcher):

``rank-0003.log``  standard output and error of rank 3. Lines of megavar look like
                   ``2026-08-22T12:34:56.789Z rank=3 step=1200 WARNING message`` (megavar/logs.py); errors for people
                   like ``megavar train: error: message`` (megavar/__main__.py). Between them stand Python tracebacks
                   and, after a line whose message begins with ``HANG:``, the stacks that faulthandler dumps
                   (megavar/training/watchdog.py), or by itself after ``Timeout (0:11:00)!``. A C++ exception that
                   nobody catches, such as that of NCCL's watchdog, says ``terminate called after ...`` and
                   ``  what():  ...`` before the process aborts.
``tasks.txt``      how tasks ended, in their order: ``srun: error: n2: task 1: Exited with exit code 7``, or
                   instead ``Killed``, ``Terminated``, ``Segmentation fault``, ...; launchers.local writes the same.
"""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+)Z rank=\d+ step=(?P<step>\d+|-) [A-Z]+ (?P<text>.*)")
_USER_ERROR = re.compile(r"megavar \w+: error: (?P<text>.*)")
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:: .*)?$")
_CHAIN = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_THREAD = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):")
_TASK = re.compile(r"\w+: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_PREFIX = re.compile(r"^\[rank\d+\]: ")  # torch.distributed's, before uncaught exceptions
_BACKSTOP = re.compile(r"Timeout \(\d+:\d\d:\d\d(?:\.\d+)?\)!$")
_TERMINATE = re.compile(r"terminate called after throwing an instance of '(?P<type>[^']+)'")
_WHAT = re.compile(r"\s+what\(\):\s+(?P<text>.+)")

COMMUNICATION = re.compile(
    r"^(?!.*(?:EADDRINUSE|CUDA error)).*(?:"  # a port that is taken, a GPU that fails: nobody else's fault
    r"NCCL|nccl|gloo|TCPStore|DistBackendError|DistNetworkError|DistStoreError|"
    r"Connection (?:closed|reset|refused|was likely closed)|closed by peer|Broken pipe|collective operation timeout|"
    r"[Ss]ocket [Tt]imeout|Timed out waiting|wait timeout|Timeout waiting for key|"
    r"[Pp]rocess group .* (?:abort|destroyed))"
)
"""Exceptions that one dead rank causes on the others."""


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong on one rank."""

    kind: Literal["exception", "communication", "user_error", "hang"]
    rank: int
    time: float
    """Unix time; where no line with a time stands right before it, that of the last change of the file."""
    step: int | None
    summary: str
    """One line."""
    detail: str
    """The traceback or the stack."""


@dataclass(frozen=True)
class TaskEnd:
    """How one rank's process ended."""

    rank: int
    node: str
    how: str
    """``Killed``, ``Exited with exit code 7``, ..."""

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None if a signal ended it."""
        match = _EXIT_CODE.match(self.how)
        return int(match[1]) if match else None

    @property
    def is_death(self) -> bool:
        """Whether a signal ended it that was not sent to take it down with the others."""
        return self.exit_code is None and not self.how.startswith("Terminated")


@dataclass
class RankLog:
    """The log of one rank."""

    rank: int
    path: Path
    failures: list[Failure] = field(default_factory=list)
    first_time: float | None = None
    last_time: float | None = None
    last_step: int | None = None
    last_text: str = ""
    """Its last line that is not blank."""


def read_task_ends(text: str) -> list[TaskEnd]:
    """Every task that the messages of srun name, in their order. Groups of tasks are spread out."""
    ends = []
    for match in _TASK.finditer(text):
        for rank in expand(match["tasks"]):
            ends.append(TaskEnd(rank, match["node"], match["how"].strip()))
    return ends


def expand(numbers: str) -> list[int]:
    """``0-2,5`` -> 0, 1, 2, 5."""
    found: list[int] = []
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def read_rank_log(path: Path) -> RankLog:
    """Parse ``rank-0003.log``."""
    number = re.search(r"(\d+)", path.stem)
    assert number is not None, path
    log = RankLog(int(number[1]), path)
    lines = [_PREFIX.sub("", line) for line in path.read_text(errors="replace").splitlines()]
    written = path.stat().st_mtime
    position = 0
    while position < len(lines):
        position = _read_one(log, lines, position, written)
    return log


def _read_one(log: RankLog, lines: list[str], position: int, written: float) -> int:
    """Take in what begins at line ``position``; return the line after it."""
    line = lines[position]
    if line.strip():
        log.last_text = line.strip()
    if match := _LINE.match(line):
        time = datetime.fromisoformat(match["time"]).replace(tzinfo=UTC).timestamp()
        log.first_time = time if log.first_time is None else log.first_time
        log.last_time = time
        if match["step"] != "-":
            log.last_step = int(match["step"])
        if match["text"].startswith("HANG:"):
            return _take_dump(log, lines, position, time, match["text"])
        return position + 1
    stamped = position > 0 and _LINE.match(lines[position - 1])
    time = (log.last_time or written) if stamped else written
    if _BACKSTOP.match(line):
        return _take_dump(log, lines, position, time, f"HANG: {line.strip()}")
    if match := _USER_ERROR.match(line):
        log.failures.append(Failure("user_error", log.rank, time, log.last_step, match["text"], line))
    elif match := _TERMINATE.match(line):
        what = _WHAT.match(lines[position + 1]) if position + 1 < len(lines) else None
        summary = f"{match['type']}: {what['text']}" if what else match["type"]
        _take_exception(log, summary, lines[position : position + 2], time)
    elif line.strip() == _TRACEBACK:
        end, summary = _end_of_traceback(lines, position)
        _take_exception(log, summary, lines[position:end], time)
        return end
    return position + 1


def _take_exception(log: RankLog, summary: str, detail: list[str], time: float) -> None:
    kind: Literal["exception", "communication"] = "communication" if COMMUNICATION.search(summary) else "exception"
    log.failures.append(Failure(kind, log.rank, time, log.last_step, summary, "\n".join(detail)))


def _take_dump(log: RankLog, lines: list[str], position: int, time: float, summary: str) -> int:
    end = _end_of_dump(lines, position + 1)
    detail = "\n".join(lines[position + 1 : end])
    log.failures.append(Failure("hang", log.rank, time, log.last_step, summary, detail))
    return end


def _end_of_traceback(lines: list[str], start: int) -> tuple[int, str]:
    """The line after a traceback and all that are chained to it, and the first exception: the cause of the others."""
    summary, position = "", start + 1
    while position < len(lines):
        line = lines[position]
        if line.startswith((" ", "\t")) or line.strip() in ("", _TRACEBACK, *_CHAIN):
            position += 1
        elif not summary or lines[position - 1].startswith(" "):
            if _LINE.match(line) or not _EXCEPTION.match(line):
                break
            summary = summary or line.strip()
            position += 1
        else:
            break
    return position, summary or "a traceback without an end"


def _end_of_dump(lines: list[str], start: int) -> int:
    position = start
    while position < len(lines) and (
        lines[position].startswith("  File") or not lines[position].strip() or _THREAD.match(lines[position])
    ):
        position += 1
    return position


def main_thread(dump: str) -> list[str]:
    """Frames of the main thread (innermost first) in a dump of faulthandler: the thread that is listed last."""
    threads: list[list[str]] = [[]]
    for line in dump.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif line.startswith("  File"):
            threads[-1].append(line.strip())
    return threads[-1]
