"""What a hostile writer leaves, and a place that must stay untouched."""

import os
from pathlib import Path

import pytest

from tests.sources.originals import shard, write_class_folders


class Payload:
    """Unpickling it runs a command of the writer's choice."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


class Outside:
    """A folder beside what is opened; it holds one file, which must stay as it is."""

    def __init__(self, root: Path) -> None:
        self.root = root / "outside"
        self.root.mkdir()
        self.file = self.root / "precious"
        self.file.write_text("precious")
        self.canary = self.root / "ran"

    @property
    def payload(self) -> Payload:
        return Payload(self.canary)

    def assert_untouched(self) -> None:
        assert not self.canary.exists(), "code of the hostile writer ran"
        assert [path.name for path in self.root.iterdir()] == ["precious"]
        assert self.file.read_text() == "precious"


@pytest.fixture
def outside(tmp_path):
    """Untouched when the test ends, whatever it did."""
    place = Outside(tmp_path)
    yield place
    place.assert_untouched()


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="session")
def shards(originals, tmp_path_factory) -> Path:
    """Five shards of twelve images; never change them."""
    return shard(originals, tmp_path_factory.mktemp("shards") / "train")
