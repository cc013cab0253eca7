from pathlib import Path

import pytest

from tests.sources.originals import shard, write_class_folders


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="session")
def shards(originals, tmp_path_factory) -> Path:
    """Five shards of twelve images; never change them."""
    return shard(originals, tmp_path_factory.mktemp("shards") / "train")
