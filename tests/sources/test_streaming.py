"""Shards read as streams: the order is exact, whatever reads it and wherever it resumes."""

import io
import json
import logging
import random
import shutil
import tarfile

import pytest
import torch

from megavar.config.data import DataConfig, VarTransform, WebDatasetSource
from megavar.data.build import build_loader, build_source
from megavar.data.pixels import to_float
from megavar.data.reading import SampleReader
from megavar.data.shards.index import build_index, index_path, walk_tar
from megavar.data.shards.listing import list_originals
from megavar.data.shards.manifest import read_manifest
from megavar.data.shards.verification import adopt_shards, repair_shards, verify_shards
from megavar.data.shards.writing import Plan, write_shards
from megavar.data.streaming import ShardStreams
from megavar.data.transforms import Var
from megavar.data.webdataset import ShardFolder
from megavar.errors import ConfigError, DataError
from tests.sources.originals import content_of, flip_bit, shard, write_pairs

STEPS, BATCH, LANES = 16, 12, 4


def configure(folder, damaged="fail", workers=0, **source):
    return DataConfig(
        source=WebDatasetSource(path=str(folder), order="stream", lanes=LANES, **source),
        image_size=32,
        transform=VarTransform(),
        damaged_samples=damaged,
        workers=workers,
    )


def read(config, ranks=1, start_step=0, stop_step=STEPS, micro_batch_size=3):
    """Sample ids, epochs and images per step of the global batch, gathered from all ranks, and all loaders."""
    loaders = [
        build_loader(
            config,
            build_source(config),
            seed=7,
            global_batch_size=BATCH,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            start_step=start_step,
            stop_step=stop_step,
        )
        for rank in range(ranks)
    ]
    streams = [iter(loader) for loader in loaders]
    batches = [batch for _ in range(start_step, stop_step) for stream in streams for batch in next(stream)]
    assert all(len(batch) == micro_batch_size for batch in batches)
    ids, epochs, images = [
        torch.cat([getattr(batch, name) for batch in batches]).unflatten(0, (-1, BATCH))
        for name in ("sample_ids", "epochs", "images")
    ]
    return ids, epochs, images, loaders


@pytest.fixture(scope="module")
def whole(shards):
    return read(configure(shards), micro_batch_size=12)


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def test_every_epoch_of_the_lanes_covers_every_sample(whole):
    ids, epochs, _, _ = whole
    assert sorted(ids[epochs == 0].tolist()) == list(range(60))
    assert sorted(ids[epochs == 1].tolist()) == list(range(60))
    lanes = ids.view(STEPS, LANES, 3).transpose(0, 1).flatten(1)
    for lane in lanes:  # every lane reads whole shards of twelve, from the first to the last sample
        for start in range(0, STEPS * 3 - 12, 12):
            shard = int(lane[start]) // 12
            assert lane[start : start + 12].tolist() == list(range(shard * 12, shard * 12 + 12))


def test_lanes_stay_within_an_epoch_of_each_other(whole):
    _, epochs, _, _ = whole
    assert (epochs.amax(1) - epochs.amin(1)).max() <= 1


def test_shards_of_different_sizes(originals, tmp_path):
    """Seven shards of eight or nine: steps of three cross shards, lanes get different numbers of samples per epoch."""
    folder = shard(originals, tmp_path, shards=7)
    ids, epochs, _, _ = read(configure(folder), micro_batch_size=12)
    assert sorted(ids[epochs == 0].tolist()) == sorted(ids[epochs == 1].tolist()) == list(range(60))
    for ranks, start_step in ((2, 3), (4, 8), (1, 13)):
        found = read(configure(folder), ranks=ranks, start_step=start_step)
        assert torch.equal(found[0], ids[start_step:])


def test_images_and_labels_are_those_of_the_index(shards):
    """The same sample of the same epoch gets the same crop, whichever way it is read."""
    config = configure(shards)
    loader = build_loader(config, build_source(config), seed=7, global_batch_size=12, micro_batch_size=12)
    batch = next(iter(loader))[0]
    expected = SampleReader(ShardFolder("train", shards), Var(32), seed=7).read(batch.epochs, batch.sample_ids)
    assert torch.equal(batch.images, to_float(expected.images))
    assert torch.equal(batch.labels, expected.labels)


@pytest.mark.parametrize(
    ("ranks", "workers", "micro_batch_size"), [(2, 0, 3), (4, 0, 1), (1, 3, 6), (2, 2, 2)]
)
def test_ranks_and_workers_change_nothing(shards, whole, ranks, workers, micro_batch_size):
    found = read(configure(shards, workers=workers), ranks=ranks, stop_step=6, micro_batch_size=micro_batch_size)
    for field in range(3):
        assert torch.equal(found[field], whole[field][:6])


