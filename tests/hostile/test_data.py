"""Shards, caches, lists and arrays made by a hostile writer: nothing runs, nothing is written elsewhere."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from megavar.chunks import ChunkStore
from megavar.config.data import DataConfig, WebDatasetSource
from megavar.data.build import build_source
from megavar.data.caches import CachedSamples
from megavar.data.shards.index import index_path
from megavar.data.shards.listing import list_originals
from megavar.data.shards.manifest import is_plain_name, read_manifest, write_manifest
from megavar.data.shards.verification import adopt_shards, repair_shards, verify_shards
from megavar.data.shards.writing import Plan, write_shards
from megavar.data.streaming import ShardStreams
from megavar.errors import DataError
from megavar.evaluation.images import NpzImages
from megavar.evaluation.reference import check_reference, load_reference
from tests.sources import test_caches as caches
from tests.sources.originals import flip_bit
from tools import verify_shards as tool

NAMES = ["a;mkdir {canary};.tar", "$(mkdir {canary}).tar", "`mkdir {canary}`.tar", "|mkdir {canary}.tar",
         "a\nmkdir {canary}\n.tar", "../outside/b.tar", "{outside}/b.tar", "a/b.tar", "..", ".hidden.tar", "-rf.tar",
         "a b.tar", "x.tar::y", "{{shard}}.tar", "a.txt", "", 5, None]  # fmt: skip


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_shards_are_plain(copy, outside, name, capsys):
    if isinstance(name, str):
        name = name.format(canary=outside.canary, outside=outside.root)
    manifest = read_manifest(copy)
    entries = [dataclasses.replace(manifest.shards[0], file=name), *manifest.shards[1:]]
    write_manifest(copy, dataclasses.replace(manifest, shards=entries))  # with a checksum of its own
    url = "pipe:cat " + f"{copy}/{{shard}}"
    for source in (
        WebDatasetSource(path=str(copy)),
        WebDatasetSource(path=str(copy), order="stream", lanes=2),
        WebDatasetSource(path=str(copy), order="stream", lanes=2, url=url),
    ):
        with pytest.raises(DataError, match="names the shard") as caught:
            build_source(DataConfig(source=source, image_size=40))
        assert str(copy) in str(caught.value)
    with pytest.raises(DataError, match="names the shard"):
        verify_shards(copy, full=True)
    assert tool.main([str(copy), "--repair", "--processes", "1"]) == 2
    assert "names the shard" in capsys.readouterr().err


def test_repair_writes_in_the_folder_only(copy, outside, originals, tmp_path):
    """The tar of this entry is whole, so that a missing index would be rebuilt: outside, before names were plain."""
    manifest = read_manifest(copy)
    (copy / manifest.shards[0].file).rename(tmp_path / "b.tar")
    entries = [dataclasses.replace(manifest.shards[0], file="../b.tar"), *manifest.shards[1:]]
    write_manifest(copy, dataclasses.replace(manifest, shards=entries))
    with pytest.raises(DataError, match="names the shard"):
        repair_shards(copy, source=list_originals("class_folders", originals))
    assert not (tmp_path / "b.idx").exists()


def test_what_a_pipe_gets_is_quoted(copy, outside, monkeypatch):
    """Even if a name were not plain."""
    streams = ShardStreams("train", copy, url=f"pipe:cat {copy}/{{shard}}", lanes=2)
    assert len(list(streams.open(0))) == 12
    name = f"a;mkdir {outside.canary};.tar"
    shard = dataclasses.replace(streams.manifest.shards[0], file=name)
    monkeypatch.setattr(streams, "manifest", dataclasses.replace(streams.manifest, shards=[shard]))
    assert list(streams.open(0)) == []


def test_a_folder_that_looks_like_a_command_is_a_folder(copy, outside, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "pipe:mkdir ran #"
    copy.rename(tmp_path / name)
    streams = ShardStreams("train", name, lanes=2)
    assert len(list(streams.open(0))) == 12
    assert not (tmp_path / "ran").exists()


def test_tars_of_other_tools_have_plain_names_too(copy, outside):
    manifest = read_manifest(copy)
    for path in copy.glob("*.idx"):
        path.unlink()
    (copy / "manifest.json").unlink()
    odd = copy / f"$(mkdir ran) {len(manifest.shards)}.tar"
    (copy / manifest.shards[0].file).rename(odd)
    with pytest.raises(DataError, match="Rename them"):
        adopt_shards(copy)
    odd.rename(copy / "laion_part-00,0=1@x.tar")
    assert adopt_shards(copy).samples == manifest.samples


def test_plain_names():
    for name in ("shard-000000.tar", "00000.tar", "imagenet_train-0001.tar", "a.b+c.tar"):
        assert is_plain_name(name)


@pytest.mark.parametrize("field, value", [("samples", "many"), ("samples", -5), ("bytes", None), ("index_sha256", 7),
                                          ("left_out", [{}]), ("first_key", ["a"])])  # fmt: skip
def test_a_manifest_of_other_types_is_refused(copy, field, value):
    manifest = read_manifest(copy)
    entry = dataclasses.replace(manifest.shards[0], **{field: value})
    path = copy / "manifest.json"
    try:
        write_manifest(copy, dataclasses.replace(manifest, shards=[entry, *manifest.shards[1:]]))
    except TypeError:  # our own writer counts samples
        path.write_text(path.read_text().replace(f'"{field}": {json.dumps(getattr(manifest.shards[0], field))}',
                                                 f'"{field}": {json.dumps(value)}', 1))  # fmt: skip
    with pytest.raises(DataError, match=str(path)):
        read_manifest(copy)


def test_two_entries_for_one_file_are_refused(copy):
    manifest = read_manifest(copy)
    write_manifest(copy, dataclasses.replace(manifest, shards=[manifest.shards[0], *manifest.shards]))
    with pytest.raises(DataError, match="twice"):
        read_manifest(copy)


@pytest.mark.parametrize("link", [".progress", ".progress/repair", ".progress/repair/.progress"])
def test_repair_follows_no_link(copy, outside, originals, link):
    (copy / link).parent.mkdir(parents=True, exist_ok=True)
    (copy / link).symlink_to(outside.root, target_is_directory=True)
    (copy / read_manifest(copy).shards[0].file).unlink()
    with pytest.raises(DataError, match="is a symbolic link"):
        repair_shards(copy, source=list_originals("class_folders", originals))


def test_an_index_that_is_a_link_is_replaced(copy, outside):
    index = index_path(copy / read_manifest(copy).shards[0].file)
    index.unlink()
    index.symlink_to(outside.file)
    assert repair_shards(copy)
    assert not index.is_symlink() and verify_shards(copy, full=True) == []


@pytest.mark.parametrize("link", [".progress", ".progress/lock-0", ".progress/lock-end"])
def test_making_shards_follows_no_link(originals, outside, tmp_path, link):
    out = tmp_path / "out"
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(outside.root if link == ".progress" else outside.file)
    with pytest.raises(DataError, match="is a symbolic link"):
        write_shards(Plan(list_originals("class_folders", originals), 2), out)


@pytest.mark.parametrize("link", [".progress", ".progress/lock-00000", ".progress/lock-end"])
def test_making_a_cache_follows_no_link(outside, tmp_path, link):
    out = tmp_path / "cache"
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(outside.root if link == ".progress" else outside.file)
    with pytest.raises(DataError, match="is a symbolic link"):
        caches.make(caches.configure(out))


def test_parts_of_a_cache_that_are_links_are_replaced(outside, tmp_path):
    config = caches.configure(tmp_path / "cache")
    caches.make(config)
    for name in ("cache.json", "part-00000.bin"):
        (tmp_path / "cache" / name).unlink()
        (tmp_path / "cache" / name).symlink_to(outside.file)
    with pytest.raises(DataError):
        CachedSamples("train", tmp_path / "cache")


class TestArrays:
    """npz files may hold pickled objects."""

    def write(self, path, payload, **arrays):
        bad = np.empty(1, dtype=object)
        bad[0] = payload
        np.savez(path, **{name: bad if array is None else array for name, array in arrays.items()})
        return path

    def test_images(self, tmp_path, outside):
        with pytest.raises(DataError):
            NpzImages(self.write(tmp_path / "x.npz", outside.payload, arr_0=None))

    def test_labels(self, tmp_path, outside):
        images = np.zeros((3, 4, 4, 3), np.uint8)
        with pytest.raises(DataError):
            NpzImages(self.write(tmp_path / "x.npz", outside.payload, arr_0=images, arr_1=None))

    def test_reference_statistics(self, tmp_path, outside):
        path = self.write(tmp_path / "x.npz", outside.payload, mu=None, sigma=None)
        check_reference(path)
        with pytest.raises(DataError):
            load_reference(path, None, None)

    def test_chunks(self, tmp_path, outside):
        store = ChunkStore.open(tmp_path / "chunks", count=2, size=2, identity={})
        self.write(store.path(0), outside.payload, index=np.arange(2), labels=None)
        with pytest.raises(DataError, match="chunk_000000"):
            store.read(0)
        self.write(store.path(0), outside.payload, index=None)
        with pytest.raises(DataError, match="chunk_000000"):
            store.read(0)


def test_a_flipped_bit_of_a_manifest_is_still_found(copy):
    flip_bit(copy / "manifest.json", 4000)
    with pytest.raises(DataError, match="damaged"):
        read_manifest(copy)
