import json
import shutil

import numpy as np
import pytest

from megavar.chunks import ChunkStore, share
from megavar.errors import DataError
from megavar.parallel.environment import environment
from tests.distributed.harness import run_ranks


def test_chunks_cover_the_index_space_without_padding(tmp_path):
    store = ChunkStore.open(tmp_path, count=10, size=4, identity={"what": "test"})
    assert [store.range(chunk) for chunk in range(len(store))] == [(0, 4), (4, 8), (8, 10)]
    assert store.missing() == [0, 1, 2]
    assert ChunkStore.existing(tmp_path) == store and store.manifest() == {"count": 10, "chunk_size": 4, "what": "test"}
    with pytest.raises(DataError, match="not a directory of chunks"):
        ChunkStore.existing(tmp_path / "absent")


def share_of(directory):
    place = environment()
    store = ChunkStore.open(directory, count=50, size=4, identity={})
    seen = store.missing() if place.rank == 0 else [999]  # a file system that shows others something else
    return share(seen, place)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_divide_what_is_missing_evenly(tmp_path, world_size):
    store = ChunkStore.open(tmp_path, count=50, size=4, identity={})
    for chunk in range(0, len(store), 2):  # all work of one of two ranks is done
        store.write(chunk, {})
    shares = run_ranks(world_size, share_of, tmp_path)
    assert sorted(chunk for mine in shares for chunk in mine) == list(range(1, len(store), 2))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_written_chunks_are_skipped_and_read_in_order(tmp_path):
    store = ChunkStore.open(tmp_path, count=5, size=2, identity={})
    for chunk in (2, 0, 1):
        first, last = store.range(chunk)
        store.write(chunk, {"x": np.arange(first, last) ** 2})
        assert chunk not in store.missing()
    assert np.concatenate([arrays["x"] for arrays in store.read_all()]).tolist() == [0, 1, 4, 9, 16]
    assert store.names(0) == {"x"} and store.read(0, []) == {}


def test_same_results_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        ChunkStore.open(tmp_path / name, count=2, size=2, identity={}).write(0, {"x": np.arange(2.0)})
    assert (tmp_path / "a/chunk_000000.npz").read_bytes() == (tmp_path / "b/chunk_000000.npz").read_bytes()


def test_other_work_in_the_same_directory_is_refused(tmp_path):
    ChunkStore.open(tmp_path, count=5, size=2, identity={"weights": "a"})
    ChunkStore.open(tmp_path, count=5, size=2, identity={"weights": "a"})
    for other in (
        {"count": 6, "size": 2, "identity": {"weights": "a"}},
        {"count": 5, "size": 3, "identity": {}},
        {"count": 5, "size": 2, "identity": {"weights": "b"}},
    ):
        with pytest.raises(DataError, match="other work"):
            ChunkStore.open(tmp_path, **other)
    with pytest.raises(DataError, match="nothing to do"):
        ChunkStore.open(tmp_path / "empty", count=0, size=2, identity={})


@pytest.mark.parametrize("damage", ["truncate", "flip", "absent", "swap"])
def test_damaged_chunks_are_named(tmp_path, damage):
    store = ChunkStore.open(tmp_path, count=4, size=2, identity={})
    for chunk in range(2):
        store.write(chunk, {"x": np.arange(2) + chunk})
    content = store.path(1).read_bytes()
    match damage:
        case "truncate":
            store.path(1).write_bytes(content[:-30])
        case "flip":
            place = content.index(b"\x93NUMPY") + 128
            store.path(1).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        case "absent":
            store.path(1).unlink()
        case "swap":
            store.path(1).write_bytes(store.path(0).read_bytes())
    with pytest.raises(DataError, match=r"chunk_000001\.npz.*again"):
        list(store.read_all())


def test_a_chunk_of_another_model_is_no_result(tmp_path):
    """Copied among those of this one, with the same images of the same shapes."""
    ours, theirs = (ChunkStore.open(tmp_path / name, count=4, size=2, identity={"model": name}) for name in "ab")
    for store in (ours, theirs):
        for chunk in (0, 1):
            store.write(chunk, {"value": np.arange(2.0)})
    shutil.copy(theirs.path(1), ours.path(1))
    for store in (ours, ChunkStore.existing(ours.directory)):
        assert store.read(0)["value"].tolist() == [0.0, 1.0]
        with pytest.raises(DataError, match=r"chunk_000001\.npz belongs to other work"):
            store.read(1)
    again = ChunkStore.open(tmp_path / "elsewhere", count=4, size=2, identity={"model": "a"})
    shutil.copy(ours.path(0), again.path(0))  # the same work, wherever it was done
    assert again.read(0)["value"].tolist() == [0.0, 1.0]


def test_chunks_from_before_they_named_their_work_are_read(tmp_path):
    store = ChunkStore.open(tmp_path, count=4, size=2, identity={"model": "a"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["format"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    np.savez(store.path(0), index=np.arange(2), value=np.ones(2))
    store = ChunkStore.open(tmp_path, count=4, size=2, identity={"model": "a"})
    store.write(1, {"value": np.zeros(2)})
    assert [arrays["value"].tolist() for arrays in store.read_all()] == [[1, 1], [0, 0]]
    other = ChunkStore.open(tmp_path / "other", count=4, size=2, identity={"model": "b"})
    other.write(0, {"value": np.ones(2)})
    shutil.copy(other.path(0), store.path(0))
    with pytest.raises(DataError, match="belongs to other work"):
        store.read(0)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "{", '{"count": 0, "chunk_size": 1}', '{"count": "x", "chunk_size": 1}']
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        ChunkStore.existing(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json"):
        ChunkStore.open(tmp_path, count=4, size=2, identity={})


def test_no_flipped_bit_of_a_chunk_escapes(tmp_path):
    store = ChunkStore.open(tmp_path, count=2, size=2, identity={})
    store.write(0, {"value": np.arange(2.0)})
    content = store.path(0).read_bytes()
    for bit in range(0, 8 * len(content), 13):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        store.path(0).write_bytes(damaged)
        try:
            assert store.read(0)["value"].tolist() == [0.0, 1.0]  # a time stamp, or padding
        except (DataError, KeyError) as error:
            assert isinstance(error, DataError) or str(error) == "'value'"  # the name itself
