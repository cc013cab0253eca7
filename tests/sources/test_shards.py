"""Writing shards, and reading back what was written with our code and with webdataset's."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megavar.data.progress import PROGRESS
from megavar.data.shards.index import build_index, decode_index, encode_index, index_path
from megavar.data.shards.listing import list_originals
from megavar.data.shards.manifest import read_manifest
from megavar.data.shards.verification import adopt_shards, verify_shards
from megavar.data.shards.writing import Plan, write_shards
from megavar.data.webdataset import ShardFolder
from megavar.errors import DataError
from tests.sources.interruption import interruptions, run_until
from tests.sources.originals import content_of, shard, write_class_folders, write_pairs


def read_tars(folder: Path) -> list[dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_webdataset_reads_the_original_bytes(originals, shards):
    listing = list_originals("class_folders", originals)
    label_of = {original.path: original.label for original in listing.originals}
    samples = read_tars(shards)
    assert sorted(json.loads(sample["json"])["path"] for sample in samples) == sorted(label_of)
    for place, sample in enumerate(samples):
        facts = json.loads(sample["json"])
        image = sample["png"] if facts["path"].endswith("png") else sample["jpg"]
        assert image == (originals / facts["path"]).read_bytes()
        assert facts["sha256"] == hashlib.sha256(image).hexdigest()
        assert (facts["width"], facts["height"]) == (40, 40)
        assert int(sample["cls"]) == label_of[facts["path"]]
        assert sample["__key__"] == f"{place:09d}"


def test_every_shard_is_a_mixture(originals, shards):
    manifest = read_manifest(shards)
    assert [entry.samples for entry in manifest.shards] == [12] * 5
    assert all(len(entry.class_histogram) >= 5 for entry in manifest.shards)
    assert manifest.class_names == sorted(path.name for path in originals.iterdir())
    paths = [json.loads(sample["json"])["path"] for sample in read_tars(shards)]
    assert paths != sorted(paths)


def test_tars_carry_no_trace_of_time_or_user(shards):
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        assert [m.name for m in members] == sorted(m.name for m in members)


def test_the_index_agrees_with_the_tar(shards):
    for path in shards.glob("*.tar"):
        records, keys = build_index(path)
        assert encode_index(records) == index_path(path).read_bytes()
        assert np.array_equal(decode_index(index_path(path).read_bytes(), path), records)
        assert len(keys) == 12


def test_the_bytes_do_not_depend_on_processes_or_parts(originals, shards, tmp_path):
    plan = Plan(list_originals("class_folders", originals), shards=5)
    write_shards(plan, tmp_path / "one", processes=1)
    assert write_shards(plan, tmp_path / "parts", part=(1, 2)) is None
    assert write_shards(plan, tmp_path / "parts", part=(0, 2)) is not None
    assert content_of(tmp_path / "one") == content_of(tmp_path / "parts") == content_of(shards)
    write_shards(plan, tmp_path / "one")  # finished already
    assert content_of(tmp_path / "one") == content_of(shards)


def test_the_seed_changes_the_permutation(originals, shards, tmp_path):
    other = shard(originals, tmp_path / "other", seed=1)
    assert {s["__key__"]: s["json"] for s in read_tars(other)} != {s["__key__"]: s["json"] for s in read_tars(shards)}


@pytest.mark.parametrize("victims", ["group", "parent"])
def test_kill_9_at_any_moment_changes_nothing(originals, shards, tmp_path, victims):
    """Ten folders (20 over both cases) are killed at random moments from first to last file, and killed again where
    the continued work takes long enough; then finished, they equal that of the undisturbed run."""
    expected = content_of(shards)
    steps = run_until(lambda: shard(originals, tmp_path / "counted"), None, victims).steps
    assert steps > 100
    kills = 0
    for out, moments in interruptions(tmp_path, steps, folders=10, seed=victims):
        kills += sum(run_until(lambda out=out: shard(originals, out), moment, victims).killed for moment in moments)
        shard(originals, out)
        assert content_of(out) == expected
    assert kills >= 10


def test_a_torn_shard_of_an_interrupted_run_is_made_again(originals, shards, tmp_path):
    plan = Plan(list_originals("class_folders", originals), shards=5)
    assert write_shards(plan, tmp_path, part=(2, 4)) is None
    torn = tmp_path / "shard-000002.tar"
    torn.write_bytes(torn.read_bytes()[:5000])
    (tmp_path / PROGRESS / "shard-000003.json").write_text("{")
    write_shards(plan, tmp_path, processes=2)
    assert content_of(tmp_path) == content_of(shards)


def test_a_folder_with_something_else_is_left_alone(originals, shards, tmp_path):
    finished = shutil.copytree(shards, tmp_path / "finished")
    with pytest.raises(DataError, match="seed 0 -> 1"):
        shard(originals, finished, seed=1)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"neither a manifest.*--existing"):
        shard(originals, tmp_path / "foreign")
    assert content_of(finished) == content_of(shards)
    assert (tmp_path / "foreign" / "shard-000000.tar").read_bytes() == b"precious"


def test_changed_originals_are_noticed_when_work_continues(tmp_path):
    originals = write_class_folders(tmp_path / "originals", 20)
    plan = Plan(list_originals("class_folders", originals), shards=2)
    write_shards(plan, tmp_path / "out", part=(0, 2))
    next((originals / "china").iterdir()).unlink()
    with pytest.raises(DataError, match="other originals"):
        shard(originals, tmp_path / "out", shards=2)


def test_a_damaged_original_is_named_or_left_out(tmp_path):
    originals = write_class_folders(tmp_path / "originals", 20)
    victim = next((originals / "coffee").iterdir())
    victim.write_bytes(victim.read_bytes()[:500])
    with pytest.raises(DataError, match=rf"coffee/{victim.name}.*leave-out"):
        shard(originals, tmp_path / "strict", shards=2)
    out = shard(originals, tmp_path / "lenient", shards=2, damaged="leave-out")
    manifest = read_manifest(out)
    assert manifest.samples == 19
    left_out = [reason for entry in manifest.shards for reason in entry.left_out]
    assert len(left_out) == 1
    assert left_out[0].startswith(f"coffee/{victim.name}: ")
    assert verify_shards(out, full=True) == []


def test_pairs_keep_their_captions(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    write_shards(Plan(list_originals("pairs", pairs), 2), tmp_path / "out")
    for sample in read_tars(tmp_path / "out"):
        path = pairs / json.loads(sample["json"])["path"]
        assert sample["txt"].decode() == path.with_suffix(".txt").read_text().strip()
        assert "cls" not in sample
    source = ShardFolder("train", tmp_path / "out")
    assert (len(source), source.num_classes) == (12, 0)
    read = [source.read(index) for index in range(12)]
    assert [sample.caption for sample in read] == [sample["txt"].decode() for sample in read_tars(tmp_path / "out")]
    assert {sample.label for sample in read} == {-1}

    lines = [{"image": f"{i:02d}.jpg", "caption": f"caption {i}"} for i in range(0, 12, 2)]
    (pairs / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_shards(Plan(list_originals("pairs", pairs / "pairs.jsonl"), 1), tmp_path / "lines")
    source = ShardFolder("train", tmp_path / "lines")
    assert sorted(source.read(index).caption for index in range(6)) == sorted(line["caption"] for line in lines)


def test_list_files(tmp_path, originals):
    names = sorted(path.name for path in originals.iterdir())
    images = sorted(path.relative_to(originals).as_posix() for path in originals.rglob("*.*"))[:6]
    numbered, named = originals.parent / "numbered.txt", originals.parent / "named.txt"
    numbered.write_text("\n".join(f"{originals.name}/{image} {names.index(image.split('/')[0])}" for image in images))
    named.write_text("\n".join(f"{originals.name}/{image} {image.split('/')[0]}" for image in images) + "\n\n")
    for path in (numbered, named):
        listing = list_originals("list", path)
        assert [original.path.split("/", 1)[1] for original in listing.originals] == images
        assert [names[original.label] for original in listing.originals] == [image.split("/")[0] for image in images]
        write_shards(Plan(listing, 1), tmp_path / path.stem)
        assert verify_shards(tmp_path / path.stem, full=True) == []
    named.write_text("image-without-label\n")
    with pytest.raises(DataError, match="Line 1"):
        list_originals("list", named)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("list", "", "lists no images"),
        ("pairs", "{}", "Line 1"),
        ("pairs", "", "is empty"),
        ("pairs", None, "contains no images"),
    ],
)
def test_nothing_to_shard_is_explained(tmp_path, kind, content, message):
    path = tmp_path / "input"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=message):
        list_originals(kind, path)


def test_an_image_without_caption_is_named(tmp_path):
    pairs = write_pairs(tmp_path)
    (pairs / "part" / "03.txt").unlink()
    with pytest.raises(DataError, match=r"03\.jpg has no caption"):
        list_originals("pairs", pairs)


def test_shards_of_another_tool_get_an_index_and_a_manifest(originals, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "imagenet-%06d.tar"), maxcount=25, verbose=0) as writer:
        for index, original in enumerate(list_originals("class_folders", originals).originals):
            image = (originals / original.path).read_bytes()
            writer.write({"__key__": f"{index:08d}", "jpg": image, "cls": str(original.label)})
    before = content_of(tmp_path)
    adopt_shards(tmp_path, processes=2)
    assert {name: digest for name, digest in content_of(tmp_path).items() if name.endswith("tar")} == before
    assert verify_shards(tmp_path, full=True) == []
    source = ShardFolder("train", tmp_path)
    listing = list_originals("class_folders", originals).originals
    assert [source.read(i).label for i in range(60)] == [original.label for original in listing]
    assert source.read(7).image == (originals / listing[7].path).read_bytes()
    with pytest.raises(DataError, match="already"):
        adopt_shards(tmp_path)
