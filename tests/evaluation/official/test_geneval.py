"""GenEval's folder: as the official scorer reads it, and every deviation is found."""

import json
import re

import pytest
import torch
from PIL import Image

from megavar.errors import DataError
from megavar.evaluation.official.geneval import GenEvalFolder
from tests.evaluation.official.conftest import SIDE, Images, picture


def prompt(color):
    return {
        "tag": "colors",
        "include": [{"class": "bus", "count": 1, "color": color}],
        "prompt": f"a photo of a {color} bus",
    }


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(prompt(color)) + "\n" for color in ("red", "blue", "green")))
    folder, images, root = GenEvalFolder(path), Images(12), tmp_path / "geneval"
    folder.write(root, images)
    return folder, root, images


def test_the_folder_is_read_as_the_official_scorer_reads_it(geneval):
    folder, root, images = geneval
    assert folder.problems(root) == [] and folder.texts()[1] == "a photo of a blue bus"
    names = sorted(entry.name for entry in root.iterdir())
    assert names == ["00000", "00001", "00002"]
    for number, name in enumerate(names):
        assert json.loads((root / name / "metadata.jsonl").read_text()) == folder.prompts[number]
        samples = sorted((root / name / "samples").iterdir())
        assert len(samples) == 4 and all(re.match(r"\d+\.png", file.name) for file in samples)
        for sample, file in enumerate(samples):
            assert torch.equal(picture(file), images.pixels[4 * number + sample])


def test_emission_resumes_and_rewrites_nothing(geneval):
    folder, root, images = geneval
    kept, lost = root / "00000/samples/00000.png", root / "00001/samples/00002.png"
    content, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    folder.write(root, images)
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
def test_every_deviation_is_found(geneval, damage, message):
    folder, root, _ = geneval
    damage(root)
    assert any(message in problem for problem in folder.problems(root))
    with pytest.raises(DataError, match=re.escape(message)):
        folder.check(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts"),
        ('{"prompt": "x"}', "line 1"),
        ("no", "cannot be read"),
        (f"{json.dumps(prompt('red'))}\n{json.dumps(prompt('red'))}", "lines 1 and 2"),
    ],
)
def test_prompts_are_checked(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        GenEvalFolder(path)


def test_other_numbers_of_images_are_refused(geneval, tmp_path):
    with pytest.raises(DataError, match="need 12 images, but there are 8"):
        geneval[0].write(tmp_path / "x", Images(8))
