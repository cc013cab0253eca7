"""Fixtures of the tests of generators."""

from tests.transformer.conftest import one_process  # noqa: F401
