"""The stream of micro-batches of one rank, from any step on, read by worker processes or in place."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megavar.data.batch import Batch
from megavar.data.order import micro_batch_positions, order_of, rank_batch_size
from megavar.data.pixels import to_float
from megavar.data.reading import DamagePolicy, SampleReader
from megavar.data.source import Source
from megavar.data.text import TextEncoder
from megavar.data.transforms import Transform
from megavar.errors import MegavarError


class _Reads(Dataset):
    """What a worker process runs: (epochs, indices) of a micro-batch -> Batch, or the error to raise."""

    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __getitem__(self, place: tuple[Tensor, Tensor]) -> Batch | MegavarError:
        try:
            return self.reader.read(*place)
        except MegavarError as error:
            # Raised here, torch would wrap it in a traceback; the message is for a person.
            return error


def leave_signals_to_parent(worker: int) -> None:
    """Make this worker process deaf to signals that are meant for the training process.

    A preemption signal reaches every process of a job; a worker that died of it would break the last steps before the
    checkpoint. SIGTERM ends the worker only when the training process sends it.
    """
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()


class Loader:
    """Yields, for each step, the list of micro-batches of one data-parallel rank (see ``megavar.data.order``).

    Resuming is ``start_step``. Iteration has no end unless ``stop_step`` (exclusive) is given.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        workers: int = 0,
        prefetch: int = 4,
        damaged: DamagePolicy = "fail",
        text: TextEncoder | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        rank_batch_size(global_batch_size, micro_batch_size, data_parallel_size)
        self.order = order_of(source, seed)
        self.reader = SampleReader(source, transform, seed=seed, damaged=damaged, text=text)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.start_step = start_step
        self.stop_step = stop_step
        self.workers = workers
        self.prefetch = prefetch
        self.device = torch.device(device)
        self.replaced = 0
        """Damaged samples of this rank that others have stood in for since ``start_step``."""

    def _steps(self) -> Iterator[int]:
        return iter(count(self.start_step) if self.stop_step is None else range(self.start_step, self.stop_step))

    def _ranges(self, step: int) -> list[tuple[int, int]]:
        return micro_batch_positions(
            step,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            data_parallel_rank=self.data_parallel_rank,
            data_parallel_size=self.data_parallel_size,
        )

    def _results(self) -> Iterator[Batch | MegavarError]:
        """Micro-batches with uint8 images on the CPU, or the error to raise."""
        reads = _Reads(self.reader)
        places = (self.order.locate(*positions) for step in self._steps() for positions in self._ranges(step))
        return self._in_workers(reads, self.workers, places) if self.workers else map(reads.__getitem__, places)

    def _in_workers(self, dataset: Dataset, workers: int, keys: Iterable[Any] | None = None) -> Iterator[Any]:
        return iter(
            DataLoader(
                dataset,
                sampler=keys,  # type: ignore[arg-type]  # any iterable of keys
                batch_size=None,
                num_workers=workers,
                prefetch_factor=self.prefetch,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=leave_signals_to_parent,
                generator=torch.Generator(),  # else every iterator would advance the global generator
            )
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        results = self._results()
        try:
            for step in self._steps():
                yield [self._finish(next(results)) for _ in self._ranges(step)]
        finally:
            del results  # kept by a traceback, workers would end late and slowly: when the garbage is collected

    def _finish(self, result: Batch | MegavarError) -> Batch:
        if isinstance(result, MegavarError):
            raise result
        if result.replaced is not None:
            self.replaced += int(result.replaced.sum())
        batch = result.to(self.device)
        return batch if batch.images is None else replace(batch, images=to_float(batch.images))
