from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # configurations name files relative to it
