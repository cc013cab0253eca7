"""DPG-Bench's folder: as the official scorer reads it, and every deviation is found."""

import pytest
import torch
from PIL import Image

from megavar.errors import DataError
from megavar.evaluation.official.dpg import DPGFolder
from tests.evaluation.official.conftest import SIDE, Images, picture


@pytest.fixture
def dpg(tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for item in ("whoops7", "countbench3"):
        (prompts / f"{item}.txt").write_text(f"prompt of {item}\n")
    folder, images, root = DPGFolder(prompts), Images(8), tmp_path / "dpg"
    folder.write(root, images)
    return folder, root, images


def test_the_folder_holds_one_grid_per_prompt_and_nothing_else(dpg):
    folder, root, images = dpg
    assert folder.prompts == {"countbench3": "prompt of countbench3", "whoops7": "prompt of whoops7"}
    assert folder.texts() == ("prompt of countbench3", "prompt of whoops7") and folder.problems(root) == []
    assert sorted(entry.name for entry in root.iterdir()) == ["countbench3.png", "whoops7.png"]
    grid = picture(root / "whoops7.png")
    quarters = [grid[:, y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    assert all(torch.equal(quarter, image) for quarter, image in zip(quarters, images.pixels[4:8]))
    assert "--pic-num 4 --resolution 8" in folder.advice(images)[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "whoops7.png").unlink(), "whoops7.png is missing"),
        (lambda root: (root / "results.txt").write_text("x"), "does not belong there"),
        (lambda root: Image.new("RGB", (SIDE, SIDE)).save(root / "whoops7.png"), "different sizes"),
        (lambda root: Image.new("RGB", (SIDE, 2 * SIDE)).save(root / "whoops7.png"), "instead of an even square"),
        (lambda root: (root / "whoops7.png").write_bytes(b""), "cannot be decoded"),
    ],
)
def test_every_deviation_is_found(dpg, damage, message):
    folder, root, _ = dpg
    damage(root)
    assert any(message in problem for problem in folder.problems(root))


def test_four_samples_are_needed(tmp_path, dpg):
    with pytest.raises(DataError, match="draw 4"):
        DPGFolder(tmp_path / "prompts", per_prompt=2).write(tmp_path / "x", dpg[2])


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no \.txt files"):
        DPGFolder(tmp_path)
