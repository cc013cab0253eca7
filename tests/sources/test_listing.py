"""What is listed for sharding, and how what cannot be is explained."""

import json
import multiprocessing
import os
import tarfile
import tempfile
from pathlib import Path

import pytest

from megavar.data.image_folder import ImageFolder
from megavar.data.shards.listing import list_originals
from megavar.data.shards.verification import adopt_shards, list_sharded, repair_shards, verify_shards
from megavar.data.shards.writing import Plan, write_shards
from megavar.data.webdataset import ShardFolder
from megavar.errors import DataError
from tests.sources.originals import write_class_folders, write_pairs


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


def test_list_files_of_other_systems(tmp_path):
    """With a byte order mark, carriage returns, empty lines, spaces in names, and words that are not ASCII."""
    (tmp_path / "list.txt").write_bytes("\ufeffa b.jpg\tcafé\r\n\r\nc.jpg naïve\r\n".encode())
    listing = list_originals("list", tmp_path / "list.txt")
    assert [(original.path, original.label) for original in listing.originals] == [("a b.jpg", 0), ("c.jpg", 1)]
    assert listing.class_names == ("café", "naïve")
    (tmp_path / "list.txt").write_text("a.jpg 007\nb.jpg 3\n")
    assert [original.label for original in list_originals("list", tmp_path / "list.txt").originals] == [7, 3]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("list", "", "lists no images"),
        ("list", None, "is not a file"),
        ("list", b"\xff\xd8 1", "is not UTF-8 text"),
        ("list", "a.jpg 1281167000", "label 1281167000"),
        ("pairs", "{}", "Line 1"),
        ("pairs", '\n{"image": "a.jpg", "caption": null}', "Line 2"),
        ("pairs", '["a.jpg", "text"]', "Line 1"),
        ("pairs", b'{"image": "a.jpg", "caption": "caf\xe9"}', "is not UTF-8 text"),
        ("pairs", "", "is empty"),
        ("pairs", None, "contains no images"),
    ],
)
def test_nothing_to_shard_is_explained(tmp_path, kind, content, message):
    path = tmp_path / "input"
    path.mkdir() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        list_originals(kind, path)


def test_an_image_without_caption_is_named(tmp_path):
    pairs = write_pairs(tmp_path)
    (pairs / "part" / "03.txt").unlink()
    with pytest.raises(DataError, match=r"03\.jpg has no caption"):
        list_originals("pairs", pairs)


def test_what_is_ignored_is_counted(tmp_path):
    folders = write_class_folders(tmp_path / "folders", 10)
    for name in ("a.gif", "b.GIF", "c.jpg.part", "Makefile"):
        (folders / "china" / name).touch()
    (folders / "china" / "more").symlink_to(folders / "coffee")
    listing = list_originals("class_folders", folders)
    assert (len(listing.originals), listing.ignored) == (
        10, {".gif": 2, ".part": 1, "Makefile": 1, "linked folder": 1},
    )  # fmt: skip
    pairs = write_pairs(tmp_path / "pairs", 4)
    (pairs / "alone.txt").touch()
    (pairs / "info.json").touch()
    listing = list_originals("pairs", pairs)
    assert (len(listing.originals), listing.ignored) == (4, {"caption without image": 1, ".json": 1})


def _list_as_nobody(folder: Path) -> None:
    os.seteuid(65534)
    try:
        list_originals("class_folders", folder)
    except DataError as error:
        os._exit(0 if "china/locked cannot be read (Permission denied)" in str(error) else 2)
    os._exit(1)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root may")
def test_a_folder_that_cannot_be_read_is_not_passed_over():
    with tempfile.TemporaryDirectory() as temporary:  # pytest keeps its own folders from other users
        folders = write_class_folders(Path(temporary), 10)
        folders.chmod(0o755)
        (folders / "china" / "locked").mkdir(mode=0)
        process = multiprocessing.get_context("fork").Process(target=_list_as_nobody, args=(folders,))
        process.start()
        process.join()
    assert process.exitcode == 0


def test_names_that_are_not_utf_8(tmp_path):
    folders = write_class_folders(tmp_path / "folders", 10)
    image = next((folders / "china").iterdir())
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/caf\xe9.JPEG"))
    assert len(ImageFolder("train", folders)) == 10
    write_shards(Plan(list_originals("class_folders", folders), 1), tmp_path / "out")
    assert verify_shards(tmp_path / "out", full=True) == []
    assert len(ShardFolder("train", tmp_path / "out")) == 10


def test_captions_keep_every_character(tmp_path):
    captions = ["", "caf\u00e9 \u65e5\u672c\u8a9e \U0001f98a", 'line one\nline two\t"quoted"', "a" * 5000, "\u2028"]
    write_class_folders(tmp_path / "images", 5)
    images = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "images").rglob("*.*"))
    lines = [json.dumps({"image": image, "caption": text}, ensure_ascii=False) for image, text in zip(images, captions)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    write_shards(Plan(list_originals("pairs", tmp_path / "pairs.jsonl"), 2), tmp_path / "out")
    source = ShardFolder("train", tmp_path / "out")
    assert sorted(source.read(index).caption for index in range(5)) == sorted(captions)


def test_pairs_without_a_readable_caption_are_left_out_if_asked_for(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 8)
    (pairs / "part" / "03.txt").unlink()
    (pairs / "04.txt").write_bytes(b"caf\xe9")
    listing = list_originals("pairs", pairs, "leave-out")
    manifest = write_shards(Plan(listing, 1, damaged="leave-out"), tmp_path / "out")
    left_out = manifest.shards[0].left_out
    assert manifest.samples == 6 and len(left_out) == 2
    assert any("part/03.jpg: there is no 03.txt" in text for text in left_out)
    assert any("04.jpg: its caption is not UTF-8" in text for text in left_out)
    (tmp_path / "out" / "shard-000000.tar").unlink()
    repair_shards(tmp_path / "out", source=list_sharded(manifest, pairs))
    assert verify_shards(tmp_path / "out", full=True) == []

    lines = [json.dumps({"image": f"pairs/{name}.jpg", "caption": name}).encode() for name in ("00", "02", "06")]
    lines[1:1] = [b'{"image": "pairs/04.jpg", "caption": "caf\xe9"}', b'{"image": "pairs/part/03.jpg"}', b"{", b"[]"]
    (tmp_path / "list.jsonl").write_bytes(b"\n".join(lines))
    listing = list_originals("pairs", tmp_path / "list.jsonl", "leave-out")
    manifest = write_shards(Plan(listing, 1, damaged="leave-out"), tmp_path / "lines")
    assert (manifest.samples, len(manifest.shards[0].left_out)) == (3, 4)
    assert any("pairs/part/03.jpg: line 3 of the list" in text for text in manifest.shards[0].left_out)


@pytest.mark.parametrize("name, word", [("a.tar", "gzip"), ("a.tar.gz", "compressed ones such as a.tar.gz")])
def test_compressed_tars_are_named_as_such(tmp_path, name, word):
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(DataError, match=f"{word}.*Decompress"):
        adopt_shards(tmp_path)
