"""One live run per run directory.

The lock is a file, ``run.lock``, created exclusively (``O_EXCL``, which is atomic on local disks, NFSv3 and later,
Lustre and GPFS alike) by rank 0. It names its owner: host, boot, process-id namespace, process id and start time, Slurm
job and restart count. A thread of the owner touches it every few seconds. Who finds a lock decides so:

* the owner's process ran on this very machine -> look the process up: alive means refuse, dead means take over;
* the owner was an earlier start of this same Slurm job -> Slurm has ended it: take over;
* otherwise watch the file: touched while we watch means refuse; untouched for ``STALE_AFTER`` seconds means take over.
  Ages are measured with the clock of the file system (a file touched by us is the reference), never by comparing hosts.

Taking over renames the lock that was judged dead and checks that it renamed that one. As a last resort against a race
that a weak file system might allow, the owner's thread verifies that the lock still is its own, and
:meth:`RunLock.check` raises if it is not.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megavar import storage
from megavar.errors import ClusterError, RunInUseError

FILE_NAME = "run.lock"
TOUCH_EVERY = 10.0
"""Seconds between signs of life."""
STALE_AFTER = 60.0
"""Seconds without a sign of life after which an owner that cannot be looked up counts as dead."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    token: str
    host: str
    boot: str
    """Identity of the running kernel: changes with every boot and differs between machines."""
    namespace: str
    """Process-id namespace (containers have their own)."""
    pid: int
    started: str
    """Start time of the process in clock ticks since boot: tells it from a later process with the same id."""
    job: str
    restart: int

    @classmethod
    def current(cls) -> "Owner":
        """This process."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            namespace=_namespace(),
            pid=os.getpid(),
            started=_start_time(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
        )

    def describe(self) -> str:
        """For people."""
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Start time of process ``pid``, or None if there is no such process or it has exited."""
    status = _read(f"/proc/{pid}/stat")
    if not status:
        return None
    fields = status.rpartition(")")[2].split()  # the command's name may contain spaces and parentheses
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(owner: Owner, mine: Owner) -> bool | None:
    """Whether the owner lives; None if that cannot be looked up from here."""
    if owner.boot and (owner.boot, owner.namespace) == (mine.boot, mine.namespace):
        return _start_time(owner.pid) == owner.started
    if owner.job and owner.job == mine.job and owner.restart < mine.restart:
        return False  # Slurm requeues a job only after all its processes have ended
    return None


class RunLock:
    """Holds the lock of a run directory until it is released or the process dies. Use on rank 0 only."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path = path
        self.owner = owner
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, run_directory: Path, stale_after: float = STALE_AFTER) -> "RunLock":
        """Lock ``run_directory``, taking over from an owner that died.

        Where the last owner cannot be looked up this takes up to ``stale_after`` seconds.

        Raises:
            RunInUseError: another run is alive in this directory.
        """
        run_directory = Path(run_directory)
        run_directory.mkdir(parents=True, exist_ok=True)
        path, mine = run_directory / FILE_NAME, Owner.current()
        while not _create(path, mine):
            if path.is_symlink():  # nobody holds a lock through a link, and one that dangles would be waited for
                _log.warning("Removing %s: it is a symbolic link, not a lock.", path)
                path.unlink(missing_ok=True)
                continue
            if path.is_dir():
                raise ClusterError(f"{path} is a folder, not a lock. Remove it, and start again.")
            found = _read_owner(path)
            if found is None:
                time.sleep(0.05)  # released, or not completely written yet
                if _read_owner(path) is None and _age(path) > stale_after:
                    path.unlink(missing_ok=True)  # its writer died half-way
                continue
            alive = _is_alive(found, mine)
            if alive is None:
                _log.info("%s is held by %s; waiting for a sign of life.", path, found.describe())
                alive = _shows_life(path, found, stale_after)
            if alive is None:
                continue
            if alive:
                raise RunInUseError(
                    f"{run_directory} is in use by {found.describe()}. Wait for that run to end, stop it, or give this "
                    f"one another run.directory. (If you know that it is dead, delete {path}.)"
                )
            if _remove_dead(path, found):
                _log.warning(
                    "Taking over %s from %s, which ended without releasing it.", run_directory, found.describe()
                )
        return cls(path, mine)

    @staticmethod
    def in_use(run_directory: Path) -> bool:
        """Whether somebody seems to hold ``run_directory``; a lock that a dead process left does not count."""
        path = run_directory / FILE_NAME
        owner = _read_owner(path)
        if owner is None:
            return False
        alive = _is_alive(owner, Owner.current())
        return _age(path) <= STALE_AFTER if alive is None else alive

    def check(self) -> None:
        """Call before writing to the run directory.

        Raises:
            ClusterError: the lock was taken from us (this process was stopped for longer than others wait), or it is
                gone, most likely with the whole directory.
        """
        found = _read_owner(self.path)
        if found is None:
            what = "its lock" if self.path.parent.is_dir() else "the whole directory"
            raise ClusterError(
                f"{self.path.parent} was removed under a run that was going on ({what} is gone). It stops: what it "
                f"would write from now on would be half a run. Restore the directory, or start again in another one."
            )
        if self._lost or found != self.owner:
            raise ClusterError(
                f"{self.path} now belongs to another run: this process was suspended so long that it counted as dead. "
                f"It stops without saving; the other run continues from the last checkpoint."
            )

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        self._thread.join()
        if not self._lost and _read_owner(self.path) == self.owner:
            self.path.unlink(missing_ok=True)

    def _show_life(self) -> None:
        while not self._stop.wait(TOUCH_EVERY):
            try:
                if _read_owner(self.path) != self.owner:
                    self._lost = True
                    return
                os.utime(self.path)
            except OSError as error:  # a file system that stalls now may be back at the next turn
                _log.warning("Cannot touch %s: %s", self.path, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _create(path: Path, owner: Owner) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(owner), file)
        file.flush()
        os.fsync(file.fileno())
    storage.fsync_directory(path.parent)
    return True


def _read_owner(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _age(path: Path) -> float:
    """Seconds since ``path`` was touched, by the clock of its file system; 0 if it is gone."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _shows_life(path: Path, owner: Owner, stale_after: float) -> bool | None:
    """Watch a lock until its owner touches it (True), or has not for ``stale_after`` seconds (False).

    None if the lock was released or changed hands meanwhile.
    """
    try:
        first = path.stat().st_mtime
        while _read_owner(path) == owner:  # opening the file makes NFS fetch its times anew
            if path.stat().st_mtime != first:
                return True
            if _age(path) > stale_after:
                return False
            time.sleep(min(1.0, stale_after / 10))
    except FileNotFoundError:
        pass
    return None


def _remove_dead(path: Path, owner: Owner) -> bool:
    """Remove the lock of ``owner``, if it still is that one."""
    grave = path.with_name(f"{path.name}.dead-{owner.token}")
    try:
        path.rename(grave)
    except FileNotFoundError:
        return False  # another contender was faster
    if _read_owner(grave) != owner:  # we took a new owner's lock: put it back
        with contextlib.suppress(OSError):
            os.link(grave, path)
        grave.unlink(missing_ok=True)
        return False
    grave.unlink(missing_ok=True)
    return True
