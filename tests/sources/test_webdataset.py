"""Training order and damage, read from shards."""

import logging
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megavar.data.loader import Loader
from megavar.data.shards.index import build_index, walk_tar
from megavar.data.shards.listing import list_originals
from megavar.data.shards.writing import Plan, write_shards
from megavar.data.source import DamagedSampleError
from megavar.data.transforms import Var
from megavar.data.webdataset import ShardFolder
from megavar.errors import DataError
from tests.sources.originals import flip_bit, shard, write_pairs

STEPS, BATCH = 12, 12


def sample_ids(folder, ranks=1, start_step=0, stop_step=STEPS, **arguments):
    """Sample ids per step of the global batch, [steps, BATCH], gathered from all ranks, and all loaders."""
    loaders = [
        Loader(
            ShardFolder("train", folder),
            Var(32),
            seed=7,
            global_batch_size=BATCH,
            micro_batch_size=3,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            start_step=start_step,
            stop_step=stop_step,
            **arguments,
        )
        for rank in range(ranks)
    ]
    streams = [iter(loader) for loader in loaders]
    steps = []
    for _ in range(start_step, stop_step):
        parts = [batch for stream in streams for batch in next(stream)]
        steps.append(torch.cat([batch.sample_ids for batch in parts]))
    return torch.stack(steps), loaders


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def test_samples_are_those_of_the_tars(shards):
    source = ShardFolder("train", shards)
    assert (len(source), source.num_classes) == (60, 10)
    for index in (0, 11, 12, 47, 59):
        shard, place = divmod(index, 12)
        path = shards / f"shard-{shard:06d}.tar"
        record = build_index(path)[0][place]
        start = int(record["image_offset"])
        sample = source.read(index)
        assert sample.image == path.read_bytes()[start : start + int(record["image_size"])]
        assert sample.label == record["label"]
        assert sample.key.startswith(f"shard-{shard:06d}.tar/{index:09d}.")


def test_many_shards_do_not_exhaust_open_files(originals, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("megavar.data.webdataset.OPEN_FILES", 2)
    monkeypatch.setattr("megavar.data.webdataset.INDEXES", 3)
    source = ShardFolder("train", shard(originals, tmp_path, shards=60))
    expected = [ShardFolder("train", shards).read(index).image for index in range(60)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 8, limits[1]))
    try:
        for index in np.random.default_rng(0).permutation(120) % 60:
            assert source.read(int(index)).image == expected[index]
            assert len(source._indexes) <= 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_ranks_than_shards(originals, shards, tmp_path):
    expected, _ = sample_ids(shards)
    found, _ = sample_ids(shard(originals, tmp_path, shards=1), ranks=4)
    assert torch.equal(found, expected)


def test_interrupted_on_two_ranks_and_continued_on_one_and_four(shards):
    """60 samples in batches of 12: epochs end with steps 4 and 9; the run is cut in an epoch and at its end."""
    expected, _ = sample_ids(shards)
    assert all(sorted(expected.flatten()[e * 60 : (e + 1) * 60].tolist()) == list(range(60)) for e in range(2))
    for cut, second_cut in ((3, 7), (5, 10)):
        first, _ = sample_ids(shards, ranks=2, stop_step=cut)
        second, _ = sample_ids(shards, ranks=1, start_step=cut, stop_step=second_cut)
        third, _ = sample_ids(shards, ranks=4, start_step=second_cut, workers=1)
        assert torch.equal(torch.cat([first, second, third]), expected)


def cut_in_half(folder):
    path = folder / "shard-000002.tar"
    records = build_index(path)[0]
    path.write_bytes(path.read_bytes()[: int(records["image_offset"][6]) + 10])
    return set(range(24 + 6, 36))


def flip_a_bit_that_decodes(folder):
    path = folder / "shard-000001.tar"
    record = build_index(path)[0][4]
    flip_bit(path, 8 * (int(record["image_offset"]) + int(record["image_size"]) - 12))
    return {12 + 4}


@pytest.mark.parametrize(("damage", "workers"), [(cut_in_half, 0), (cut_in_half, 1), (flip_a_bit_that_decodes, 0)])
def test_damage_has_the_outcome_of_the_policy_on_every_world_size(copy, damage, workers, caplog):
    expected, _ = sample_ids(copy)
    damaged = torch.tensor(sorted(damage(copy)))
    with pytest.raises(DataError, match=r"shard-00000[12]\.tar.*verify_shards\.py --repair"):
        sample_ids(copy, workers=workers)

    with caplog.at_level(logging.WARNING):
        seen, (loader,) = sample_ids(copy, workers=workers, damaged="skip-and-count")
    hit = torch.isin(expected, damaged)
    assert torch.equal(seen[~hit], expected[~hit])
    assert not torch.isin(seen, damaged).any()
    assert loader.replaced == hit.sum() > 0
    if not workers:
        assert len(caplog.records) == hit.sum()
        assert f"stands in for it in epoch {0}" in caplog.text
    for ranks in (2, 4):
        on_ranks, loaders = sample_ids(copy, ranks=ranks, damaged="skip-and-count")
        assert torch.equal(on_ranks, seen)
        assert sum(loader.replaced for loader in loaders) == hit.sum()


def test_what_is_missing_altogether_ends_the_run(copy):
    (copy / "shard-000001.idx").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.idx is missing.*--repair"):
        sample_ids(copy, damaged="skip-and-count")
    (copy / "shard-000001.tar").unlink()
    (copy / "shard-000001.idx").touch()
    with pytest.raises(DataError, match=r"shard-000001"):
        sample_ids(copy, damaged="skip-and-count")
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        ShardFolder("train", copy / "nowhere")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        ShardFolder("train", copy.parent)


def test_every_flipped_bit_of_a_caption_is_found(tmp_path):
    """Read by index; UTF-8 would accept most of them."""
    write_shards(Plan(list_originals("pairs", write_pairs(tmp_path / "pairs", 8)), 1), tmp_path / "out")
    path = tmp_path / "out" / "shard-000000.tar"
    source = ShardFolder("train", tmp_path / "out")
    place, size = walk_tar(path)[3].members["txt"]
    for bit in range(0, 8 * size, 7):
        flip_bit(path, 8 * place + bit)
        with pytest.raises(DamagedSampleError, match="not as it was written"):
            source.read(3)
        flip_bit(path, 8 * place + bit)
    assert "number" in source.read(3).caption
