"""Fixtures of the tests of recipes."""

import pytest

from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.distributed.curves import tokenizer


@pytest.fixture(scope="module")
def pyramid() -> MultiScaleVQ:
    """A small tokenizer of scales."""
    return tokenizer()
