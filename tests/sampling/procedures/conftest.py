"""Fixtures of the tests of sampling."""

from tests.transformer.conftest import one_process  # noqa: F401
