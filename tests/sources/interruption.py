"""kill -9 at a chosen moment: real processes, killed while they work."""

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import SEM_VALUE_MAX
from pathlib import Path
from typing import Any, Literal

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def interruptions(root: Path, steps: int, *, folders: int, seed: str) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Folders, and two moments at which to interrupt work on each. The first ones are spread over all ``steps``."""
    chance = random.Random(seed)
    for number in range(folders):
        first = int((number + chance.random()) * steps / folders)
        yield root / f"interrupted-{number}", (first, chance.randrange(steps))


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    killed: bool
    steps: int
    """How often the run and its children touched the file system before it was killed."""


def run_until(work: Callable[[], Any], step: int | None, victims: Literal["group", "parent"]) -> Outcome:
    """Run ``work`` in a forked process and kill -9 it when it or its children touch the file system the nth time.

    Args:
        step: which touch; None lets the run end.
        victims: kill the process with all its children, or the process alone.
    """
    fork = multiprocessing.get_context("fork")
    limit = SEM_VALUE_MAX if step is None else step
    # Semaphores, not a locked counter: whoever is killed while it holds a lock leaves it locked for ever.
    touches_left, kills_left = fork.Semaphore(limit), fork.Semaphore(1)

    def watched() -> None:
        os.setsid()
        main = os.getpid()

        def hook(event: str, _: Any) -> None:
            if event not in FILE_EVENTS:
                return
            if not touches_left.acquire(block=False) and kills_left.acquire(block=False):
                (os.killpg if victims == "group" else os.kill)(main, signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)

    run = fork.Process(target=watched)
    run.start()
    run.join()
    assert run.exitcode in (0, -signal.SIGKILL)
    return Outcome(killed=run.exitcode != 0, steps=limit - touches_left.get_value())
