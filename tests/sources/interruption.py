"""kill -9 at a chosen moment: real processes, killed while they work."""

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """How often the run and its children touched the file system."""


def run_until(work: Callable[[], Any], step: int | None, victims: Literal["group", "parent"]) -> Outcome:
    """Run ``work`` in a forked process and kill -9 it when it or its children touch the file system the nth time.

    Args:
        step: which touch; None lets the run end.
        victims: kill the process with all its children, or the process alone.
    """
    fork = multiprocessing.get_context("fork")
    count = fork.Value("q", 0)

    def watched() -> None:
        os.setsid()
        main = os.getpid()

        def hook(event: str, _: Any) -> None:
            if event not in FILE_EVENTS:
                return
            with count.get_lock():
                count.value += 1
                reached = count.value - 1 == step
            if reached:
                (os.killpg if victims == "group" else os.kill)(main, signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)

    run = fork.Process(target=watched)
    run.start()
    run.join()
    assert run.exitcode in (0, -signal.SIGKILL)
    return Outcome(killed=run.exitcode != 0, steps=count.value)
