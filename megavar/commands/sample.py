"""``megavar sample``: draw images from a trained generator, on any number of ranks."""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from megavar.assembly import build_generator, load_tokenizer
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.recipe import MEPAConfig
from megavar.config.root import Config
from megavar.data.pixels import image_grid
from megavar.errors import ConfigError, ExitCode
from megavar.evaluation.chunks import ChunkStore
from megavar.generators.var import VAR
from megavar.parallel import topology
from megavar.parallel.environment import Environment, environment, limit_threads
from megavar.sampling.sampler import Sampler, open_store
from megavar.storage import sha256_of_file
from megavar.training.checkpoint.weights import find_checkpoint, load_weights

GRID_COLUMNS = 10
GRID_ROWS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument("--untrained", action="store_true", help="use freshly initialized weights (a baseline)")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    config = load_config(options.config, options.overrides)
    place = environment()
    topology.initialize(ParallelConfig(), place)
    samples = draw_samples(config, place, untrained=options.untrained)
    if place.rank == 0:
        print(f"{samples.store.count} images in {samples.store.directory}, overview in {samples.grid}", flush=True)
    topology.shutdown()
    return ExitCode.FINISHED


@dataclass(frozen=True)
class Samples:
    """A finished set of samples."""

    store: ChunkStore
    grid: Path
    checkpoint: dict[str, Any]
    """Identity of the weights."""


def draw_samples(config: Config, place: Environment, *, untrained: bool = False) -> Samples:
    """Draw ``sampling.number`` images in fixed chunks shared by all ranks; finished chunks are kept. Collective.

    Args:
        untrained: take the initial weights instead of the run's latest checkpoint.
    """
    if not isinstance(config.recipe, MEPAConfig):
        raise ConfigError(
            f"Run {config.run.name} trains a tokenizer (recipe {config.recipe.name!r}), which draws no images. Give "
            f"the configuration of a generator."
        )
    limit_threads(config.train.cpu_threads)
    run_directory = Path(config.run.path)
    generator = build_generator(config, None)
    assert isinstance(generator, VAR)
    identity: dict[str, Any] = {"checkpoint": "initial weights", "seed": config.train.seed}
    if not untrained:
        checkpoint, _ = find_checkpoint(run_directory, verify=False)  # loading verifies it
        load_weights(generator, checkpoint, "generator", ema=config.sampling.weights == "ema")
        identity = {"checkpoint": checkpoint.name, "manifest_sha256": sha256_of_file(checkpoint / "manifest.json")}
    identity["weights"] = config.sampling.weights
    tokenizer = load_tokenizer(config.tokenizer, config.recipe.tokenizer_weights, place.device)
    settings = json.dumps([config.sampling.model_dump(mode="json"), identity], sort_keys=True)
    name = "untrained" if untrained else str(identity["checkpoint"])
    directory = run_directory / "generated" / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    store = open_store(directory, config.sampling, identity)
    sampler = Sampler(generator.to(place.device), tokenizer, config.sampling, place.device)
    sampler.fill(store, place.rank, place.world_size)
    dist.barrier()
    grid = directory / "grid.png"
    if place.rank == 0:
        write_grid(grid, read_images(store, GRID_COLUMNS * GRID_ROWS)[0])
    return Samples(store, grid, identity)


def read_images(store: ChunkStore, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, H, W] and labels int64 [N] of the first ``limit`` samples (all by default)."""
    images, labels, count = [], [], 0
    for chunk in store.read_all():
        images.append(torch.from_numpy(chunk["images"]))
        labels.append(torch.from_numpy(chunk["labels"]))
        count += len(labels[-1])
        if limit is not None and count >= limit:
            break
    return torch.cat(images)[:limit], torch.cat(labels)[:limit]


def write_grid(path: Path, images: Tensor) -> None:
    """Write the images as one PNG, ten in a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(images, GRID_COLUMNS)).save(path)
