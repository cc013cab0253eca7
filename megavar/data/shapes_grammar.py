"""The language of the ``shapes`` scenes: GenEval's six kinds of prompts over geometric shapes.

A prompt carries GenEval's own metadata (``tag``, ``include``, ``exclude``, ``prompt``), so that its rules and its
summary script apply. About a tenth of the (colour, shape) pairs and of the ordered pairs of shapes is reserved:
training scenes never show them, evaluation asks for them, and so measures composition rather than memory.

Source of prompts, colours and schema: djghosh13/geneval, ``prompts/create_prompts.py``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megavar.config.shapes import TAGS, Tag
from megavar.parallel.seeds import uniform

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar", "diamond", "heart")
RESERVED_SHARE = 0.1


@dataclass(frozen=True)
class Wanted:
    """One clause of a prompt: ``count`` objects of a shape, maybe of a colour, maybe placed relative to the first."""

    shape: str
    count: int = 1
    color: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption and what it asks for. In ``position`` prompts the first clause is the object that is referred to."""

    tag: Tag
    text: str
    include: tuple[Wanted, ...]

    def metadata(self) -> dict[str, Any]:
        """The prompt as GenEval's ``evaluation_metadata.jsonl`` writes it."""
        include: list[dict[str, Any]] = []
        for wanted in self.include:
            clause: dict[str, Any] = {"class": wanted.shape, "count": wanted.count}
            if wanted.color is not None:
                clause["color"] = wanted.color
            if wanted.position is not None:
                clause["position"] = [wanted.position, 0]
            include.append(clause)
        metadata: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            metadata["exclude"] = [{"class": self.include[0].shape, "count": self.include[0].count + 1}]
        return metadata | {"prompt": self.text}

    @property
    def count(self) -> int:
        """Number of objects asked for."""
        return sum(wanted.count for wanted in self.include)


@dataclass(frozen=True)
class Vocabulary:
    """The shapes that can be told apart at an image size, and the combinations reserved for evaluation."""

    shapes: tuple[str, ...]
    reserved_colors: frozenset[tuple[str, str]]
    """(colour, shape) pairs."""
    reserved_pairs: frozenset[tuple[str, str]]
    """Ordered pairs of shapes, in the order of the caption."""

    def colors_for(self, shape: str, *, reserved: bool) -> list[str]:
        """Colours that ``shape`` may have in training (``reserved=False``), or those kept from training."""
        return [color for color in COLORS if ((color, shape) in self.reserved_colors) == reserved]


@functools.cache
def vocabulary(image_size: int) -> Vocabulary:
    """Six shapes below 64 pixels; diamond and heart, which resemble others when small, from 64 on."""
    shapes = SHAPES if image_size >= 64 else SHAPES[:6]
    colors = _shuffled(COLORS, "colors")[: len(shapes)]  # every shape misses one colour, no colour misses two shapes
    pairs = _shuffled(list(itertools.permutations(shapes, 2)), "pairs")
    return Vocabulary(shapes, frozenset(zip(colors, shapes)), frozenset(pairs[: round(RESERVED_SHARE * len(pairs))]))


def all_prompts(words: Vocabulary, tag: Tag, *, held_out: bool) -> list[Prompt]:
    """Every prompt of ``tag``, in a fixed order: those of training, or those that need a reserved combination.

    Single objects and counts have nothing to reserve; both sets hold all of them.
    """
    if tag == "single_object":
        return [_single(shape) for shape in words.shapes]
    if tag == "counting":
        return [_counting(shape, number) for shape in words.shapes for number in NUMBERS]
    if tag == "colors":
        return [
            _colored(color, shape) for shape in words.shapes for color in words.colors_for(shape, reserved=held_out)
        ]
    pairs = list(itertools.permutations(words.shapes, 2))
    chosen = [pair for pair in pairs if (pair in words.reserved_pairs) == held_out]
    if tag == "two_object":
        return [_two(*pair) for pair in chosen]
    if tag == "position":
        return [_position(a, relation, b) for a, b in chosen for relation in POSITIONS]
    return [
        _color_attribution(color_a, a, color_b, b)
        for a, b in pairs
        for color_a, color_b in itertools.permutations(COLORS, 2)
        if held_out == bool({(color_a, a), (color_b, b)} & words.reserved_colors or (a, b) in words.reserved_pairs)
    ]


def evaluation_prompts(
    image_size: int, *, per_tag: int = 100, held_out: bool = True, seed: int = 0, tags: Sequence[Tag] = TAGS
) -> list[Prompt]:
    """Up to ``per_tag`` different prompts of each tag, drawn by ``seed``; a tag with fewer prompts gives all it has."""
    words = vocabulary(image_size)
    prompts = []
    for tag in tags:
        prompts += _shuffled(all_prompts(words, tag, held_out=held_out), f"evaluation/{tag}", seed)[:per_tag]
    return prompts


def with_article(noun: str) -> str:
    """``noun`` with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """The plural of a shape."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _single(shape: str) -> Prompt:
    return Prompt("single_object", f"a photo of {with_article(shape)}", (Wanted(shape),))


def _counting(shape: str, number: int) -> Prompt:
    return Prompt("counting", f"a photo of {NUMBERS[number]} {plural(shape)}", (Wanted(shape, number),))


def _colored(color: str, shape: str) -> Prompt:
    return Prompt("colors", f"a photo of {with_article(color)} {shape}", (Wanted(shape, color=color),))


def _two(a: str, b: str) -> Prompt:
    return Prompt("two_object", f"a photo of {with_article(a)} and {with_article(b)}", (Wanted(a), Wanted(b)))


def _position(a: str, relation: str, b: str) -> Prompt:
    text = f"a photo of {with_article(a)} {relation} {with_article(b)}"
    return Prompt("position", text, (Wanted(b), Wanted(a, position=relation)))


def _color_attribution(color_a: str, a: str, color_b: str, b: str) -> Prompt:
    text = f"a photo of {with_article(color_a)} {a} and {with_article(color_b)} {b}"
    return Prompt("color_attr", text, (Wanted(a, color=color_a), Wanted(b, color=color_b)))


def _shuffled(items: Any, purpose: str, seed: int = 0) -> list[Any]:
    keys = uniform(seed, f"shapes/{purpose}", torch.arange(len(items)))
    return [items[index] for index in torch.argsort(keys, stable=True).tolist()]
