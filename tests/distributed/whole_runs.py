"""Whole runs on forked ranks: trained to the end or to a sudden death, and drawn from."""

import os
import signal
from pathlib import Path
from typing import Any

from megavar import run_samples
from megavar.commands.train import train
from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.parallel import topology
from megavar.parallel.environment import environment
from tests.distributed.harness import run_ranks


def train_until(recipe: Any, config: Config, die_at: int | None = None) -> int:
    """Runs on every rank: train to the end, or to a sudden death while ``recipe`` prepares step ``die_at``."""
    prepare = recipe.prepare

    def deadly(self: Any, batch: Any, step: int) -> Any:
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(self, batch, step)

    recipe.prepare = deadly
    return int(train(config, environment()))


def draw(path: Path, directory: str) -> None:
    """Runs on every rank: draw the samples of a finished run into another directory."""
    place = environment()
    topology.initialize(load_config(path).parallel, place)
    run_samples.open_samples(load_config(path, [f"run.directory={directory}"]), place).fill(place)


def samples_of(finished: Path, ranks: int, directory: Path) -> Path:
    """The folder of samples that so many ranks draw from a finished run."""
    directory.mkdir()
    (directory / "checkpoints").symlink_to(finished.with_suffix("") / "checkpoints")
    run_ranks(ranks, draw, finished, str(directory))
    (drawn,) = (directory / "generated").iterdir()
    return drawn


def chunks(drawn: Path) -> dict[str, bytes]:
    """Files of stored samples."""
    return {file.name: file.read_bytes() for file in sorted(drawn.glob("*.npz"))}
