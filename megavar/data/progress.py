"""Long work on a folder of files that survives kill -9 at any moment and is shared by processes.

What is under way lives in the sub-folder ``.progress`` of the folder, temporary files included: the folder itself only
ever contains finished files, and removing ``.progress`` removes every trace.
"""

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megavar.errors import DataError
from megavar.storage import fsync_directory, refuse_link

PROGRESS = ".progress"
Result = TypeVar("Result")
log = logging.getLogger(__name__)


def publish(folder: Path, *names: str) -> None:
    """Move finished files from ``.progress`` into ``folder``, durably."""
    for name in names:
        (folder / PROGRESS / name).replace(folder / name)
    fsync_directory(folder)


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in ``.progress/name``; None if it is not there (yet, or any more)."""
    try:
        record = json.loads((folder / PROGRESS / name).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def end_with_parent(parent: int) -> None:
    """End this process soon after the process ``parent`` has died, however it died."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def only_one(lock: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold ``lock`` against other processes. Forked children share it, so it outlives a killed parent until they end.

    Where the file system offers no locks (Lustre mounted without them), nothing is held and the log says so.

    Raises:
        DataError: another process keeps the lock for ``patience`` seconds, or it is a link.
    """
    refuse_link(lock.parent, DataError)
    refuse_link(lock, DataError)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as file:
        for _ in range(max(1, round(patience / 0.05))):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError as error:
                log.warning("%s cannot be locked (%s): do not start the same work twice.", lock, error.strerror)
                break
        else:
            raise DataError(f"Another process is at work in {lock.parent.parent}. Wait for it, or stop it.")
        yield


_function: Callable[[int], Any]


def _begin(parent: int, function: Callable[[int], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the whole group: end, without a traceback each
    end_with_parent(parent)


def _call(item: int) -> Any:
    return _function(item)


def in_processes(
    function: Callable[[int], Result], items: Iterable[int], processes: int
) -> Iterable[tuple[int, Result]]:
    """Run ``function`` on every item in forked processes; yield (item, result) as they finish.

    What ``function`` refers to is inherited, not copied.

    Raises:
        DataError: a process was killed.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_begin, initargs=(os.getpid(), function)
    ) as pool:
        futures = {pool.submit(_call, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "A worker process was killed, most likely because memory ran out. Run the same command again; "
                "--processes sets how many work at a time."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