@pytest.mark.parametrize("step", [1, 4, 5, 9, 14])
def test_resuming_continues_inside_a_shard(shards, whole, step):
    found = read(configure(shards), ranks=2, start_step=step)
    for field in range(3):
        assert torch.equal(found[field], whole[field][step:])


def test_pipes_are_read_like_files(shards, whole, tmp_path):
    shutil.copy(shards / "manifest.json", tmp_path)  # the tars are elsewhere
    found = read(configure(tmp_path, url=f"pipe:cat {shards}/{{shard}}"), start_step=3, stop_step=6)
    assert torch.equal(found[0], whole[0][3:6])


def damage_a_sample(folder):
    path = folder / "shard-000001.tar"
    record = build_index(path)[0][4]
    flip_bit(path, 8 * (int(record["image_offset"]) + 100))
    return {16: 17}


def damage_the_last_two_samples(folder):
    path = folder / "shard-000001.tar"
    for place in (10, 11):
        record = build_index(path)[0][place]
        flip_bit(path, 8 * (int(record["image_offset"]) + 100))
    return {22: 12, 23: 12}


def cut_in_half(folder):
    path = folder / "shard-000001.tar"
    record = build_index(path)[0][7]
    path.write_bytes(path.read_bytes()[: int(record["image_offset"]) + 10])
    return {12 + 7 + place: 12 + place for place in range(5)}


@pytest.mark.parametrize("damage", [damage_a_sample, damage_the_last_two_samples, cut_in_half])
def test_damage_has_the_outcome_of_the_policy(copy, whole, damage, caplog):
    stand_ins = damage(copy)
    with pytest.raises(DataError, match=r"shard-000001\.tar.*skip-and-count"):
        read(configure(copy, workers=2 if damage is cut_in_half else 0))

    config = configure(copy, damaged="skip-and-count")
    with caplog.at_level(logging.WARNING):
        ids, _, _, (loader,) = read(config)
    expected = whole[0].clone().apply_(lambda index: stand_ins.get(index, index))
    assert torch.equal(ids, expected)
    assert loader.replaced == (ids != whole[0]).sum() > 0
    assert caplog.text.count("stands in for it") == loader.replaced
    for ranks, start_step in ((2, 0), (4, 5), (1, 11)):
        found = read(config, ranks=ranks, start_step=start_step, micro_batch_size=1)
        assert torch.equal(found[0], expected[start_step:])
        assert sum(loader.replaced for loader in found[3]) == (found[0] != whole[0][start_step:]).sum()


def test_a_stream_that_breaks_off_once_is_opened_anew(shards, whole, tmp_path):
    """As a connection does: the first opening of each shard ends after 20 kB, later ones are whole."""
    script = tmp_path / "fetch"
    script.write_text(
        f'if mkdir "{tmp_path}/$1.seen" 2>/dev/null; then head -c 20000 {shards}/$1; else cat {shards}/$1; fi'
    )
    found = read(configure(shards, url=f"pipe:sh {script} {{shard}}"), stop_step=8)
    for field in range(3):
        assert torch.equal(found[field], whole[field][:8])
    assert len(list(tmp_path.glob("*.seen"))) == 5


@pytest.mark.parametrize("damaged", ["fail", "skip-and-count"])
def test_an_absent_shard_ends_the_run(copy, damaged):
    (copy / "shard-000003.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000003\.tar ends after 0 of 12"):
        read(configure(copy, damaged=damaged))


def test_lanes_that_do_not_fit_are_refused(shards):
    with pytest.raises(ConfigError, match="only 5 shards"):
        ShardStreams("train", shards, lanes=6)
    with pytest.raises(ConfigError, match=r"\{shard\}"):
        ShardStreams("train", shards, url="pipe:cat x")
    with pytest.raises(ConfigError, match="must divide the global batch of 12"):
        config = configure(shards)
        source = ShardStreams("train", shards, lanes=5)
        build_loader(config, source, seed=0, global_batch_size=12, micro_batch_size=12)
    with pytest.raises(ConfigError, match=r"order: index"):
        ShardStreams("train", shards, lanes=1).read(0)


def test_captions_travel_with_their_images(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 12)
    write_shards(Plan(list_originals("pairs", pairs), 4), tmp_path / "out")
    config = configure(tmp_path / "out")
    by_index = config.model_copy(update={"source": WebDatasetSource(path=str(tmp_path / "out"))})
    caption_of = {}
    for case in (config, by_index):
        loader = build_loader(case, build_source(case), seed=0, global_batch_size=12, micro_batch_size=4, stop_step=1)
        for batch in next(iter(loader)):
            assert batch.labels.tolist() == [-1] * 4
            for index, caption in zip(batch.sample_ids.tolist(), batch.captions, strict=True):
                assert caption_of.setdefault(index, caption) == caption
    assert sorted(caption_of) == list(range(12))
    assert sorted(caption_of.values()) == sorted(path.read_text().strip() for path in pairs.rglob("*.txt"))


