"""ShapeEval: the detector is exact on clean scenes, and no shortcut scores on the strict rule.

The robustness figures are those of notes/evaluation.md section 3.4 (six shapes at 32 pixels, 150 images per task);
tolerances are three standard errors of a share over 900 images plus what another renderer may change.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from megavar.data.shapes_grammar import TAGS, Prompt, Wanted, all_prompts, vocabulary
from megavar.data.shapes_renderer import PALETTE, Draws, Item, lay_out, render
from megavar.errors import DataError
from megavar.evaluation.shape_detector import Detection, detect
from megavar.evaluation.shape_eval import (
    judge,
    score_scenes,
    summarize,
    tokenizer_ceiling,
    true_scenes,
    write_records,
)

PER_TAG = 150


def prompts_of(size):
    random = np.random.default_rng(0)
    drawn = []
    for tag in TAGS:
        pool = all_prompts(vocabulary(size), tag, held_out=False)
        if tag not in ("single_object", "counting"):
            pool += all_prompts(vocabulary(size), tag, held_out=True)
        drawn += [pool[i] for i in random.integers(0, len(pool), PER_TAG)]
    return drawn


@pytest.fixture(scope="module")
def small():
    prompts = prompts_of(32)
    return true_scenes(prompts, 32), prompts


@pytest.fixture(scope="module")
def large():
    prompts = prompts_of(64)[::3]
    return true_scenes(prompts, 64), prompts


def scores(images, prompts):
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return summarize(score_scenes(images, prompts))


def pixels(images):
    return images.permute(0, 2, 3, 1).numpy()


def to_bytes(values):
    return values.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [32, 64])
def test_detector_recovers_every_scene_exactly(size):
    words = vocabulary(size)
    for index, prompt in enumerate(prompts_of(size)[::3]):
        scene = lay_out(prompt, words, size, Draws(7, "test", index), held_out=True)
        found = detect(render(scene, size)[None])[0]
        assert {(d.shape, d.color, d.box) for d in found} == {(i.shape, i.color, i.box) for i in scene}
        assert len(found) == len(scene)


def test_ground_truth_scores_one(small):
    assert set(scores(*small).values()) == {1.0}


def test_noise_scores_nothing(small):
    images, prompts = small
    random = np.random.default_rng(1)
    palette = np.array(list(PALETTE.values()), dtype=np.uint8)
    shape = pixels(images).shape
    for noise in (
        random.integers(0, 256, shape).astype(np.uint8),
        np.full(shape, 128, dtype=np.uint8),
        palette[random.integers(0, 10, shape[:3])],
    ):
        assert set(scores(noise, prompts).values()) == {0.0}


def test_drawing_everything_scores_on_the_lenient_rule_only(small):
    _, prompts = small
    random = np.random.default_rng(2)
    palette = np.array(list(PALETTE.values()), dtype=np.uint8)
    mosaic = palette[random.integers(0, 10, (len(prompts), 4, 4))].repeat(8, axis=1).repeat(8, axis=2)
    result = scores(mosaic, prompts)
    assert result["strict"] == 0 and result["lenient"] == pytest.approx(0.058, abs=0.04)
    assert result["lenient/single_object"] > 0.2


def test_shuffled_captions_are_near_chance(small):
    images, prompts = small
    random = np.random.default_rng(3)
    within = np.concatenate([k * PER_TAG + random.permutation(PER_TAG) for k in range(len(TAGS))])
    result = scores(images, [prompts[i] for i in within])
    assert result["strict"] == result["lenient"] == pytest.approx(0.056, abs=0.03)
    result = scores(images, [prompts[i] for i in random.permutation(len(prompts))])
    assert result["strict"] == pytest.approx(0.017, abs=0.02) and result["lenient"] == pytest.approx(0.053, abs=0.03)


def jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return np.array(Image.open(buffer))


def noisy(images, deviation):
    return to_bytes(images + np.random.default_rng(4).normal(0, deviation, images.shape))


def blurred(images, deviation):
    return to_bytes(ndimage.gaussian_filter(images.astype(float), (0, deviation, deviation, 0)))


def resampled(images):
    side = images.shape[1]
    halves = [Image.fromarray(image).resize((side // 2, side // 2), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.array(half.resize((side, side), Image.Resampling.BICUBIC)) for half in halves])


@pytest.mark.parametrize(
    ("name", "damage", "expected", "tolerance"),
    [
        ("jpeg 90", lambda x: np.stack([jpeg(image, 90) for image in x]), 1.000, 0.005),
        ("jpeg 60", lambda x: np.stack([jpeg(image, 60) for image in x]), 0.990, 0.02),
        ("noise 10", lambda x: noisy(x, 10), 1.000, 0.005),
        ("noise 25", lambda x: noisy(x, 25), 0.992, 0.02),
        ("noise 40", lambda x: noisy(x, 40), 0.469, 0.08),
        ("blur 0.5", lambda x: blurred(x, 0.5), 1.000, 0.005),
        ("blur 0.8", lambda x: blurred(x, 0.8), 0.984, 0.02),
        ("blur 1.2", lambda x: blurred(x, 1.2), 0.766, 0.08),
        ("half size", resampled, 0.910, 0.04),
    ],
)
def test_robustness_table(small, name, damage, expected, tolerance):
    images, prompts = small
    assert scores(damage(pixels(images)), prompts)["strict"] == pytest.approx(expected, abs=tolerance), name


@pytest.mark.parametrize(
    ("name", "damage", "expected", "tolerance"),
    [
        ("noise 25", lambda x: noisy(x, 25), 0.998, 0.01),
        ("noise 40", lambda x: noisy(x, 40), 0.638, 0.1),
        ("blur 0.8", lambda x: blurred(x, 0.8), 1.000, 0.005),
        ("blur 1.2", lambda x: blurred(x, 1.2), 0.939, 0.05),
        ("half size", resampled, 0.978, 0.04),
        ("jpeg 60", lambda x: np.stack([jpeg(image, 60) for image in x]), 0.999, 0.02),
    ],
)
def test_robustness_of_eight_shapes_at_64_pixels(large, name, damage, expected, tolerance):
    """The table's last column."""
    images, prompts = large
    assert scores(damage(pixels(images)), prompts)["strict"] == pytest.approx(expected, abs=tolerance), name


