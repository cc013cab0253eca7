"""When the tests of a file are through, nothing of their cases may have been left out."""

from collections.abc import Iterator

import pytest

from .cases import Family


@pytest.fixture(autouse=True)
def note_what_ran(request: pytest.FixtureRequest) -> None:
    for family in Family.built:
        test = request.function.__name__
        if family.module == request.module.__name__ and test in family.claims:
            family.ran.add((test, request.node.callspec.params["case"].name))


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_out(request: pytest.FixtureRequest) -> Iterator[None]:
    """A part of a file's tests (``-k``) is held to the cases whose tests are all among them."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        return
    problems = [p for f in Family.built if f.module == request.module.__name__ for p in f.problems()]
    assert not problems, "\n".join(problems)
