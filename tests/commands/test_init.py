"""``megavar init`` looks at a folder and writes files that load, build and train on it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavar.__main__ import main
from megavar.assembly import check_consistency
from megavar.config.loading import load_config
from megavar.data.build import build_source
from megavar.data.image_folder import ImageFolder
from megavar.errors import ExitCode


def photographs(root: Path, classes: dict[str, int]) -> Path:
    """Crops of the bundled photographs, by class."""
    from skimage import data

    pictures = {"astronaut": data.astronaut(), "cat": data.chelsea(), "coffee": data.coffee()}
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            crop = pictures[name or "cat"][5 * index : 5 * index + 90, 7 * index : 7 * index + 80]
            Image.fromarray(np.ascontiguousarray(crop)).save(root / name / f"{index:02d}.jpg")
    return root


def test_every_class_is_held_out_in_part_and_no_image_is_in_both(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", {"cat": 20, "coffee": 2})
    train, test = (ImageFolder(split, root, 0.1) for split in ("train", "test"))
    assert not set(train.listing) & set(test.listing)
    assert sorted(train.listing + test.listing) == ImageFolder("train", root).listing
    assert [sum(label == one for _, label in test.listing) for one in (0, 1)] == [2, 1]
    assert train.fingerprint != test.fingerprint
    (root / "cat" / "99.jpg").write_bytes((root / "cat" / "00.jpg").read_bytes())
    moved = set(test.listing) - set(ImageFolder("test", root, 0.1).listing)
    assert len(moved) <= 1, "one more image reshuffles the others"


@pytest.mark.parametrize("classes", [{"cat": 40, "coffee": 30}, {"": 20}])
def test_what_it_writes_fits_the_folder(
    classes: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photographs(tmp_path / "my photos", classes)
    (root / next(iter(classes)) / "broken.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--images", str(root), "--out", "here"]) == ExitCode.FINISHED
    said = capsys.readouterr().out
    total = sum(classes.values()) + 1
    for part in (f"{total} in", "80 x 90", "1 of", "broken.jpg", "train here/my-photos.yaml"):
        assert part in said, said
    for file in ("here/my-photos-tokenizer.yaml", "here/my-photos.yaml"):
        config = load_config(file)
        source = build_source(config.data)
        check_consistency(config, source)
        assert len(source) + len(build_source(config.data, "test")) == total
    assert config.run.requires == (str(tmp_path / "here" / "my-photos-tokenizer.yaml"),)
    assert config.evaluation.after_training == (len(classes) > 1)
    assert config.data.damaged_samples == "skip-and-count"
    assert main(["init", "--images", str(root), "--out", "here"]) == ExitCode.CONFIGURATION
    assert "--overwrite" in capsys.readouterr().err


def test_a_folder_without_images_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where, part in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "contains no images")):
        assert main(["init", "--images", str(where)]) == ExitCode.CONFIGURATION
        assert part in capsys.readouterr().err
