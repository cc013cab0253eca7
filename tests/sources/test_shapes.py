"""Rendered scenes: exactly what the caption says, the same for the same index, nothing reserved in training."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from megavar.data.shapes import Shapes
from megavar.data.shapes_grammar import COLORS, TAGS, all_prompts, evaluation_prompts, vocabulary
from megavar.data.shapes_renderer import BACKGROUND, PALETTE, Draws, lay_out, relations, render, shape_mask
from megavar.errors import ConfigError


def scenes(split, size, count):
    source = Shapes(split, size, length=count)
    for index in range(count):
        prompt, draws = source.prompt(index)
        yield prompt, lay_out(prompt, vocabulary(size), size, draws, held_out=split == "test")


@pytest.mark.parametrize(("split", "size"), list(itertools.product(("train", "test"), (32, 64))))
def test_scene_shows_what_the_caption_says(split, size):
    for prompt, scene in scenes(split, size, 150):
        counted = Counter(
            (item.shape, wanted.color and item.color)
            for item, wanted in zip(scene, [w for w in prompt.include for _ in range(w.count)])
        )
        assert counted == Counter({(w.shape, w.color): w.count for w in prompt.include})
        if prompt.tag == "position":
            assert prompt.include[1].position in relations(scene[1].box, scene[0].box)
        boxes = np.array([item.box for item in scene])
        assert boxes.min() >= 0 and boxes.max() <= size
        for a, b in itertools.combinations(boxes, 2):
            gap = max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])
            assert gap >= 2 * size // 32


def test_training_never_shows_what_is_reserved_and_testing_always_asks_for_it():
    words = vocabulary(32)
    for prompt, scene in scenes("train", 32, 600):
        assert not {(item.color, item.shape) for item in scene} & words.reserved_colors
        if prompt.tag in ("two_object", "color_attr"):
            assert (scene[0].shape, scene[1].shape) not in words.reserved_pairs
        if prompt.tag == "position":
            assert (scene[1].shape, scene[0].shape) not in words.reserved_pairs
    training = {p.text for tag in TAGS for p in all_prompts(words, tag, held_out=False)}
    for tag in ("two_object", "colors", "position", "color_attr"):
        held_out = {p.text for p in all_prompts(words, tag, held_out=True)}
        assert held_out and not held_out & training
        share = len(held_out) / (len(held_out) + len(all_prompts(words, tag, held_out=False)))
        assert share == pytest.approx(0.1, abs=0.001) or tag == "color_attr"


def test_captions_follow_the_grammar():
    words = vocabulary(64)
    captions = {p.text for tag in TAGS for held in (False, True) for p in all_prompts(words, tag, held_out=held)}
    noun = "(?:(?:red|yellow|green|blue|purple|pink|brown|black|white|orange) )?[a-z]+"
    between = "and|left of|right of|above|below"
    pattern = re.compile(rf"a photo of (?:(?:two|three|four) [a-z]+s|an? {noun}(?: (?:{between}) an? {noun})?)")
    assert all(pattern.fullmatch(caption) for caption in captions)
    assert {"a photo of an orange circle", "a photo of three crosses"} <= captions
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption.removeprefix("a photo")) for caption in captions)
    assert len({word for caption in captions for word in caption.split()}) <= 48
    assert max(len(caption.split()) for caption in captions) <= 14


def test_evaluation_prompts_are_different_seeded_and_complete():
    prompts = evaluation_prompts(32, per_tag=20)
    assert len({p.text for p in prompts}) == len(prompts)
    assert Counter(p.tag for p in prompts) == {
        "single_object": 6,
        "two_object": 3,
        "counting": 18,
        "colors": 6,
        "position": 12,
        "color_attr": 20,
    }
    assert evaluation_prompts(32, per_tag=20) == prompts != evaluation_prompts(32, per_tag=20, seed=1)
    seen = evaluation_prompts(32, per_tag=20, held_out=False)
    assert Counter(p.tag for p in seen)["position"] == 20


def test_metadata_is_that_of_geneval():
    by_tag = {p.tag: p.metadata() for p in evaluation_prompts(32, per_tag=1)}
    assert list(by_tag["position"]) == ["tag", "include", "prompt"]
    reference, placed = by_tag["position"]["include"]
    assert by_tag["position"]["prompt"].split()[4] == placed["class"] and placed["position"][1] == 0
    assert by_tag["position"]["prompt"].endswith(reference["class"])
    count = by_tag["counting"]["include"][0]["count"]
    assert by_tag["counting"]["exclude"] == [{"class": by_tag["counting"]["include"][0]["class"], "count": count + 1}]
    assert all("color" in clause for clause in by_tag["color_attr"]["include"])


@pytest.mark.parametrize("size", [32, 64])
def test_scenes_are_a_function_of_the_index(size):
    source, again = Shapes("train", size, length=50), Shapes("train", size, length=50)
    backwards = [again.read(index) for index in reversed(range(50))][::-1]
    images = [source.read(index) for index in range(50)]
    for one, other in zip(images, backwards):
        assert one.caption == other.caption and np.array_equal(one.image, other.image)
    assert len({sample.image.tobytes() for sample in images}) == 50
    assert images[0].image.shape == (size, size, 3) and images[0].label == -1 and source.num_classes == 0
    other = Shapes("train", size, length=50, seed=1)
    assert other.fingerprint != source.fingerprint == again.fingerprint
    assert not np.array_equal(other.read(0).image, images[0].image)


def test_scenes_do_not_change_between_versions():
    scene = Shapes("train", 32, length=10).read(3)
    assert scene.caption == GOLDEN_CAPTION
    colors, counts = np.unique(scene.image.reshape(-1, 3), axis=0, return_counts=True)
    assert dict(zip(map(tuple, colors.tolist()), counts.tolist())) == GOLDEN_PIXELS


GOLDEN_CAPTION = "a photo of a purple triangle and a black bar"
GOLDEN_PIXELS = {(0, 0, 0): 27, (128, 140, 140): 904, (140, 30, 170): 93}


def test_class_conditional_scenes_show_one_object_of_their_class():
    source = Shapes("train", 32, length=130, conditioning="class")
    assert source.num_classes == 60 == len(set(source.class_names))
    for index in (0, 1, 59, 60, 129):
        sample = source.read(index)
        assert sample.label == index % 60
        assert sample.caption.endswith(f" {source.class_names[sample.label]}")
        color, shape = source.class_names[sample.label].split()
        drawn = (sample.image != np.array(BACKGROUND, dtype=np.uint8)).any(-1)
        assert (sample.image[drawn] == np.array(PALETTE[color], dtype=np.uint8)).all()
        assert drawn.sum() in {shape_mask(shape, size).sum() for size in range(9, 14)}
    assert source.class_names[:2] == ("red circle", "orange circle")


def test_palette_is_far_apart():
    palette = np.array([PALETTE[color] for color in COLORS] + [BACKGROUND], dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette, axis=-1)[np.triu_indices(11, 1)]
    assert distances.min() >= 103


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 4, 4), (10, 0, 14, 4), {"left of"}),
        ((10, 0, 14, 4), (0, 0, 4, 4), {"right of"}),
        ((0, 0, 4, 4), (0, 10, 4, 14), {"above"}),
        ((0, 10, 4, 14), (0, 0, 4, 4), {"below"}),
        ((0, 0, 4, 4), (10, 10, 14, 14), {"left of", "above"}),
        ((0, 0, 4, 4), (0, 0, 4, 4), set()),
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # 2 pixels apart, 0.1 x (10 + 10) = 2 of slack
    ],
)
def test_relations_are_those_of_geneval(box, other, expected):
    assert relations(box, other) == expected


def test_other_sizes_are_refused():
    with pytest.raises(ConfigError, match="32 or 64"):
        Shapes("train", 48, length=1)


def test_draws_are_reproducible_and_uniform():
    numbers = [Draws(0, "x", index).below(10) for index in range(2000)]
    assert numbers == [Draws(0, "x", index).below(10) for index in range(2000)]
    assert np.bincount(numbers, minlength=10).min() > 150
    assert render((), 32).shape == (32, 32, 3)
