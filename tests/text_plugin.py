"""A generator that is asked for prompts, as a user's own module brings it (``plugins: [tests.text_plugin]``).

Its network is VAR's, which knows no text: the procedure draws tokens from noise and the length of the caption.
"""

from typing import ClassVar, Literal

import torch

from megavar.config.generators.var import VARConfig
from megavar.config.procedures.base import SamplingChoice


class TextVAR(VARConfig):
    """VAR, asked for by prompts."""

    name: Literal["text_var"] = "text_var"

    @property
    def condition(self) -> Literal["class", "text", "none"]:
        return "text"

    @property
    def class_count(self) -> int | None:
        return None


class CaptionLengths(SamplingChoice):
    """Token i is (length of the caption + noise) modulo the vocabulary."""

    implementation: ClassVar[str] = "tests.text_plugin:Lengths"
    procedure: Literal["caption_lengths"] = "caption_lengths"


class Lengths:
    """See :class:`CaptionLengths`."""

    def __init__(self, settings):
        self.settings = settings

    def draw(self, generator, tokenizer, condition, noise):
        lengths = torch.tensor([len(caption) for caption in condition.captions])
        uniform = noise.uniform(torch.arange(tokenizer.space.length))
        return (lengths[:, None] + (uniform * 3).long()) % tokenizer.space.vocabulary
