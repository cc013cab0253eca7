"""The kind of all image tokenizers."""

from typing import ClassVar

from megavar.config.choice import Choice
from megavar.config.token_space import TokenSpace


class TokenizerChoice(Choice):
    """A tokenizer and its sizes; :class:`megavar.tokenizers.base.Tokenizer` is what it configures."""

    package: ClassVar[str] = "megavar.config.tokenizers"
    default: ClassVar[str | None] = "multiscale_vq"

    name: str
    """Which architecture."""

    @property
    def space(self) -> TokenSpace:
        """Its tokens, as all others see them."""
        raise NotImplementedError(f"{type(self).__name__} must say its token space")
