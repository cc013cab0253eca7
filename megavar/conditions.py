"""What samples show, by sample index: a class, a prompt, or nothing in particular.

Suites say what they ask for, sampling hands it to a generator, and neither knows the other. Sample i is a function of
(weights, settings, condition i, i), so :attr:`Conditions.identity` is part of what names a directory of samples.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from megavar.data.source import Source
from megavar.data.text import Text, TextEncoder

Kind = Literal["class", "text", "none"]


@dataclass(frozen=True)
class Condition:
    """What B samples show. A generator reads the field that it knows."""

    labels: Tensor
    """int64 [B]: classes; -1 where samples are not asked for by class."""
    captions: tuple[str, ...] | None = None
    """B texts; None where samples are not asked for by text."""
    classes: int = -1
    """The label that stands for "no class": the number of classes."""
    text: Text | None = None
    """Token ids of the captions and where they are tokens, [B, T]; None where ``data.text`` is not set."""
    empty_text: Text | None = None
    """The same of no caption, [1, T]."""

    def __len__(self) -> int:
        return len(self.labels)

    def dropped(self) -> "Condition":
        """The same number of samples that show anything: "no class", empty captions."""
        empty = None if self.captions is None else ("",) * len(self)
        labels = torch.full_like(self.labels, self.classes)
        if self.empty_text is None:
            return replace(self, labels=labels, captions=empty)
        text = Text(*(rows.expand(len(self), -1) for rows in self.empty_text))
        return replace(self, labels=labels, captions=empty, text=text)

    def with_dropped(self) -> "Condition":
        """2B samples: these, then as many that show anything (for classifier-free guidance)."""
        free = self.dropped()
        captions = None if self.captions is None or free.captions is None else self.captions + free.captions
        labels = torch.cat([self.labels, free.labels])
        if self.text is None or free.text is None:
            return replace(self, labels=labels, captions=captions)
        text = Text(*(torch.cat(rows) for rows in zip(self.text, free.text)))
        return replace(self, labels=labels, captions=captions, text=text)

    def encoded(self, encoder: TextEncoder) -> "Condition":
        """The same samples with the token ids of their captions."""
        if self.captions is None:
            return self
        texts = (encoder.encode(self.captions), encoder.empty)
        text, empty = (Text(*(rows.to(self.labels.device) for rows in one)) for one in texts)
        return replace(self, text=text, empty_text=empty)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a chunk stores beside the tokens: int64 ``labels`` or unicode ``captions``, one per sample."""
        if self.captions is not None:
            return {"captions": np.array(self.captions)}
        return {"labels": self.labels.cpu().numpy()} if self.classes >= 0 else {}


class Conditions(Protocol):
    """The conditions of all samples."""

    kind: ClassVar[Kind]
    """What a generator must be able to draw."""

    @property
    def classes(self) -> int | None:
        """Number of classes that are asked for; None where samples are not asked for by class."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these conditions from others: plain JSON values."""
        ...

    @property
    def count(self) -> int | None:
        """Number of samples that have a condition; None if all have."""
        ...

    def describe(self) -> str:
        """What sample i shows, in words: a clause."""
        ...

    def at(self, indices: Tensor) -> Condition:
        """The conditions of samples ``indices`` (int64 [B])."""
        ...


@dataclass(frozen=True)
class ClassConditions:
    """Sample i shows class i modulo the number of classes."""

    classes: int
    kind: ClassVar[Kind] = "class"
    count: ClassVar[int | None] = None

    @property
    def identity(self) -> dict[str, Any]:
        """Kind and number."""
        return {"kind": self.kind, "classes": self.classes}

    def describe(self) -> str:
        """For result files."""
        return f"class i modulo {self.classes}"

    def at(self, indices: Tensor) -> Condition:
        """Classes in turn."""
        return Condition(indices % self.classes, classes=self.classes)


@dataclass(frozen=True)
class GivenClasses:
    """Sample i shows class ``labels[i]``."""

    classes: int
    labels: tuple[int, ...]
    kind: ClassVar[Kind] = "class"

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, number and labels."""
        return {"kind": self.kind, "classes": self.classes, "labels": list(self.labels)}

    @property
    def count(self) -> int | None:
        """As many as there are labels."""
        return len(self.labels)

    def describe(self) -> str:
        """For result files."""
        return "given classes"

    def at(self, indices: Tensor) -> Condition:
        """The given classes."""
        return Condition(torch.tensor(self.labels, device=indices.device)[indices], classes=self.classes)


@dataclass(frozen=True)
class PromptConditions:
    """Samples ``p * per_prompt`` to ``(p + 1) * per_prompt - 1`` show prompt p."""

    origin: str
    """Whose prompts they are, for example a suite's name."""
    prompts: tuple[str, ...]
    per_prompt: int = 1
    kind: ClassVar[Kind] = "text"
    classes: ClassVar[int | None] = None

    @property
    def identity(self) -> dict[str, Any]:
        """Origin, number and content."""
        content = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {
            "kind": self.kind,
            "origin": self.origin,
            "prompts": len(self.prompts),
            "per_prompt": self.per_prompt,
            "sha256": content,
        }

    @property
    def count(self) -> int | None:
        """Every prompt is asked for ``per_prompt`` times."""
        return len(self.prompts) * self.per_prompt

    def describe(self) -> str:
        """For result files."""
        return f"prompt i // {self.per_prompt} of {self.origin}"

    def at(self, indices: Tensor) -> Condition:
        """Prompts, each ``per_prompt`` times."""
        return _texts(indices, [self.prompts[index // self.per_prompt] for index in indices.tolist()])


@dataclass(frozen=True)
class SourceCaptions:
    """Sample i has the caption of sample i of a text-image source, from the beginning again after the last."""

    source: Source
    kind: ClassVar[Kind] = "text"
    classes: ClassVar[int | None] = None
    count: ClassVar[int | None] = None

    @property
    def identity(self) -> dict[str, Any]:
        """The source's fingerprint."""
        return {"kind": self.kind, "origin": f"captions of {self.source.split}", "sha256": self.source.fingerprint}

    def describe(self) -> str:
        """For result files."""
        return f"caption of sample i of the {self.source.split} data"

    def at(self, indices: Tensor) -> Condition:
        """Captions as stored; "" where a sample has none."""
        samples = (self.source.read(index % len(self.source)) for index in indices.tolist())
        return _texts(indices, [sample.caption or "" for sample in samples])


@dataclass(frozen=True)
class Unconditional:
    """Samples differ by their noise only."""

    kind: ClassVar[Kind] = "none"
    classes: ClassVar[int | None] = None
    count: ClassVar[int | None] = None

    @property
    def identity(self) -> dict[str, Any]:
        """Kind."""
        return {"kind": self.kind}

    def describe(self) -> str:
        """For result files."""
        return "none"

    def at(self, indices: Tensor) -> Condition:
        """Nothing."""
        return Condition(torch.full_like(indices, -1))


def _texts(indices: Tensor, captions: Sequence[str]) -> Condition:
    return Condition(torch.full_like(indices, -1), tuple(captions))