def remote(folder, tmp_path):
    """The folder of the manifest, without indexes: only the stream itself can tell what is damaged."""
    place = tmp_path / "manifest"
    place.mkdir(exist_ok=True)
    shutil.copy(folder / "manifest.json", place)
    return configure(place, url=f"file:{folder}/{{shard}}")


MEMBERS = ("cls", "json", "txt", "image")


def place_of(path, member):
    """First byte and number of bytes of a member of the second sample."""
    sample = walk_tar(path)[1]
    return sample.image if member == "image" else sample.members[member]


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("has_index", [True, False])
def test_every_flipped_bit_of_a_sample_is_found(tmp_path, originals, member, has_index):
    """Of its caption, class and json too; with the index at hand or with the stream alone."""
    if member == "txt":
        write_shards(Plan(list_originals("pairs", write_pairs(tmp_path / "pairs", 12)), 4), tmp_path / "out")
    else:
        shard(originals, tmp_path / "out")
    folder, path = tmp_path / "out", tmp_path / "out" / "shard-000000.tar"
    place, size = place_of(path, member)
    config = configure(folder) if has_index else remote(folder, tmp_path)
    bits = random.Random(member).sample(range(8 * size), min(8, 8 * size))
    if member == "json":
        whole = path.read_bytes()[place : place + size]
        bits += [8 * whole.index(b"checksum") + 1, 8 * whole.index(b"sha256") + 1]
    for bit in bits:
        flip_bit(path, 8 * place + bit)
        with pytest.raises(DataError, match=r"shard-000000\.tar.*not as it was written"):
            read(config, stop_step=5)
        flip_bit(path, 8 * place + bit)
    read(config, stop_step=5)


@pytest.mark.parametrize("damaged", ["fail", "skip-and-count"])
def test_swapped_tars_are_noticed(copy, tmp_path, damaged):
    """By stream alone, under every policy: samples of another shard stand in for nothing."""
    first, second = copy / "shard-000001.tar", copy / "shard-000002.tar"
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    for config in (configure(copy, damaged=damaged), remote(copy, tmp_path)):
        with pytest.raises(DataError, match=r"stream of shard-00000[12]\.tar is that of another shard"):
            read(config)


IMG2DATASET = {
    "caption": "a cat", "url": "http://example.invalid/0.jpg", "key": "000000000", "status": "success",
    "sha256": "145688a600f1a584b645165bdd485243e6eb77111c0af8d4081f1eedda6c6b8b",
}  # fmt: skip


@pytest.mark.parametrize("facts", [IMG2DATASET, [1, 2], "text", None, 5, {}, {"sha256": 7}])
def test_what_other_tools_say_in_json_is_theirs(tmp_path, originals, facts):
    """img2dataset's hash is that of the download, before it was resized."""
    images = sorted(originals.rglob("*.JPEG"))
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(4):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(3):
                key, image = f"{number}{index:03d}", images[3 * number + index].read_bytes()
                for name, content in (("jpg", image), ("json", json.dumps(facts).encode()), ("txt", b"a cat")):
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    adopt_shards(folder)
    ids, _, images, _ = read(configure(folder))
    assert ids.unique().numel() == 12 and verify_shards(folder, full=True) == []

    image, size = walk_tar(folder / "00002.tar")[1].image  # the index knows what the json does not say
    caption, _ = walk_tar(folder / "00002.tar")[1].members["txt"]
    for place in (image + size // 2, caption):
        flip_bit(folder / "00002.tar", 8 * place)
        with pytest.raises(DataError, match=r"00002\.tar.*not as it was written"):
            read(configure(folder))
        flip_bit(folder / "00002.tar", 8 * place)


def test_shards_of_format_1_are_read_and_verified(tmp_path, originals):
    """Written before captions and classes were checksummed."""
    folder = shard(originals, tmp_path / "old", version=1)
    assert "format" not in read_manifest(folder).arguments
    assert b"checksum" not in (folder / "shard-000000.tar").read_bytes()
    assert index_path(folder / "shard-000000.tar").read_bytes().startswith(b"megavar index 1\n")
    assert verify_shards(folder, full=True) == []
    before = content_of(folder)
    assert read(configure(folder))[0].unique().numel() == 60
    assert len({ShardFolder("train", folder).read(index).image for index in range(60)}) == 60
    path = folder / "shard-000001.tar"
    index_path(path).unlink()
    (folder / "shard-000002.tar").unlink()
    repair_shards(folder, source=list_originals("class_folders", originals))
    assert content_of(folder) == before
    write_shards(Plan(list_originals("class_folders", originals), 5), folder)  # the same command again
    assert content_of(folder) == before
    record = build_index(path)[0][4]
    flip_bit(path, 8 * (int(record["image_offset"]) + 100))
    with pytest.raises(DataError, match="not as it was written"):
        read(configure(folder))
