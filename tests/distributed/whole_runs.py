"""Whole runs on forked ranks: trained to the end or to a sudden death, and drawn from."""

import os
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from megavar import run_samples
from megavar.commands.train import train
from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.sampling.sampler import Drawn, Sampler
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


def draw(path: Path, directory: str, overrides: tuple[str, ...], die_at: int | None) -> None:
    """Runs on every rank: draw the samples of a finished run into another directory, or until a sudden death."""
    place = environment()
    config = load_config(path, [f"run.directory={directory}", *overrides])
    topology.initialize(config.parallel, place)
    alive = Sampler.draw

    def deadly(self: Sampler, indices: Tensor) -> Drawn:
        if die_at in indices.tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        return alive(self, indices)

    Sampler.draw = deadly  # type: ignore[method-assign]
    run_samples.open_samples(config, place).fill(place)


def samples_of(finished: Path, ranks: int, directory: Path, *overrides: str, die_at: int | None = None) -> Path:
    """The folder of samples that so many ranks draw from a finished run, in its file of configuration.

    Args:
        die_at: kill the rank that is about to draw this sample.
    """
    run = load_config(finished).run.path
    directory.mkdir(exist_ok=True)
    if not (directory / "checkpoints").exists():
        (directory / "checkpoints").symlink_to(Path(run) / "checkpoints")
    run_ranks(ranks, draw, finished, str(directory), overrides, die_at)
    (drawn,) = (directory / "generated").iterdir()
    return drawn


def chunks(drawn: Path) -> dict[str, bytes]:
    """Files of stored samples."""
    return {file.name: file.read_bytes() for file in sorted(drawn.glob("*.npz"))}
