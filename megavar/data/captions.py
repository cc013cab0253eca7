"""Captions as they are stored: text, or a value in JSON."""

import json
from typing import Any, Literal

from megavar.data.source import DamagedSampleError

Member = Literal["txt", "json"]
"""In which member of a sample its caption is; ``json``: under a key."""


def decode_caption(content: bytes, name: str = "", key: str | None = None) -> str:
    """The caption in ``content``.

    Args:
        name: of the sample, for errors that nobody else gives one.
        key: where it stands if ``content`` is JSON; dots lead into nested objects. None: ``content`` is the text.

    Raises:
        DamagedSampleError: it is not UTF-8 or JSON, or holds no text under that key.
    """
    before = f"{name}: " if name else ""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DamagedSampleError(f"{before}its caption is not UTF-8 text ({error})") from error
    if key is None:
        return text
    try:
        value: Any = json.loads(text)
        for part in key.split("."):
            value = value[part]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedSampleError(f"{before}its JSON has no {key!r} ({type(error).__name__}: {error})") from error
    if not isinstance(value, str):
        raise DamagedSampleError(f"{before}{key!r} of its JSON is no text")
    return value
