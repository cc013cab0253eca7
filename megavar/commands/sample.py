"""``megavar sample``: draw images from a trained generator, on any number of ranks."""

import argparse

from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.run_samples import describe, open_samples, write_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument(
        "--untrained", action="store_true", help="use the weights that the run begins with (random, or given ones)"
    )


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
