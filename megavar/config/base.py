"""The base of every configuration section."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from megavar.paths import expanded

PathText = Annotated[str, AfterValidator(expanded)]
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
