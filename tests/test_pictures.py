"""Pictures say what they show: a class above its column, a prompt below its image."""

import numpy as np
import pytest

from megavar.pictures import GAP, LINE, _broken, labelled_grid, overview
from megavar.previews import _chosen


class _Font:
    """Ten pixels a letter."""

    @staticmethod
    def getlength(text: str) -> float:
        return 10 * len(text)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a red car", ["a red", "car"]),
        ("", []),
        ("extraordinary", ["extrao…"]),
        ("one two three four five six", ["one two", "three", "four …"]),
    ],
)
def test_prompts_are_broken_into_lines(text: str, lines: list[str]) -> None:
    assert _broken(text, 70, _Font()) == lines  # type: ignore[arg-type]


def test_words_stand_above_where_a_column_shows_one_thing_and_below_else() -> None:
    images = [np.full((8, 8, 3), 10 * index, np.uint8) for index in range(6)]
    by_class = overview(images, ["cat", "dog", "cat", "dog", "cat", "dog"], 2)
    assert by_class.tobytes() == labelled_grid(
        [images[:2], images[2:4], images[4:]], columns=["cat", "dog"]
    ).tobytes()  # fmt: skip
    prompted = overview(images[:4], ["a", "b", "c", "two words"], 2, "step 7")
    assert prompted.size == (2 * (160 + GAP) + GAP, GAP + 2 * (160 + GAP) + 2 * LINE + 22)
    below = np.asarray(prompted)[GAP + 160 : GAP + 160 + LINE, : 160 + GAP]
    assert below.min() < 128, "nothing is written below the first image"
    assert overview(images, [""] * 6, 3).size[1] < by_class.size[1], "there is nothing to say"


@pytest.mark.parametrize(("classes", "columns"), [(1, 10), (3, 9), (4, 8), (7, 7), (10, 10), (1000, 10)])
def test_a_class_has_a_column(classes: int, columns: int) -> None:
    indices, across = _chosen(False, classes)
    assert across == columns and len(indices) == 4 * columns
    assert ((indices % classes).view(-1, across) == indices[:across] % classes).all()
    assert (indices[:across] % classes).unique().numel() == min(classes, columns)