def found(*items):
    return [Detection(shape, color, 1.0 - 0.01 * i, box) for i, (shape, color, box) in enumerate(items)]


LEFT, RIGHT, BELOW = (0, 0, 8, 8), (20, 0, 28, 8), (0, 20, 8, 28)
CIRCLE_LEFT_OF_BAR = Prompt(
    "position", "a photo of a circle left of a bar", (Wanted("bar"), Wanted("circle", position="left of"))
)
TWO_RINGS = Prompt("counting", "a photo of two rings", (Wanted("ring", 2),))
RED_CIRCLE_BLUE_BAR = Prompt(
    "color_attr", "a photo of a red circle and a blue bar", (Wanted("circle", color="red"), Wanted("bar", color="blue"))
)


@pytest.mark.parametrize(
    ("prompt", "objects", "reason"),
    [
        (CIRCLE_LEFT_OF_BAR, found(("circle", "red", LEFT), ("bar", "red", RIGHT)), ""),
        (
            CIRCLE_LEFT_OF_BAR,
            found(("circle", "red", RIGHT), ("bar", "red", LEFT)),
            "expected circle left of target, found right of target",
        ),
        (
            CIRCLE_LEFT_OF_BAR,
            found(("circle", "red", LEFT)),
            "expected bar>=1, found 0\nno target for circle to be left of",
        ),
        (TWO_RINGS, found(("ring", "red", LEFT), ("ring", "blue", RIGHT)), ""),
        (TWO_RINGS, found(("ring", "red", LEFT)), "expected ring>=2, found 1"),
        (
            TWO_RINGS,
            found(("ring", "red", LEFT), ("ring", "red", RIGHT), ("ring", "red", BELOW)),
            "expected ring<3, found 3",
        ),
        (RED_CIRCLE_BLUE_BAR, found(("circle", "red", LEFT), ("bar", "blue", RIGHT)), ""),
        (
            RED_CIRCLE_BLUE_BAR,
            found(("circle", "blue", LEFT), ("bar", "red", RIGHT)),
            "expected red circle>=1, found 0 red; and 1 blue\nexpected blue bar>=1, found 0 blue; and 1 red",
        ),
        # only the most certain object of a shape counts, as in GenEval
        (
            RED_CIRCLE_BLUE_BAR,
            found(("circle", "pink", LEFT), ("circle", "red", BELOW), ("bar", "blue", RIGHT)),
            "expected red circle>=1, found 0 red; and 1 pink",
        ),
    ],
)
def test_lenient_rule_is_that_of_geneval(prompt, objects, reason):
    assert judge(objects, prompt) == (not reason, reason)


def test_strict_rule_allows_nothing_else():
    scene = (Item("circle", "red", 9, 2, 2), Item("square", "blue", 9, 18, 18))
    image = torch.from_numpy(render(scene, 32)).permute(2, 0, 1)[None]
    (record,) = score_scenes(image, [Prompt("single_object", "a photo of a circle", (Wanted("circle"),))])
    assert record["correct"] and not record["strict_correct"] and "in all, found 2" in record["reason"]


def test_summary_has_the_semantics_of_the_official_script():
    def record(tag, prompt, correct):
        return {"tag": tag, "metadata": prompt, "correct": correct, "strict_correct": False}

    records = [
        record("colors", "a", True),
        record("colors", "a", False),
        record("colors", "b", False),
        record("counting", "c", True),
    ]
    summary = summarize(records)
    assert summary["lenient/colors"] == pytest.approx(1 / 3) and summary["lenient/counting"] == 1
    assert summary["lenient"] == pytest.approx(2 / 3)  # mean over tasks, not over images
    assert summary["lenient/images"] == 0.5 and summary["lenient/prompts"] == pytest.approx(2 / 3)
    assert summary["strict"] == summary["strict/images"] == 0


def test_records_have_the_official_columns(small, tmp_path):
    images, prompts = small
    records = score_scenes(images[:3], prompts[:3], filenames=["a.png", "b.png", "c.png"])
    write_records(tmp_path / "results.jsonl", records)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == records
    assert list(lines[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details", "strict_correct"]
    assert json.loads(lines[0]["metadata"]) == prompts[0].metadata()
    ((shape, ((x1, y1, x2, y2, score),)),) = json.loads(lines[0]["details"]).items()
    assert shape == prompts[0].include[0].shape and x1 < x2 and y1 < y2 and score == 1


def test_tokenizer_ceiling_is_one_without_loss_and_lower_with():
    prompts = prompts_of(32)[::10]
    assert tokenizer_ceiling(lambda images: images, prompts, 32)["strict"] == 1

    def coarse(images):
        small = torch.nn.functional.avg_pool2d(images.float(), 2)
        return torch.nn.functional.interpolate(small, scale_factor=2).round().to(torch.uint8)

    assert 0.05 < tokenizer_ceiling(coarse, prompts, 32)["strict"] < 0.95


def test_unusable_input_is_refused(small):
    images, prompts = small
    with pytest.raises(DataError, match="32 or 64"):
        score_scenes(images[:2, :, :16, :16], prompts[:2])
    with pytest.raises(DataError, match="2 images for 3 prompts"):
        score_scenes(images[:2], prompts[:3])
