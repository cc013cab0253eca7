"""Folders of GenEval and DPG-Bench: as the official scorers read them, and every deviation is found."""

import json
import re

import pytest
import torch
from PIL import Image

from megavar.errors import DataError
from megavar.evaluation.layouts import (
    emit_dpg,
    emit_geneval,
    read_dpg_prompts,
    read_geneval_prompts,
    verify_dpg,
    verify_geneval,
)

SIDE = 8


class Images:
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator).to(torch.uint8)

    def __len__(self):
        return len(self.pixels)

    def read(self, first, last):
        return self.pixels[first:last]


def pixels_of(path):
    return torch.tensor(
        list(
            Image.open(path).get_flattened_data()
            if hasattr(Image.Image, "get_flattened_data")
            else Image.open(path).getdata()
        ),
        dtype=torch.uint8,
    )


@pytest.fixture
def geneval(tmp_path):
    prompts = [
        {
            "tag": "colors",
            "include": [{"class": "bus", "count": 1, "color": color}],
            "prompt": f"a photo of a {color} bus",
        }
        for color in ("red", "blue", "green")
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    images, root = Images(12), tmp_path / "geneval"
    emit_geneval(root, read_geneval_prompts(path), images)
    return root, prompts, images


def test_geneval_folder_is_read_as_the_official_scorer_reads_it(geneval):
    root, prompts, images = geneval
    assert verify_geneval(root, prompts) == []
    folders = sorted(entry.name for entry in root.iterdir())
    assert folders == ["00000", "00001", "00002"] and all(name.isdigit() for name in folders)
    for number, name in enumerate(folders):
        with (root / name / "metadata.jsonl").open() as file:
            assert json.load(file) == prompts[number]
        samples = sorted((root / name / "samples").iterdir())
        assert len(samples) == 4 and all(re.match(r"\d+\.png", file.name) for file in samples)
        for sample, file in enumerate(samples):
            expected = images.pixels[4 * number + sample].permute(1, 2, 0).reshape(-1, 3)
            assert torch.equal(pixels_of(file), expected)


def test_emission_resumes_and_rewrites_nothing(geneval):
    root, prompts, images = geneval
    kept, lost = root / "00000/samples/00000.png", root / "00001/samples/00002.png"
    content, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    emit_geneval(root, prompts, images)
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "00001/samples/00003.png").unlink(), "holds 3 samples instead of 4"),
        (lambda root: (root / "00001/samples/00003.png").rename(root / "00001/samples/00003.jpg"), "would be ignored"),
        (lambda root: (root / "00002").rename(root / "2nd"), "00002 is missing"),
        (lambda root: (root / "00007").mkdir(), "belongs to no prompt"),
        (lambda root: (root / "00000/metadata.jsonl").unlink(), "metadata.jsonl is missing"),
        (lambda root: (root / "00000/metadata.jsonl").write_text("{}\n{}\n"), "not one JSON object"),
        (
            lambda root: (root / "00000/metadata.jsonl").write_text((root / "00001/metadata.jsonl").read_text()),
            "another prompt",
        ),
        (lambda root: (root / "00000/samples/00000.png").write_bytes(b"\x89PNG"), "cannot be decoded"),
        (lambda root: Image.new("L", (SIDE, SIDE)).save(root / "00000/samples/00000.png"), "instead of RGB"),
        (lambda root: Image.new("RGB", (4, 4)).save(root / "00000/samples/00000.png"), "different sizes"),
    ],
)
def test_every_deviation_of_a_geneval_folder_is_found(geneval, damage, message):
    root, prompts, _ = geneval
    damage(root)
    assert any(message in problem for problem in verify_geneval(root, prompts))


def test_geneval_prompts_are_checked(tmp_path, geneval):
    _, prompts, images = geneval
    path = tmp_path / "p.jsonl"
    for text, message in (
        ("", "no prompts"),
        ('{"prompt": "x"}', "line 1"),
        ("no", "cannot be read"),
        (f"{json.dumps(prompts[0])}\n{json.dumps(prompts[0])}", "lines 1 and 2"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_geneval_prompts(path)
    with pytest.raises(DataError, match="need 8 images, but there are 12"):
        emit_geneval(tmp_path / "x", prompts[:2], images)


@pytest.fixture
def dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for item in ("whoops7", "countbench3"):
        (folder / f"{item}.txt").write_text(f"prompt of {item}\n")
    prompts, images, root = read_dpg_prompts(folder), Images(8), tmp_path / "dpg"
    emit_dpg(root, prompts, images)
    return root, prompts, images


def test_dpg_folder_holds_one_grid_per_prompt_and_nothing_else(dpg):
    root, prompts, images = dpg
    assert prompts == {"countbench3": "prompt of countbench3", "whoops7": "prompt of whoops7"}
    assert verify_dpg(root, prompts, side=SIDE) == []
    assert sorted(entry.name for entry in root.iterdir()) == ["countbench3.png", "whoops7.png"]
    grid = pixels_of(root / "whoops7.png").reshape(2 * SIDE, 2 * SIDE, 3).permute(2, 0, 1)
    quarters = [grid[:, y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    assert all(torch.equal(quarter, image) for quarter, image in zip(quarters, images.pixels[4:8]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "whoops7.png").unlink(), "whoops7.png is missing"),
        (lambda root: (root / "results.txt").write_text("x"), "does not belong there"),
        (lambda root: Image.new("RGB", (SIDE, SIDE)).save(root / "whoops7.png"), "instead of 16x16"),
        (lambda root: (root / "whoops7.png").write_bytes(b""), "cannot be decoded"),
    ],
)
def test_every_deviation_of_a_dpg_folder_is_found(dpg, damage, message):
    root, prompts, _ = dpg
    damage(root)
    assert any(message in problem for problem in verify_dpg(root, prompts, side=SIDE))


def test_dpg_needs_four_samples(tmp_path, dpg):
    _, prompts, images = dpg
    with pytest.raises(DataError, match="draw 4"):
        emit_dpg(tmp_path / "x", prompts, images, per_prompt=2)
    with pytest.raises(DataError, match=r"no \.txt files"):
        read_dpg_prompts(tmp_path)
