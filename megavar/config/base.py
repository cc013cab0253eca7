"""The base of every configuration section."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A strict, immutable group of configuration keys.

    Unknown keys and values of the wrong type are errors. The string under each field is its documentation.
    Alternatives (for example data sources) are classes with a ``name: Literal[...]`` field, joined in a union with
    ``Field(discriminator="name")``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True,
                              protected_namespaces=())
