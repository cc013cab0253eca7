"""The base of every configuration section."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, field_validator

from megavar.paths import expanded


class Rooted(str):
    """A text in a file with ``paths: {root: DIR}``: as a path, it is relative to ``root``."""

    root: str

    @classmethod
    def under(cls, root: str, tree: Any) -> Any:
        """``tree`` with all texts in it marked so."""
        if isinstance(tree, dict):
            return {key: cls.under(root, value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [cls.under(root, value) for value in tree]
        if type(tree) is not str:
            return tree
        text = cls(tree)
        text.root = root
        return text


def _from_root(value: Any) -> Any:
    if not isinstance(value, Rooted):
        return value
    text = expanded(value)
    shipped = text.startswith(("configs/", "slurm/")) and not (Path(value.root) / text).exists()
    return text if shipped else os.path.normpath(Path(value.root) / text)


PathText = Annotated[str, BeforeValidator(_from_root), AfterValidator(expanded)]
"""A path: ``~`` and ``$VAR`` stand for what they do in a shell."""


class Section(BaseModel):
    """A strict, immutable group of configuration keys.

    Unknown keys, values of the wrong type, numbers that are not finite and integers beyond 64 bits are errors. The
    string under each field is its documentation.
    Alternatives (for example data sources) are classes with a ``name: Literal[...]`` field, joined in a union with
    ``Field(discriminator="name")``.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        strict=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _fits_a_machine_word(cls, value: Any) -> Any:
        """YAML knows integers of any length; what counts steps, seeds a generator or sizes a tensor does not."""
        for number in value if isinstance(value, tuple | list) else (value,):
            if type(number) is int and not -(2**63) <= number < 2**63:
                raise ValueError(f"{str(number)[:12]}... has {len(str(number))} digits; at most 2**63 - 1 is possible")
        return value
