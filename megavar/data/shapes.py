"""Rendered scenes of coloured shapes: the embedded text-image data set, also class-conditional."""

import hashlib
from collections.abc import Sequence
from typing import Literal

from megavar.config.shapes import TAGS, Tag
from megavar.data.shapes_grammar import COLORS, Prompt, all_prompts, vocabulary
from megavar.data.shapes_renderer import Draws, lay_out, render
from megavar.data.source import Sample, Split
from megavar.errors import ConfigError

_VERSION = 1  # raise when the same index would show another scene


class Shapes:
    """A fixed number of scenes; scene i is a function of (seed, split, i) alone.

    With captions, training scenes are drawn from prompts without reserved combinations (kinds of ``tags`` alike) and
    test scenes from prompts with them. With classes, scene i shows one object of class ``i % num_classes``, all
    combinations in both splits.
    """

    def __init__(
        self,
        split: Split,
        image_size: int,
        *,
        length: int,
        conditioning: Literal["caption", "class"] = "caption",
        seed: int = 0,
        tags: Sequence[Tag] = TAGS,
    ) -> None:
        if image_size not in (32, 64):
            raise ConfigError(
                f"data.image_size is {image_size}, but scenes of shapes are drawn at 32 or 64 pixels. Use one of them."
            )
        self.split: Split = split
        self.image_size = image_size
        self._words = vocabulary(image_size)
        self._length, self._seed, self._held_out = length, seed, split == "test"
        self._by_class = conditioning == "class"
        self.class_names: tuple[str, ...] = ()
        if self._by_class:
            self._prompts = [[prompt] for prompt in _single_objects(image_size)]
            self.class_names = tuple(f"{p.include[0].color} {p.include[0].shape}" for (p,) in self._prompts)
        else:
            self._prompts = [all_prompts(self._words, tag, held_out=self._held_out) for tag in tags]
        kinds = "" if tuple(tags) == TAGS or self._by_class else f"/{'+'.join(tags)}"
        name = f"{_VERSION}/{conditioning}/{split}/{image_size}/{length}/{seed}{kinds}"
        self.fingerprint = f"shapes-{split}-{image_size}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    @property
    def num_classes(self) -> int:
        """Number of (colour, shape) pairs; 0 with captions."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Sample:
        """Scene ``index`` with its caption, an image of shape [image_size, image_size, 3]."""
        prompt, draws = self.prompt(index)
        scene = lay_out(prompt, self._words, self.image_size, draws, held_out=self._held_out or self._by_class)
        label = index % self.num_classes if self._by_class else -1
        return Sample(key=f"scene-{index}", label=label, image=render(scene, self.image_size), caption=prompt.text)

    def caption(self, index: int) -> str:
        """Caption of scene ``index``, without drawing it."""
        return self.prompt(index)[0].text

    def prompt(self, index: int) -> tuple[Prompt, Draws]:
        """What scene ``index`` shows, and the random numbers for its layout."""
        draws = Draws(self._seed, f"shapes/{self.split}", index)
        if self._by_class:
            return self._prompts[index % self.num_classes][0], draws
        prompts = self._prompts[draws.below(len(self._prompts))]
        return prompts[draws.below(len(prompts))], draws


def _single_objects(image_size: int) -> list[Prompt]:
    """The prompts of all colours of all shapes, colours of a shape together."""
    words = vocabulary(image_size)
    colored = [*all_prompts(words, "colors", held_out=False), *all_prompts(words, "colors", held_out=True)]
    order = {(shape, color): i for i, (shape, color) in enumerate((s, c) for s in words.shapes for c in COLORS)}
    return sorted(colored, key=lambda prompt: order[prompt.include[0].shape, prompt.include[0].color or ""])
