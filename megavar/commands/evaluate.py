"""``megavar evaluate``: score a trained generator or tokenizer, with baselines beside it."""

import argparse

from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.scoring import score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument("--untrained", action="store_true", help="score freshly initialized weights only")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    config = load_config(options.config, options.overrides)
    place = environment()
    topology.initialize(ParallelConfig(), place)
    score(config, place, untrained=options.untrained)
    topology.shutdown()
    return ExitCode.FINISHED
