"""``megavar evaluate``: score a trained generator or tokenizer, with baselines beside it."""

import argparse
from pathlib import Path

from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError, ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.retention import score_understanding
from megavar.scoring import score
from megavar.training.checkpoint.store import list_checkpoints, step_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--untrained", action="store_true", help="score freshly initialized weights only")
    which.add_argument(
        "--checkpoint", metavar="STEP", help="score this one, such as step-00001000, or each that is kept: all"
    )
    parser.add_argument(
        "--understanding", action="store_true",
        help="score what the vision-language model that it began with still understands (evaluation.understanding)",
    )


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    config = load_config(options.config, options.overrides)
    if options.understanding and options.untrained:
        raise ConfigError("--understanding stands beside the original model anyway: leave --untrained out.")
    wanted = _wanted(Path(config.run.path), options.checkpoint)
    place = environment()
    topology.initialize(ParallelConfig(), place)
    for checkpoint in wanted:
        if options.understanding:
            score_understanding(config, place, checkpoint)
        else:
            score(config, place, untrained=options.untrained, checkpoint=checkpoint)
    topology.shutdown()
    return ExitCode.FINISHED


def _wanted(directory: Path, name: str | None) -> list[Path | None]:
    """Checkpoints of a run, the oldest first; None: the newest, whichever that is."""
    if name is None:
        return [None]
    folder = directory / "checkpoints"
    kept = sorted(list_checkpoints(folder), key=step_of)
    if name == "all" and kept:
        return [*kept]
    if folder / name in kept:
        return [folder / name]
    raise ConfigError(
        f"--checkpoint {name}: {directory} keeps no such checkpoint. It keeps: "
        f"{', '.join(one.name for one in kept) or 'none'}. train.checkpoint.keep_every says which are kept."
    )
