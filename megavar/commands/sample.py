"""``megavar sample``: draw images from a trained generator, on any number of ranks."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image

from megavar.assembly import build_generator, describe_decoder, load_tokenizer
from megavar.chunks import ChunkStore
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.root import Config
from megavar.data.pixels import image_grid
from megavar.errors import ConfigError, ExitCode
from megavar.evaluation.results import class_histogram
from megavar.frozen import TOKENIZER, check_same, identify, identities
from megavar.generators.var import VAR
from megavar.parallel import topology
from megavar.parallel.environment import Environment, environment, limit_threads
from megavar.sampling.sampler import NextScaleSampler
from megavar.sampling.samples import Samples
from megavar.storage import atomic_file
from megavar.training.checkpoint.weights import find_checkpoint, load_weights

GRID_COLUMNS = 10
GRID_IMAGES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument("--untrained", action="store_true", help="use freshly initialized weights (a baseline)")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    config = load_config(options.config, options.overrides)
    place = environment()
    topology.initialize(ParallelConfig(), place)
    samples = open_samples(config, place, untrained=options.untrained)
    samples.fill(place)
    if place.rank == 0:
        print(f"{describe(samples)} in {samples.directory}, overview in {write_grid(samples)}", flush=True)
    topology.shutdown()
    return ExitCode.FINISHED


def open_samples(config: Config, place: Environment, *, untrained: bool = False) -> Samples:
    """The ``sampling.number`` samples that ``config`` describes.

    Those that were drawn before are kept, the others are drawn when they are read, or all at once by ``fill``. The
    directory is named after everything that decides the images.

    Args:
        untrained: take the initial weights instead of the run's latest checkpoint.
    """
    if not isinstance(config.recipe, MEPAConfig):
        raise ConfigError(
            f"Run {config.run.name} trains a tokenizer (recipe {config.recipe.name!r}), which draws no images. Give "
            f"the configuration of a generator."
        )
    limit_threads(config.train.cpu_threads)
    sampling, run_directory = config.sampling, Path(config.run.path)
    generator = build_generator(config, None)
    assert isinstance(generator, VAR)
    tokenizer = load_tokenizer(config.tokenizer, config.recipe.tokenizer_weights, place.device)
    of_tokenizer = identify(config.recipe.tokenizer_weights)
    model: dict[str, Any] = {"checkpoint": "initial weights", "seed": config.train.seed}
    if not untrained:
        checkpoint, manifest = find_checkpoint(run_directory, verify=False)  # loading verifies it
        check_same(identities(manifest.frozen), {TOKENIZER: of_tokenizer}, checkpoint, "train a generator with these.")
        load_weights(generator, checkpoint, "generator", ema=sampling.weights == "ema")
        model = identify(checkpoint).to_json()
    assert config.generator is not None
    model |= {
        "weights": sampling.weights,
        "precision": config.train.precision,
        "generator": config.generator.model_dump(mode="json"),
        "tokenizer": of_tokenizer.to_json(),
    }
    settings = sampling.model_dump(mode="json", exclude={"keep_images"})  # which changes no image
    digest = hashlib.sha256(json.dumps([settings, model], sort_keys=True).encode()).hexdigest()[:8]
    directory = run_directory / "generated" / f"{'untrained' if untrained else model['checkpoint']}-{digest}"
    identity = {"sampling": {k: v for k, v in settings.items() if k not in ("number", "chunk_size")}, "model": model}
    store = ChunkStore.open(directory, count=sampling.number, size=sampling.chunk_size, identity=identity)
    describe_decoder(directory, config, config.recipe.tokenizer_weights)
    sampler = NextScaleSampler(generator.to(place.device), tokenizer, sampling, place.device)
    keep = sampling.number if sampling.keep_images is None else sampling.keep_images
    return Samples(store, sampler.decoder, sampler=sampler, keep_images=keep)


def describe(samples: Samples) -> str:
    """``1003 images (10 classes, 100 or 101 of each)``."""
    if samples.labels is None:
        return f"{len(samples)} images"
    counts = class_histogram(samples.labels).values()
    each = " or ".join(map(str, sorted(set(counts))))
    return f"{len(samples)} images ({len(counts)} classes, {each} of each)"


def write_grid(samples: Samples) -> Path:
    """Write an overview of the first 100 samples, ten in a row, beside the chunks."""
    path = samples.directory / "grid.png"
    grid = image_grid(samples.read(0, min(GRID_IMAGES, len(samples))), GRID_COLUMNS)
    with atomic_file(path) as file:
        Image.fromarray(grid).save(file, "PNG")
    return path
