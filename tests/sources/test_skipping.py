"""Labels mean what the list says, and what is no data becomes neither class nor sample: one rule everywhere."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavar.data.image_folder import ImageFolder, list_class_folders
from megavar.data.shards.listing import list_originals
from megavar.data.skipping import is_no_data
from megavar.errors import DataError
from megavar.evaluation.images import PngFolder
from tools import shard_images

JUNK = ("__MACOSX", ".ipynb_checkpoints", "@eaDir", ".git", "#recycle", "$RECYCLE.BIN", "lost+found", "@tmp", ".hidden")


def draw(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Two classes of two images, and junk on every level."""
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        for index in range(2):
            draw(root / name / f"{index}.png", index)
        draw(root / name / "deeper" / "9.png")
        for junk in JUNK:
            draw(root / name / junk / "0.png")
            draw(root / name / "deeper" / junk / "0.png")
    for junk in JUNK:
        draw(root / junk / "0.png")
        draw(root / junk / "cat" / "0.png")
    for name in ("._0.png", "~0.png~", ".0.png", "Thumbs.db"):
        (root / "cat" / name).write_bytes(b"\x00\x05\x16\x07")
    (root / "README").touch()
    return root


EXPECTED = ["cat/0.png", "cat/1.png", "cat/deeper/9.png", "dog/0.png", "dog/1.png", "dog/deeper/9.png"]


def test_class_folders(folders):
    ignored: Counter[str] = Counter()
    names, images = list_class_folders(folders, ignored)
    assert names == ("cat", "dog")
    assert images == [(path, path.startswith("dog")) for path in EXPECTED]
    assert ignored["folder __MACOSX"] == 5 and ignored["folder .ipynb_checkpoints"] == 5
    assert ignored["hidden or system file"] == 4 and ignored["file beside the class folders"] == 1


def test_the_source_says_what_it_leaves_out(folders, caplog):
    with caplog.at_level("INFO"):
        assert len(ImageFolder("train", folders)) == 6
    assert "Beside the 6 images" in caplog.text and "5 folder @eaDir" in caplog.text


def test_the_tool_says_what_it_leaves_out(folders, tmp_path, capsys):
    assert shard_images.main(["--images", str(folders), "--out", str(tmp_path / "out"), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "Beside the 6 images" in said and "5 folder __MACOSX" in said and "6 images in 1 shards, 2 classes" in said


def everything(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.suffix == ".png"]


def test_a_list_of_everything(folders):
    """As ``find`` writes it."""
    (folders / "list.txt").write_text("".join(f"{path} {path.split('/')[0]}\n" for path in everything(folders)))
    listing = list_originals("list", folders / "list.txt")
    assert (listing.class_names, [original.path for original in listing.originals]) == (("cat", "dog"), EXPECTED)
    assert listing.ignored["folder __MACOSX"] == 6


def test_a_jsonl_of_everything(folders):
    lines = [json.dumps({"image": path, "caption": path}) for path in everything(folders)]
    (folders / "list.jsonl").write_text("\n".join(lines))
    listing = list_originals("pairs", folders / "list.jsonl")
    assert [original.path for original in listing.originals] == EXPECTED and listing.ignored["folder .git"] == 6


def test_pairs(folders):
    for path in EXPECTED:
        (folders / path).with_suffix(".txt").write_text(path)
    listing = list_originals("pairs", folders)
    assert [original.path for original in listing.originals] == EXPECTED and listing.ignored["folder lost+found"] == 5


def test_scored_folders(tmp_path):
    draw(tmp_path / "0.png")
    (tmp_path / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    assert len(PngFolder(tmp_path)) == 1


def test_where_images_are_kept_is_somebodys_choice(tmp_path):
    hidden = draw(tmp_path / ".cache" / "set" / "a.png")
    listed = tmp_path / "lists" / "list.txt"
    listed.parent.mkdir()
    listed.write_text(f"{hidden} 0\n../.cache/set/a.png 1\n{hidden.parent}/._a.png 1\n")
    assert [original.label for original in list_originals("list", listed).originals] == [0, 1]
    assert list_class_folders(tmp_path / ".cache")[0] == ("set",)


def test_names_that_are_data():
    for name in ("cat", "n01440764", "_", "MACOSX", "tmp", "a.b", "@home", "#1", "checkpoints", "naïve", "-1"):
        assert not is_no_data(name)


@pytest.mark.parametrize(
    ("lines", "labels"),
    [
        (["a.jpg 2", "b.jpg 10", "c.jpg 1"], [2, 10, 1]),
        (["a.jpg 02", "b.jpg 10"], [2, 10]),
        (["a.jpg n10", "b.jpg n2"], [0, 1]),
        (["a.jpg\tgolden retriever", "b c.jpg\tcat"], [1, 0]),
        (["a.jpg 3d", "b.jpg -x"], [1, 0]),
    ],
)
def test_labels_are_what_the_list_says(tmp_path, lines, labels):
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert [original.label for original in list_originals("list", tmp_path / "list.txt").originals] == labels


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        (["a.jpg 1", "b.jpg -1", "c.jpg 10"], 2, "'-1'"),
        (["a.jpg -1", "b.jpg -2"], 1, "'-1'"),
        (["a.jpg 1", "b.jpg 2.0"], 2, "'2.0'"),
        (["a.jpg 1.0", "b.jpg 2.0"], 1, "'1.0'"),
        (["a.jpg 1e1", "b.jpg 0"], 1, "'1e1'"),
        (["a.jpg 1", "b.jpg nan"], 2, "'nan'"),
        (["a.jpg nan", "b.jpg cat"], 1, "'nan'"),
        (["a.jpg 1", "b.jpg cat"], 2, "'cat'"),
        (["a.jpg 1", "b.jpg +2"], 2, r"'\+2'"),
        (["a.jpg 1", "b.jpg \uff12"], 2, "'\uff12'"),
        (["image label", "a.jpg 1"], 1, "'image' is no image"),
        (["image label", "a.jpg cat"], 1, "'image' is no image"),
        (["a.jpg cat", "filename class", "b.jpg dog"], 2, "'filename' is no image"),
        (["a.jpg, 1"], 1, "'a.jpg,' is no image"),
        (["a.jpg golden retriever"], 1, "is no image"),
        (["a.jpg\t"], 1, "image path, a space and a label"),
    ],
)
def test_labels_that_are_neither_numbers_nor_names_are_refused(tmp_path, lines, line, what):
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"Line {line} of .*list.txt.*{what}"):
        list_originals("list", tmp_path / "list.txt")


def test_sixteen_bits_of_grey_are_scored_as_they_are_trained(tmp_path):
    shades = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for name, content in (("wide", shades), ("narrow", (shades >> 8).astype(np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(content).save(tmp_path / name / "0.png")
    wide, narrow = (PngFolder(tmp_path / name).read(0, 1) for name in ("wide", "narrow"))
    assert wide.shape == (1, 3, 16, 16) and bool((wide == narrow).all()) and wide.unique().numel() == 256
