"""Checkpoints that several tests read: written once per session."""

from functools import cache
from pathlib import Path

import pytest
import torch

from megavar.config.checkpoint import CheckpointConfig
from megavar.training.checkpoint import Checkpointer, shards
from tests.checkpoint.layered import Layout, Run
from tests.distributed.harness import run_ranks

SAVED, FINAL = 2, 4
"""Steps at which the shared checkpoints are saved, and up to which runs continue."""


def train_and_save(layout: Layout, root: Path, steps: int = SAVED, **config) -> None:
    """On every rank: train ``steps`` steps and save."""
    run = Run(layout)
    with Checkpointer(root, CheckpointConfig(**config)) as checkpointer:
        for step in range(steps):
            run.step(step)
        checkpointer.save(steps, {"model": run.state}, {"step": steps})


def read_everything(root: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by key: weights, moments, averages and buffers."""
    path = root / f"step-{step:08d}"
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shards.index(path).items()}
    shards.read(path, tensors)
    return tensors


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Both hold the same tensors, bit for bit."""
    assert actual.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(actual[key], expected[key])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, first {different[:3]}"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function from a layout to the directory with its checkpoint of step ``SAVED``; do not write there."""

    @cache
    def save(layout: Layout, steps: int = SAVED) -> Path:
        root = tmp_path_factory.mktemp(f"{layout}-{steps}")
        run_ranks(layout.world, train_and_save, layout, root, steps)
        return root

    return save


@pytest.fixture(scope="session")
def reference(saved):
    """All tensors of a run of one process without ZeRO after ``FINAL`` steps."""
    return read_everything(saved(Layout(stage=0), FINAL), FINAL)
