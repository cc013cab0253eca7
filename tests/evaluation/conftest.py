import pytest


@pytest.fixture(scope="session")
def extractor_directory(tmp_path_factory):
    """One cache of trained extractors for the session, so that each is trained once and never in the user's cache."""
    return tmp_path_factory.mktemp("extractors")
