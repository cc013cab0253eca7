"""Runs a function on several ranks over gloo, in forked children: seconds instead of torchrun's half minute.

The parent imports the heavy libraries once and never creates a process group; every call forks fresh ranks that
rendezvous through a file. A rank that raises ends the others at once and its traceback reaches the test.

    results = run_ranks(2, train_some_steps, config)   # [result of rank 0, result of rank 1]
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names of sandboxes do not always resolve

import torch
import torch.distributed as dist


class RankFailure(AssertionError):
    """A rank raised, died or did not finish in time."""


def _import_heavy_libraries() -> None:
    torch.set_num_threads(1)
    from megavar.parallel import cpu_backend
    from megavar.parallel.deepspeed_backend import import_deepspeed

    cpu_backend.install()
    import_deepspeed()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (2 s that deepspeed.initialize would spend)
    import megatron.core.parallel_state
    import megatron.core.pipeline_parallel
    import megatron.core.tensor_parallel  # noqa: F401


def _child(rank: int, world_size: int, directory: Path, function: Callable[..., Any], arguments: tuple) -> None:
    status = 1
    try:
        errors = (directory / f"{rank}.stacks").open("w")
        faulthandler.enable(errors)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        torch.set_num_threads(1)  # renews torch's thread pool, which autograd's threads would race to do after a fork
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
        result = function(*arguments)
        (directory / f"{rank}.result").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        (directory / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        import sys

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # no atexit handlers, no process-group teardown that could wait for a dead peer


def _failure(directory: Path, processes: list[BaseProcess], reason: str) -> RankFailure:
    """The earliest traceback among the ranks; later ones are mostly its consequences."""
    written = sorted(directory.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if written:
        return RankFailure(f"rank {written[0].stem} of {len(processes)} raised:\n{written[0].read_text()}")
    stacks = "\n".join(f"--- rank {path.stem}\n{path.read_text()}" for path in sorted(directory.glob("*.stacks")))
    return RankFailure(f"{reason}\n{stacks}")


def _stop(processes: list[BaseProcess], signal_number: int) -> None:
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal_number)


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Run ``function(*arguments)`` on ``world_size`` forked ranks with a gloo default group.

    The children read RANK, WORLD_SIZE and LOCAL_RANK from the environment like under torchrun, so
    ``megavar.parallel.environment.environment()`` and ``topology.initialize`` work as usual.

    Returns:
        The (picklable) return values in rank order.

    Raises:
        RankFailure: with the first traceback, or with the stacks of all ranks after ``timeout`` seconds.
    """
    _import_heavy_libraries()
    assert not dist.is_initialized(), "the parent of forked ranks must not own a process group"
    with tempfile.TemporaryDirectory(prefix="megavar-ranks-") as temporary:
        directory = Path(temporary)
        context = multiprocessing.get_context("fork")
        processes: list[BaseProcess] = [
            context.Process(target=_child, args=(rank, world_size, directory, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        gc.freeze()  # else the first full collection in each child touches, and so copies, all of the parent: 0.5 s
        for process in processes:
            process.start()
        gc.unfreeze()
        deadline = time.monotonic() + timeout
        try:
            running = list(processes)
            while running:
                wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
                running = [process for process in processes if process.is_alive()]
                broken = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
                if broken:
                    time.sleep(0.2)  # let the other ranks of the same failure write theirs
                    reason = f"rank {broken[0]} died with exit code {processes[broken[0]].exitcode}"
                    raise _failure(directory, processes, reason)
                if running and time.monotonic() >= deadline:
                    _stop(processes, signal.SIGABRT)  # faulthandler writes the stacks
                    time.sleep(0.5)
                    raise _failure(directory, processes, f"not finished after {timeout} s; stacks of all ranks:")
            return [pickle.loads((directory / f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            _stop(processes, signal.SIGKILL)
            for process in processes:
                process.join()
