"""Samples on disk: every index once, tokens always, images where they are kept, the same bytes after interruptions."""

import numpy as np
import pytest
import torch

from megavar.chunks import ChunkStore
from megavar.errors import DataError
from megavar.evaluation.results import class_histogram
from megavar.parallel.environment import Environment
from megavar.sampling.sampler import Drawn
from megavar.sampling.samples import Samples

COUNT, SIZE, CLASSES = 23, 4, 10
ONE = Environment(0, 1, 0, "single")


def decode(tokens):
    wide = torch.from_numpy(tokens.astype(np.int64))
    return (wide[:, :3, None, None] * torch.arange(1, 5).view(2, 2) % 256).to(torch.uint8)


class Counting:
    """A sampler that remembers what it drew, and may be interrupted before a chunk."""

    def __init__(self, interrupted_at=None, classes=True):
        self.drawn, self.interrupted_at, self.classes = [], interrupted_at, classes

    def draw(self, indices):
        if self.interrupted_at in indices.tolist():
            raise KeyboardInterrupt
        self.drawn += indices.tolist()
        tokens = ((indices[:, None] * 7919 + torch.arange(6) ** 3) % 2**16).numpy().astype(np.uint16)
        condition = {"labels": (indices % CLASSES).numpy()} if self.classes else {}
        return Drawn(decode(tokens), {"tokens": tokens, **condition})


def samples(directory, *, keep=0, **given):
    sampler = Counting(**given)
    store = ChunkStore.open(directory, count=COUNT, size=SIZE, identity={"what": "test"})
    return Samples(store, decode, sampler=sampler, keep_images=keep), sampler


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


EXPECTED = Counting().draw(torch.arange(COUNT)).images


@pytest.mark.parametrize("keep", [0, 5, COUNT])
def test_what_was_not_kept_is_decoded_again(tmp_path, keep):
    drawn, sampler = samples(tmp_path, keep=keep)
    drawn.fill(ONE)
    assert sampler.drawn == list(range(COUNT))
    stored = [drawn.store.names(chunk) for chunk in range(len(drawn.store))]
    kept = -(-keep // SIZE)  # whole chunks
    assert stored == [{"labels", "tokens", "images"}] * kept + [{"labels", "tokens"}] * (len(drawn.store) - kept)
    assert drawn.store.read(0)["tokens"].dtype == np.uint16
    for opened in (drawn, Samples.stored(tmp_path, decode)):
        for first, last in ((0, COUNT), (3, 5), (4, 8), (7, 22), (22, 23)):
            assert torch.equal(opened.read(first, last), EXPECTED[first:last])
    assert sampler.drawn == list(range(COUNT))


def test_reading_draws_what_is_missing_and_nothing_twice(tmp_path):
    drawn, sampler = samples(tmp_path)
    assert torch.equal(drawn.read(5, 10), EXPECTED[5:10]) and sampler.drawn == list(range(4, 12))
    assert torch.equal(drawn.read(0, COUNT), EXPECTED) and sorted(sampler.drawn) == list(range(COUNT))


def test_every_class_gets_its_share_where_the_count_does_not_divide(tmp_path):
    drawn, _ = samples(tmp_path)
    drawn.fill(ONE)
    more = COUNT % CLASSES
    assert class_histogram(drawn.labels) == {str(label): 3 if label < more else 2 for label in range(CLASSES)}
    without, _ = samples(tmp_path / "captions", classes=False)
    without.fill(ONE)
    assert without.labels is None


@pytest.mark.parametrize("interrupted_at", [0, 9, 22])
def test_interrupted_sampling_continues_to_the_same_bytes(tmp_path, interrupted_at):
    samples(tmp_path / "whole", keep=6)[0].fill(ONE)
    broken, _ = samples(tmp_path / "broken", keep=6, interrupted_at=interrupted_at)
    with pytest.raises(KeyboardInterrupt):
        broken.fill(ONE)
    again, sampler = samples(tmp_path / "broken", keep=6)
    again.fill(ONE)
    assert sampler.drawn == list(range(interrupted_at // SIZE * SIZE, COUNT))
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_images_can_be_kept_later(tmp_path):
    samples(tmp_path / "kept", keep=COUNT)[0].fill(ONE)
    samples(tmp_path / "later", keep=0)[0].fill(ONE)
    later, sampler = samples(tmp_path / "later", keep=COUNT)
    later.fill(ONE)
    assert sampler.drawn == [] and content(tmp_path / "later") == content(tmp_path / "kept")


def test_stored_samples_that_cannot_be_read_are_explained(tmp_path):
    drawn, _ = samples(tmp_path, keep=4)
    drawn.read(0, 4)
    with pytest.raises(DataError, match=r"5 of 6 chunks are missing .* the first is chunk_000001"):
        Samples.stored(tmp_path)
    drawn.fill(ONE)
    without = Samples.stored(tmp_path)
    assert torch.equal(without.read(0, 4), EXPECTED[:4])
    with pytest.raises(DataError, match=r"holds no images, only labels, tokens.*keep_images=23"):
        without.read(4, 5)
