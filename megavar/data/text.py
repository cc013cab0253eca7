"""From captions to token ids, by the ``tokenizers`` library and files in the Hugging Face format.

    text = template with request in place of {request}, request with the caption in place of {caption}
    ids  = tokens of the text, cut to T (of a caption's end), padded on the right to T

An empty caption asks without one (``request_without``). Texts are encoded where samples are stacked: in the loader's
worker processes, and by the sampler for what samples are asked for.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavar.config.text import TextConfig
from megavar.errors import ConfigError, DataError, missing_package

_NO_PADDING_TOKEN = "<|endoftext|>"
"""Pads where the folder names no token (Qwen's)."""


class Text(NamedTuple):
    """Token ids of n texts."""

    ids: Tensor
    """int64 [n, T], padded on the right."""
    mask: Tensor
    """bool [n, T]: where a token is."""


def whole_text(config: TextConfig, caption: str) -> str:
    """Caption in request in template; "" asks without one."""
    request = config.request.replace("{caption}", caption) if caption else config.request_without
    return config.template.replace("{request}", request)


class TextEncoder:
    """A text tokenizer with its template."""

    def __init__(self, tokenizer: Any, config: TextConfig, padding: str | None = None, origin: str = "") -> None:
        """Wrap ``tokenizer``, a ``tokenizers.Tokenizer``.

        Args:
            padding: token that pads; default: Qwen's, or id 0 where it is none of the vocabulary.
            origin: where it comes from, for errors.

        Raises:
            ConfigError: the template alone is longer than a text may be.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.config, self.origin = tokenizer, config, origin or "the text tokenizer"
        named = tokenizer.token_to_id(padding or _NO_PADDING_TOKEN)
        self.padding: int = config.padding if config.padding is not None else named or 0
        self.empty = self.encode([""])
        """The text without caption, [1, T]."""

    @classmethod
    def read(cls, config: TextConfig) -> "TextEncoder":
        """The tokenizer in ``config.tokenizer``.

        Raises:
            ConfigError: no file is named, or the package is not installed.
            DataError: the file is missing or no tokenizer.
        """
        assert config.tokenizer is not None
        path = Path(config.tokenizer)
        tokenizers = require_tokenizers()
        if not path.is_file():
            raise DataError(
                f"data.text.tokenizer: {path} does not exist. Name a folder with a tokenizer.json, as Hugging Face's "
                f"transformers saves one (a folder with vocab.json and merges.txt alone: load and save it there once)."
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"data.text.tokenizer: {path} is damaged or no tokenizer ({error}).") from error
        return cls(tokenizer, config, _padding_of(path.with_name("tokenizer_config.json")), str(path))

    @property
    def size(self) -> int:
        """Ids are below it: special tokens included."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def id(self, token: str) -> int:
        """Id of a token, such as ``<img>``.

        Raises:
            ConfigError: there is none of that name.
        """
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ConfigError(f"{self.origin} has no token {token!r}: name one of its tokens, or another tokenizer.")
        return int(found)

    def encode(self, captions: Sequence[str]) -> Text:
        """Texts of n captions; "" asks without one."""
        rows = [self._ids(caption) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), self.config.length), self.padding)
        for row, tokens in zip(ids, rows):
            row[: len(tokens)] = torch.tensor(tokens)
        return Text(ids, torch.arange(self.config.length) < lengths[:, None])

    def _ids(self, caption: str) -> list[int]:
        while True:
            start = whole_text(self.config, "{caption}").find("{caption}")
            encoding = self.tokenizer.encode(whole_text(self.config, caption))
            surplus = len(encoding.ids) - self.config.length
            if surplus <= 0:
                return list(encoding.ids)
            ends = [begin for begin, end in encoding.offsets if end > start and begin < start + len(caption)]
            if not caption or surplus >= len(ends):
                raise ConfigError(
                    f"data.text.length={self.config.length}, but template and request alone have "
                    f"{len(encoding.ids) - len(ends) * bool(caption)} tokens. Raise it, or shorten data.text.template."
                )
            caption = caption[: min(max(ends[-surplus] - start, 1), len(caption) - 1)].rstrip()


def require_tokenizers() -> Any:
    """The package ``tokenizers``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise missing_package("tokenizers", "data.text") from error
    return tokenizers


def _padding_of(path: Path) -> str | None:
    """The padding token that a folder's ``tokenizer_config.json`` names."""
    if not path.is_file():
        return None
    try:
        named = json.loads(path.read_text()).get("pad_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}).") from error
    return named.get("content") if isinstance(named, dict) else named
