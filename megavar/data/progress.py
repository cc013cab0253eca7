"""Long work on a folder of files that survives kill -9 at any moment and is shared by processes.

What is under way lives in the sub-folder ``.progress`` of the folder, temporary files included: the folder itself only
ever contains finished files, and removing ``.progress`` removes every trace.
"""

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from megavar.errors import DataError
from megavar.storage import fsync_directory

PROGRESS = ".progress"
Result = TypeVar("Result")


def publish(folder: Path, *names: str) -> None:
    """Move finished files from ``.progress`` into ``folder``, durably."""
    for name in names:
        (folder / PROGRESS / name).replace(folder / name)
    fsync_directory(folder)


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

    Raises:
        DataError: another process keeps the lock for ``patience`` seconds.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        for _ in range(max(1, round(patience / 0.05))):
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        else:
            raise DataError(f"Another process is at work in {lock.parent.parent}. Wait for it, or stop it.")
        yield


def in_processes(
    function: Callable[[int], Result], items: Iterable[int], processes: int
) -> Iterable[tuple[int, Result]]:
    """Run ``function`` on every item in forked processes; yield (item, result) as they finish."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=end_with_parent, initargs=(os.getpid(),)
    ) as pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
