"""Damage is found, and repaired where that is possible."""

import json
import random
import shutil

import pytest
import webdataset

from megavar.data.progress import PROGRESS
from megavar.data.shards.listing import list_originals
from megavar.data.shards.manifest import FILE_NAME
from megavar.data.shards.verification import repair_shards, verify_shards
from megavar.errors import DataError
from tests.sources.originals import content_of, flip_bit, write_class_folders


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def files_with_problems(folder, full=True):
    return {problem.file for problem in verify_shards(folder, full=full, processes=2)}


def test_whole_shards_have_no_problems(copy):
    assert verify_shards(copy, full=True) == []
    assert verify_shards(copy, full=False) == []


@pytest.mark.parametrize("kind", ["tar", "idx"])
def test_every_flipped_bit_of_a_shard_or_index_is_found(copy, kind):
    chance = random.Random(kind)
    path = copy / f"shard-000003.{kind}"
    size = path.stat().st_size * 8
    places = [0, size - 1, *(chance.randrange(size) for _ in range(10))]
    for bit in places:
        flip_bit(path, bit)
        found = files_with_problems(copy)
        assert path.name in found, bit
        assert found <= {"shard-000003.tar", "shard-000003.idx"}
        flip_bit(path, bit)
    assert verify_shards(copy, full=True) == []


def test_every_flipped_bit_of_the_manifest_is_found(copy):
    path = copy / FILE_NAME
    chance = random.Random(0)
    size = path.stat().st_size * 8
    for bit in [0, size - 1, *(chance.randrange(size) for _ in range(300))]:
        flip_bit(path, bit)
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            verify_shards(copy, full=False)
        flip_bit(path, bit)
    assert verify_shards(copy, full=False) == []


def test_quick_verification_finds_what_is_missing_or_cut(copy):
    (copy / "shard-000000.tar").unlink()
    (copy / "shard-000001.idx").unlink()
    content = (copy / "shard-000002.tar").read_bytes()
    (copy / "shard-000002.tar").write_bytes(content[:-512])
    shutil.copy(copy / "shard-000004.tar", copy / "shard-000005.tar")
    expected = {"shard-000000.tar", "shard-000001.idx", "shard-000002.tar", "shard-000005.tar"}
    assert files_with_problems(copy, full=False) == expected
    assert files_with_problems(copy, full=True) == expected


def test_a_shard_that_cannot_be_read_is_one_problem_and_is_repaired(copy, shards, originals):
    path = copy / "shard-000002.tar"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading its first page fails
    problems = [str(problem) for problem in verify_shards(copy, full=True)]
    assert len(problems) == 1
    assert problems[0].startswith("shard-000002.tar: it or its index cannot be read")
    repair_shards(copy, source=list_originals("class_folders", originals))
    assert content_of(copy) == content_of(shards)


def test_a_shard_that_stands_twice_gives_duplicate_keys(copy):
    for suffix in ("tar", "idx"):
        shutil.copy(copy / f"shard-000004.{suffix}", copy / f"shard-000003.{suffix}")
    messages = [str(problem) for problem in verify_shards(copy, full=True)]
    assert any(
        "12 keys occur more than once" in message and message.endswith("in shard-000003.tar and shard-000004.tar")
        for message in messages
    )
    assert any(message.startswith("shard-000003.tar: its hash") for message in messages)


def test_repair_rebuilds_indexes_from_tars(copy, shards):
    (copy / "shard-000001.idx").unlink()
    flip_bit(copy / "shard-000002.idx", 1234)
    assert [line.split(":")[0] for line in repair_shards(copy)] == ["shard-000001.idx", "shard-000002.idx"]
    assert content_of(copy) == content_of(shards)


def test_repair_makes_shards_again_from_originals(copy, shards, originals):
    flip_bit(copy / "shard-000000.tar", 98765)
    (copy / "shard-000003.tar").unlink()
    (copy / "shard-000004.idx").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar, shard-000003\.tar.*--source.*shard-000004\.idx"):
        repair_shards(copy)
    assert files_with_problems(copy, full=False) == {"shard-000003.tar"}  # what could be repaired was
    repair_shards(copy, source=list_originals("class_folders", originals))
    assert content_of(copy) == content_of(shards)


def test_repair_refuses_other_originals(copy, tmp_path):
    (copy / "shard-000003.tar").unlink()
    fewer = list_originals("class_folders", write_class_folders(tmp_path / "fewer", 20))
    with pytest.raises(DataError, match=r"20 images \(manifest: 60\)"):
        repair_shards(copy, source=fewer)
    changed = write_class_folders(tmp_path / "changed", 60)
    for path in changed.rglob("*.JPEG"):
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="its originals have changed"):
        repair_shards(copy, source=list_originals("class_folders", changed))
    assert not (copy / "shard-000003.tar").exists()
    assert not (copy / PROGRESS).exists()


def test_repair_goes_on_after_what_it_cannot_repair(copy, shards, tmp_path):
    originals = write_class_folders(tmp_path / "originals", 60)
    lost = json.loads(next(iter(webdataset.WebDataset(str(copy / "shard-000001.tar"))))["json"])["path"]
    (originals / lost).write_bytes(b"")
    for number in (1, 3):
        (copy / f"shard-00000{number}.tar").unlink()
    with pytest.raises(DataError, match=rf"shard-000001\.tar cannot be made again.*{lost}.*shard-000003\.tar: made"):
        repair_shards(copy, source=list_originals("class_folders", originals))
    assert files_with_problems(copy) == {"shard-000001.tar"}
