"""Weight layouts: how a public checkpoint names, orders and shapes the tensors of one of our models.

A run, a checkpoint of ours and a ``.safetensors`` export speak of *logical tensors* (``parallel/logical.py``): our
names, full shapes, whatever the parallel layout. Public checkpoints speak other dialects. One class translates one
dialect, both ways, and the choice that it belongs to names it::

    class VARConfig(GeneratorChoice):
        weight_layouts = {"var": "megavar.generators.var.published:VARLayout"}

From then on ``tools/convert_checkpoint.py`` exports to it and imports from it, a run can start from such a file
(``train.initial_weights``), and a frozen network can be read from one.

Most dialects are ours under other names, with some tensors in another form: subclass :class:`NamedLayout` and write a
table of names and, for those tensors, how to take ours apart and put it together again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from megavar.errors import CheckpointError

Shape = tuple[int, ...]


class FolderPart(NamedTuple):
    """What goes into a Hugging Face folder in the place of what is there."""

    tensors: Mapping[str, Tensor]
    """By their names in the folder, perhaps without a prefix, which is then the same for all."""
    depth: int | None = None
    """Blocks of theirs that are kept; None: all."""


FolderPartOf = Callable[[Any, Mapping[str, Tensor], Path], FolderPart]
"""Of a choice, the logical tensors of its model, and the folder that the model began with."""


class WeightLayout(Protocol):
    """One public dialect of one model. Strict both ways: nothing is dropped, invented or reshaped to fit by chance."""

    def __init__(self, choice: Any, space: Any) -> None:
        """``choice``: the model's section of the configuration; ``space``: the tokenizer's ``TokenSpace``."""
        ...

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All logical tensors of a model as the public state dict, complete enough for the authors' own loader.

        Raises:
            CheckpointError: the dialect cannot express the configured model.
        """
        ...

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """A public state dict as logical tensors, floating-point ones in float32.

        Args:
            state: content of the file.
            expected: shape of every logical tensor (and persistent buffer) of the configured model by name.
            passed: the others of the model: what the file has of them, in whatever shape, is passed over.

        Returns:
            A tensor of the expected shape for every expected name. A layout may leave out a name only where it says
            so in its docstring; the model then keeps its own value.

        Raises:
            CheckpointError: names or shapes do not fit the configured model; the message lists them.
        """
        ...


class NamedLayout(ABC):
    """A dialect in which each of our tensors is one public tensor, or several, perhaps in another form.

    A subclass says :attr:`belongs_to` and :attr:`remedy` for messages and implements :meth:`names`; where forms
    differ also :meth:`split` and :meth:`join`, each other's inverse. Tensors that the authors store and we compute
    are :meth:`ignores` and :meth:`computed`.
    """

    belongs_to: ClassVar[str]
    """What a file of this layout is, with an article: "a VAR checkpoint"."""
    remedy: ClassVar[str]
    """A sentence: which keys of the configuration decide names and shapes."""

    def __init__(self, choice: Any, space: Any) -> None:
        self.choice, self.space = choice, space

    @abstractmethod
    def names(self, name: str) -> tuple[str, ...]:
        """The public tensors that hold our tensor ``name``; empty where the dialect has none."""

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Our tensor as the public tensors :meth:`names` lists. Also called with meta tensors, for their shapes."""
        return [value]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        (value,) = parts
        return value

    def made_with(self, path: Path) -> dict[str, Any] | None:
        """What a folder says of the model in it, by the keys of the model's section; None where it says nothing."""
        return None

    def ignores(self, published: str) -> bool:
        """Whether a public tensor carries nothing that our model needs."""
        return False

    def computed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ignored tensors, for a file that the authors' strict loader accepts; ``state`` is the rest of it."""
        return {}

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`WeightLayout.export`."""
        result: dict[str, Tensor] = {}
        for name, value in tensors.items():
            names = self.names(name)
            if not names:
                raise CheckpointError(
                    f"{name} has no counterpart in {self.belongs_to}. Export our own names instead "
                    f"(tools/convert_checkpoint.py to a .safetensors file)."
                )
            result.update(zip(names, self.split(name, value), strict=True))
        return result | self.computed(result)

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`WeightLayout.load`."""
        not_taken = {part for name in passed for part in self.names(name)}
        needed: dict[str, Shape] = {}
        for name, shape in expected.items():
            names = self.names(name)
            if names:
                parts = self.split(name, torch.empty(shape, device="meta"))
                needed |= {part: tuple(value.shape) for part, value in zip(names, parts, strict=True)}
            else:
                needed[name] = shape  # no file of this layout has it: let it be missing under our name
        given = {
            name: tuple(value.shape) for name, value in state.items()
            if not self.ignores(name) and name not in not_taken
        }  # fmt: skip
        problems = differences(needed, given)
        if problems:
            raise CheckpointError(
                f"The file is not {self.belongs_to} of this configuration: {'; '.join(problems)}. {self.remedy}"
            )
        result = {name: self.join(name, [_plain(state[part]) for part in self.names(name)]) for name in expected}
        for name, value in result.items():
            assert tuple(value.shape) == tuple(expected[name]), f"{type(self).__name__}.join({name!r})"
        return {name: value.contiguous() for name, value in result.items()}


def parts_first(rows: Tensor, heads: int, parts: int = 3) -> Tensor:
    """Rows of a fused projection, Megatron-core's [heads x parts x size, ...], as [parts x heads x size, ...]."""
    return rows.unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)


def heads_first(rows: Tensor, heads: int, parts: int = 3) -> Tensor:
    """Undo :func:`parts_first`."""
    return rows.unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(0, 2)


def _plain(value: Tensor) -> Tensor:
    return value.detach().float() if value.is_floating_point() else value.detach()


def differences(expected: Mapping[str, Shape], given: Mapping[str, Shape]) -> list[str]:
    """What keeps the tensors ``given`` (shapes by name) from being loaded as the ``expected`` ones, in words."""
    shapes = [
        f"{name} is {_in_words(given[name])} in the file and {_in_words(expected[name])} in the model"
        for name in expected.keys() & given.keys()
        if tuple(given[name]) != tuple(expected[name])
    ]
    return [
        *_some("keys missing from the file", expected.keys() - given.keys()),
        *_some("keys unknown to the model", given.keys() - expected.keys()),
        *_some("other shapes", shapes),
    ]


def _some(what: str, names: Iterable[str], shown: int = 4) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{what}: {', '.join(names[:shown])}{rest}"]


def _in_words(shape: Shape) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"
