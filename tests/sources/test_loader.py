import multiprocessing
import subprocess

import pytest
import torch

from megavar.config.data import DataConfig, PhotographsSource, VarTransform
from megavar.data.build import build_loader, build_source
from megavar.data.loader import Loader
from megavar.data.transforms import Var

CONFIG = DataConfig(source=PhotographsSource(length=50), image_size=32, transform=VarTransform())
SOURCE = build_source(DataConfig(source=PhotographsSource(length=50), image_size=40))


def flat(loader):
    """Images, labels, sample ids and epochs of all micro-batches, one after the other."""
    batches = [batch for step in loader for batch in step]
    names = ("images", "labels", "sample_ids", "epochs")
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in names]


def load(**arguments):
    return Loader(
        SOURCE, Var(32), **{"seed": 1, "global_batch_size": 16, "micro_batch_size": 4, "stop_step": 12} | arguments
    )


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


WHOLE = flat(load(micro_batch_size=16))


def test_batches_are_what_models_expect():
    batch = next(iter(load()))[0]
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 32, 32), torch.float32)
    assert -1 <= batch.images.min() < batch.images.max() <= 1
    assert batch.labels.dtype == batch.sample_ids.dtype == batch.epochs.dtype == torch.int64
    assert len(batch) == 4
    assert len(batch.to("cpu")) == 4


def test_nothing_is_dropped_or_padded():
    _, labels, sample_ids, epochs = WHOLE
    assert len(sample_ids) == 12 * 16
    assert sorted(sample_ids[:50].tolist()) == list(range(50))
    assert sorted(sample_ids[50:100].tolist()) == list(range(50))
    assert epochs.tolist() == [position // 50 for position in range(192)]
    assert labels.tolist() == [index % 10 for index in sample_ids.tolist()]


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_accumulation_sees_the_same_samples(micro_batch_size):
    assert same(flat(load(micro_batch_size=micro_batch_size)), WHOLE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_see_the_same_global_batches(ranks):
    parts = [flat(load(data_parallel_rank=rank, data_parallel_size=ranks)) for rank in range(ranks)]
    for field in range(4):
        per_step = [part[field].reshape(12, 16 // ranks, *part[field].shape[1:]) for part in parts]
        assert torch.equal(torch.cat(per_step, dim=1).flatten(0, 1), WHOLE[field])


@pytest.mark.parametrize("step", [1, 3, 7, 11])  # step 3 contains the boundary between two epochs
def test_resuming_continues_the_sequence(step):
    assert same(flat(load(start_step=step)), [field[step * 16 :] for field in WHOLE])


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(workers):
    state = torch.get_rng_state()
    assert same(flat(load(workers=workers)), WHOLE)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_changes_with_the_epoch():
    images, _, sample_ids, epochs = WHOLE
    first, second = [images[(sample_ids == 7) & (epochs == epoch)][0] for epoch in (0, 1)]
    assert not torch.equal(first, second)


def test_the_test_split_is_not_augmented():
    test = build_source(CONFIG, "test")
    loader = build_loader(CONFIG, test, seed=0, global_batch_size=32, micro_batch_size=32, stop_step=70)
    images, _, sample_ids, _ = flat(loader)
    seen: dict[int, torch.Tensor] = {}
    repeats = 0
    for image, index in zip(images, sample_ids.tolist()):
        repeats += index in seen
        assert torch.equal(seen.setdefault(index, image), image)
    assert repeats > 1000


def test_workers_outlive_a_preemption_signal():
    """A signal that is sent to the whole job must not break the steps before the checkpoint."""
    others = set(multiprocessing.active_children())
    iterator = iter(load(workers=2, stop_step=200))
    first = next(iterator)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:  # not from this process: the job's manager sends it
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    rest = [batch for step in iterator for batch in step]
    assert len(first) + len(rest) == 800


def _fail_while_workers_wait(error):
    iterator = iter(load(workers=2, stop_step=200))
    next(iterator)
    error.iterator = iterator  # as a traceback does
    raise error


def test_a_failing_run_does_not_hang_on_its_workers():
    run = multiprocessing.get_context("fork").Process(target=_fail_while_workers_wait, args=(ValueError("on purpose"),))
    run.start()
    run.join(timeout=60)
    assert run.exitcode == 1
