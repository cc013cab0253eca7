"""Writing shards, and reading back what was written with our code and with webdataset's."""

import hashlib
import io
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
from megavar.data.shards.verification import adopt_shards, repair_shards, verify_shards
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
        assert np.array_equal(decode_index(index_path(path).read_bytes(), path).records, records)
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
    # What "fail" had begun is continued, as its message proposes.
    assert content_of(shard(originals, tmp_path / "strict", shards=2, damaged="leave-out")) == content_of(out)


@pytest.mark.parametrize("kind", ["missing", "unreadable", "not an image"])
def test_originals_that_cannot_be_read_are_named(tmp_path, kind):
    originals = write_class_folders(tmp_path / "originals", 20)
    victim = originals / "coffee" / "extra.jpg"
    if kind == "not an image":
        victim.write_bytes(b"<html>404</html>")
    else:
        victim.symlink_to("/proc/self/mem" if kind == "unreadable" else "nowhere")
    with pytest.raises(DataError, match=r"coffee/extra\.jpg is damaged"):
        shard(originals, tmp_path / "out", shards=2)
    out = shard(originals, tmp_path / "out", shards=2, damaged="leave-out")
    expected = content_of(out)
    assert content_of(shard(originals, tmp_path / "again", shards=2, damaged="leave-out")) == expected
    for path in out.glob("*.tar"):
        path.unlink()
    repair_shards(out, source=list_originals("class_folders", originals))
    assert content_of(out) == expected


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


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def test_names_that_webdataset_passes_over_are_passed_over(originals, tmp_path):
    image = next(originals.rglob("*.JPEG")).read_bytes()
    write_tar(
        tmp_path / "a.tar",
        {"._1.jpg": b"mac", "README": b"text", "x.y/1.jpg": image, "x.y/1.cls": b"3", "._2.jpg": b"", "2.cls": b"0\n",
         "2.JPEG": image},
    )  # fmt: skip
    adopt_shards(tmp_path)
    source = ShardFolder("train", tmp_path)
    assert [(source.read(i).image, source.read(i).label) for i in range(len(source))] == [(image, 3), (image, 0)]
    assert [sample["__key__"] for sample in read_tars(tmp_path)] == ["x.y/1", "2"]
    assert verify_shards(tmp_path, full=True) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"1", "1.cls": b"0", "2.jpg": b"2"}, "1 samples of .* have no class"),
        ({"1.jpg": b"1", "1.cls": b"-1"}, "class of sample 1 .* is not a number"),
        ({"1.jpg": b"1", "1.cls": b"3000000000"}, "class of sample 1 .* is not a number below"),
        ({"1.cls": b"0"}, "Sample 1 .* has no image"),
        ({"README": b"nothing"}, "contains no samples"),
        ({"1.jpg": b"1", "1.JPG": b"2"}, "1.JPG twice in a row"),
    ],
)
def test_tars_that_are_no_training_data_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        adopt_shards(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_keys_may_begin_anew_in_every_shard_of_another_tool(originals, tmp_path):
    image = next(originals.rglob("*.JPEG")).read_bytes()
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {"1.jpg": image, "2.jpg": image})
    adopt_shards(tmp_path)
    assert verify_shards(tmp_path, full=True) == []
    (tmp_path / "manifest.json").unlink()
    write_tar(tmp_path / "b.tar", {"1.jpg": image, "2.jpg": image, "1.png": image})
    adopt_shards(tmp_path)
    assert [str(problem) for problem in verify_shards(tmp_path, full=True)] == [
        "b.tar: 1 keys occur more than once in it"
    ]


def test_an_index_of_another_kind_is_not_overwritten(originals, tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": next(originals.rglob("*.JPEG")).read_bytes(), "1.cls": b"0"})
    (tmp_path / "a.idx").write_text("v1.2 1\n")
    with pytest.raises(DataError, match=r"a\.idx is an index of another kind"):
        adopt_shards(tmp_path)
    assert (tmp_path / "a.idx").read_text() == "v1.2 1\n"
