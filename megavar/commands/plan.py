"""``megavar plan``: what a run costs, before it is submitted."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.errors import CheckpointError, DataError, ExitCode
from megavar.parallel.environment import Environment, environment
from megavar.planning.calibration import Calibration
from megavar.planning.hardware import ACCELERATORS
from megavar.planning.plan import DEFAULT_GPU, plan
from megavar.planning.report import format_plan, plan_values

PATIENCE = 2.0
"""Seconds without a sign of life."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", choices=sorted(ACCELERATORS), help=f"kind of GPU (default: {DEFAULT_GPU})")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of one machine (default: 8)")
    parser.add_argument("--mfu", type=float, help="utilization while blocks compute, 0 to 1; default: an assumption")
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument("--calibrate", type=Path, metavar="FILE",
                          help="first measure the device at hand, in the place of assumptions, and keep it in FILE "
                          "(under torchrun with all-reduce over its ranks)")  # fmt: skip
    measured.add_argument("--calibration", type=Path, metavar="FILE", help="what --calibrate measured earlier")
    parser.add_argument("--images", type=int, help="length of the training data, where it cannot be opened here")
    parser.add_argument("--hours", type=float, help="time limit of one Slurm job: adds the number of jobs in the chain")
    parser.add_argument("--json", action="store_true", help="print plain values for programs")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    config = load_config(options.config, options.overrides)
    calibration = None
    if options.calibration is not None:
        calibration = Calibration.load(options.calibration)
    if options.calibrate is not None:
        place = environment()
        calibration = _calibrate(config, place, options.calibrate)
        if place.rank > 0:
            return ExitCode.FINISHED
    if config.evaluation.after_training:
        _check_scoring(config)
    predicted = plan(
        config,
        options.gpus,
        options.gpu,
        options.mfu,
        calibration=calibration,
        gpus_per_node=options.gpus_per_node,
        images=options.images,
        job_seconds=options.hours * 3600 if options.hours else None,
        progress=progress_line(),
    )
    text = json.dumps(plan_values(predicted), indent=2) if options.json else format_plan(predicted)
    print(text, file=sys.stdout)
    return ExitCode.FINISHED


def _calibrate(config: Config, place: Environment, path: Path) -> Calibration:
    """Measure on all ranks; the first one keeps it."""
    from megavar.parallel import topology
    from megavar.planning.calibrate import calibrate

    topology.initialize(ParallelConfig(), place)
    try:
        say = (lambda text: print(f"measuring: {text}", file=sys.stderr, flush=True)) if place.rank == 0 else None
        calibration = calibrate(config, place.device, *(() if say is None else (say,)))
    finally:
        topology.shutdown()
    if place.rank == 0:
        calibration.save(path)
        print(f"wrote {path}", file=sys.stderr, flush=True)
    return calibration


def _check_scoring(config: Config) -> None:
    """What could not be scored after training is said now. Files may lie on another machine than this one.

    Raises:
        ConfigError: the suite does not fit.
    """
    from megavar.scoring import check  # scikit-learn and more

    try:
        check(config)
    except (CheckpointError, DataError) as error:
        print(f"Scores after training (evaluation): on this machine {error}", file=sys.stderr, flush=True)


def progress_line() -> Callable[[int, int], None]:
    """Shows on standard error how far measuring is, where it takes longer than :data:`PATIENCE`."""
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if time.monotonic() - began > PATIENCE:
            end = "\n" if done == total else ""
            print(f"\rmeasuring the model: {done} of {total} ranks", end=end, file=sys.stderr, flush=True)

    return show
