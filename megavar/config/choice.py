"""Alternatives of a kind (generators, routers, suites ...): each is a class that is found because it exists.

A *kind* is an abstract subclass of :class:`Choice` that names the package of its alternatives. An *alternative* is a
subclass of the kind with a literal tag, in a file of its own in that package or in a module that a run's ``plugins``
name. A field annotated with the kind accepts every alternative that exists when a file is decoded::

    class RouterChoice(Choice):                       # the kind
        package = "megavar.config.routers"

    class ScaleRouter(RouterChoice):                  # an alternative, found by existing
        name: Literal["scale"] = "scale"
        implementation = "megavar.transformer.moe.routers.scale:ScaleRouter"

    class LayerConfig(Section):
        router: RouterChoice                          # {"name": "scale"} becomes a ScaleRouter

Nothing here imports torch: an implementation is a string that :func:`resolve` imports when it is built.
"""

import difflib
import functools
import importlib
import json
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler, SerializationInfo, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megavar.config.base import Section
from megavar.errors import ConfigError


def _serialize(value: "Choice", info: SerializationInfo) -> dict[str, Any]:
    selected: dict[str, Any] = {"include": info.include, "exclude": info.exclude}
    return value.model_dump(mode=info.mode, **selected)


class Choice(Section):
    """One alternative of a kind, or the kind itself; see the module."""

    discriminator: ClassVar[str] = "name"
    """The key that says which alternative is meant; a field with a ``Literal`` of one string in every alternative."""
    default: ClassVar[str | None] = None
    """The alternative that is meant where that key is missing; None: it must be given."""
    package: ClassVar[str] = ""
    """On a kind: where its alternatives are, one per module."""
    implementation: ClassVar[str] = ""
    """On an alternative: ``module:Class`` of what it configures."""
    weight_layouts: ClassVar[Mapping[str, str]] = {}
    """On an alternative: public checkpoint layouts that it can be loaded from and saved in, by name, each the
    ``module:Class`` of a :class:`megavar.weight_layout.WeightLayout`."""
    folder_part: ClassVar[str] = ""
    """On an alternative that is a part of models in Hugging Face folders: the ``module:function`` that says by which
    names, a :data:`megavar.weight_layout.FolderPartOf`."""

    @classmethod
    def tag(cls) -> str | None:
        """The value of the discriminator that stands for this alternative; None on a kind."""
        field = cls.model_fields.get(cls.discriminator)
        values = typing.get_args(field.annotation) if field is not None else ()
        return values[0] if len(values) == 1 else None

    @classmethod
    def alternatives(cls) -> dict[str, type[Self]]:
        """All alternatives of this kind that exist now, by tag, in the order of their tags."""
        _import_package(cls.package)
        found: dict[str, type[Self]] = {}
        for subclass in _subclasses(cls):
            tag = subclass.tag()
            if tag is None:
                continue
            if tag in found and found[tag].__module__ != subclass.__module__:
                raise TypeError(f"{found[tag]} and {subclass} are both called {cls.discriminator}={tag!r}: rename one")
            found[tag] = subclass
        return dict(sorted(found.items()))

    @classmethod
    def alternative(cls, values: Any) -> type[Self]:
        """The alternative that plain ``values`` of a section are meant for.

        Raises:
            PydanticCustomError: there is no such alternative; the message names the nearest one.
        """
        if not isinstance(values, Mapping):
            raise PydanticCustomError("choice", "it must hold keys and values")
        known = cls.alternatives()
        tag = values.get(cls.discriminator, cls.default)
        if isinstance(tag, str) and tag in known:
            return known[tag]
        names = ", ".join(map(repr, known)) or "(none exists)"
        alike = difflib.get_close_matches(str(tag), known, 1)
        what = "is missing" if tag is None else f"is {tag!r}"
        hint = f" Did you mean {alike[0]!r}?" if alike else ""
        raise PydanticCustomError(
            "choice_tag", "{key} {what}; it must be one of {names}.{hint}",
            {"key": cls.discriminator, "what": what, "names": names, "hint": hint},
        )  # fmt: skip

    @classmethod
    def make(cls, **values: Any) -> Self:
        """The alternative that ``values`` describe, from Python values."""
        return cls.alternative(values)(**values)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """An alternative validates itself; a kind looks for the alternative when a value comes."""
        if cls.tag() is not None:
            return handler(source)
        return core_schema.with_info_plain_validator_function(
            cls._choose, serialization=core_schema.plain_serializer_function_ser_schema(_serialize, info_arg=True)
        )

    @classmethod
    def _choose(cls, value: Any, info: ValidationInfo) -> "Choice":
        if isinstance(value, cls):
            return value
        chosen = cls.alternative(value)
        if info.mode == "json":  # strict decoding tells JSON's lists, which may become tuples, from Python's
            return chosen.model_validate_json(json.dumps(value))
        return chosen.model_validate(value)


def _subclasses(cls: type[Choice]) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@functools.cache
def _import_package(package: str) -> None:
    """Import all modules of ``package``, so that their classes exist."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def resolve(choice: Choice) -> Any:
    """The class that ``choice`` configures, which is imported now: by ``assembly`` and by layers that hold choices.

    Raises:
        ConfigError: its module cannot be imported or has no such class.
    """
    module, _, name = choice.implementation.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{choice.discriminator}={choice.tag()!r} is implemented by {choice.implementation!r}, which cannot be "
            f"imported ({error}). Correct `implementation` of {type(choice).__module__}.{type(choice).__name__}, or "
            f"install what the module imports."
        ) from error
