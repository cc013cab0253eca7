"""A trained model in the hands of another program."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from megavar.assembly import build_sampler
from megavar.conditions import Conditions, GivenClasses, PromptConditions, Unconditional
from megavar.config.generators.base import GeneratorChoice
from megavar.config.loading import decode
from megavar.config.root import Config
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.errors import ConfigError
from megavar.parallel import topology
from megavar.tokenizers.base import Tokenizer

Classes = Sequence[int | str] | int | str


@dataclass(frozen=True)
class Drawn:
    """B samples."""

    images: list[Image.Image]
    """RGB, decoded from ``tokens``."""
    tokens: np.ndarray
    """[B, L], or [B, L, C] where the token space has vectors."""
    asked: tuple[str, ...]
    """What each shows: the name of its class (its number, where names are unknown), its prompt, or ""."""


@dataclass(frozen=True)
class Model:
    """What :func:`megavar.load` returns."""

    config: Config
    """Of the run that trained it."""
    generator: nn.Module | None
    """Whole, on ``device``, in evaluation mode; None where the run trained a tokenizer."""
    tokenizer: Tokenizer
    """Frozen, on ``device``."""
    class_names: tuple[str, ...]
    """By label; empty where nobody wrote them down."""
    step: int
    """Steps that it was trained."""
    device: torch.device
    tokenizer_of: Callable[[TokenizerChoice], Tokenizer]
    """``tokenizer`` under another section: at other scales, where sampling asks for them."""

    def sample(
        self,
        classes: Classes | None = None,
        *,
        prompts: Sequence[str] | str | None = None,
        guidance: float | None = None,
        number: int | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Drawn:
        """Draw images. Sample i is a function of weights, settings, what it shows, and (seed, i).

        ``sample(number=N)`` are the first N samples of ``megavar sample``.

        Args:
            classes: labels or names, in turn; default: all.
            prompts: texts, in turn, for a generator that is asked by text.
            guidance: classifier-free guidance; like all settings by default the configuration's (``sampling``).
            number: how many; default: one of each that is asked for.
            seed: of the noise.
            settings: further keys of the section ``sampling``, such as ``top_k``.

        Raises:
            ConfigError: the model draws no images, or cannot be asked so.
        """
        if self.generator is None or self.config.generator is None:
            raise ConfigError(
                f"The run {self.config.run.name} trained a {self.config.recipe.trains}, which draws no images. Load a "
                f"generator; a tokenizer encodes and decodes (model.tokenizer)."
            )
        given = {"guidance": guidance, "seed": seed} | settings
        tree = self.config.sampling.model_dump(mode="json") | {key: v for key, v in given.items() if v is not None}
        sampling = decode(tree, type(self.config.sampling), "sample()")
        asked = self._asked(self.config.generator, classes, prompts)
        count = max(1, len(asked)) if number is None else number
        if count < 1:
            raise ConfigError(f"sample(): number={number} draws nothing. Give 1 or more.")
        config = self.config.model_copy(update={"sampling": sampling})
        topology.ensure_single(self.device)
        tokenizer = self.tokenizer_of(sampling.tokenizer_of(config.tokenizer))
        conditions = _conditions(self.config.generator, asked, count)
        sampler = build_sampler(config, self.generator, tokenizer, conditions, self.device)
        chunks = [sampler.draw(indices) for indices in torch.arange(count).split(sampling.chunk_size)]
        return Drawn(
            images=[Image.fromarray(image.permute(1, 2, 0).numpy()) for chunk in chunks for image in chunk.images],
            tokens=np.concatenate([chunk.arrays["tokens"] for chunk in chunks]),
            asked=tuple(self._name(asked[index % len(asked)]) if asked else "" for index in range(count)),
        )

    def _asked(
        self, generator: GeneratorChoice, classes: Classes | None, prompts: Sequence[str] | str | None
    ) -> list[int] | list[str]:
        """Labels or prompts, as the generator wants to be asked; nothing if it cannot be."""
        word = {"class": "classes", "text": "prompts", "none": "nothing"}[generator.condition]
        for name, given in (("classes", classes), ("prompts", prompts)):
            if given is not None and (name != word or (not isinstance(given, int) and len(given) == 0)):
                raise ConfigError(f"sample(): {name}={given!r}, but generator {generator.name!r} is asked by {word}.")
        if word == "prompts":
            if prompts is None:
                raise ConfigError(f"sample(): generator.name={generator.name} draws by text. Give prompts=[...].")
            return [prompts] if isinstance(prompts, str) else list(prompts)
        count = generator.class_count or 0
        if classes is None:
            return list(range(count))
        given = [classes] if isinstance(classes, str) or not isinstance(classes, Sequence) else classes
        return [self._label(name, count) for name in given]

    def _label(self, name: int | str, count: int) -> int:
        if isinstance(name, str) and name in self.class_names:
            return self.class_names.index(name)
        if not isinstance(name, str | bool) and name in range(count):
            return int(name)
        near = difflib.get_close_matches(str(name), self.class_names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = f"Names are {', '.join(self.class_names[:4])} ..., labels" if self.class_names else "Labels are"
        raise ConfigError(f"sample(): there is no class {name!r}.{hint} {known} 0 to {count - 1}.")

    def _name(self, asked: int | str) -> str:
        named = isinstance(asked, int) and asked < len(self.class_names)
        return self.class_names[int(asked)] if named else str(asked)


def _conditions(generator: GeneratorChoice, asked: list[int] | list[str], count: int) -> Conditions:
    if not asked:
        return Unconditional()
    in_turn = [asked[index % len(asked)] for index in range(count)]
    if generator.condition == "text":
        return PromptConditions("sample()", tuple(map(str, in_turn)))
    return GivenClasses(generator.class_count or 0, tuple(map(int, in_turn)))
