"""``megavar plan``: what a run costs, before it is submitted."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megavar.config.loading import apply_override, load_config, merge
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.errors import CheckpointError, ConfigError, DataError, ExitCode
from megavar.parallel.environment import Environment, device_name, environment
from megavar.paths import as_path, found
from megavar.planning.calibration import Calibration
from megavar.planning.hardware import ACCELERATORS, name_of_device
from megavar.planning.plan import DEFAULT_GPU, Plan, plan
from megavar.planning.report import format_plan, plan_values, yaml_lines
from megavar.storage import write_text_atomic

PATIENCE = 2.0
"""Seconds without a sign of life."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: those of this machine)")
    parser.add_argument("--gpu", choices=sorted(ACCELERATORS),
                        help=f"kind of GPU (default: this machine's, {DEFAULT_GPU} where it has none)")  # fmt: skip
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of one machine (default: 8)")
    parser.add_argument("--mfu", type=float, help="utilization while blocks compute, 0 to 1; default: an assumption")
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument("--calibrate", type=Path, metavar="FILE",
                          help="first measure the device at hand, in the place of assumptions, and keep it in FILE "
                          "(under torchrun with all-reduce over its ranks)")  # fmt: skip
    measured.add_argument("--calibration", type=Path, metavar="FILE", help="what --calibrate measured earlier")
    parser.add_argument("--images", type=int, help="length of the training data, where it cannot be opened here")
    parser.add_argument("--hours", type=float, help="time limit of one Slurm job: adds the number of jobs in the chain")
    parser.add_argument("--price", type=float, metavar="P", help="of one GPU for an hour: adds the price of the run")
    parser.add_argument("--write", type=as_path, metavar="FILE",
                        help="write the fastest layout that fits as a configuration: train FILE")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="leave with exit code 2 if the run does not fit as it is")
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
    gpus, gpu, note = _machine(options, calibration)
    predicted = plan(
        config,
        gpus,
        gpu,
        options.mfu,
        calibration=calibration,
        gpus_per_node=options.gpus_per_node,
        images=options.images,
        job_seconds=options.hours * 3600 if options.hours else None,
        progress=progress_line(),
    )
    predicted = replace(predicted, notes=(*note, *predicted.notes))
    text = json.dumps(plan_values(predicted), indent=2) if options.json else format_plan(predicted, options.price)
    print(text, file=sys.stdout)
    if options.write is not None:
        _write(options, predicted)
    if options.strict and not predicted.fits:
        print(f"{predicted.name} does not fit as it is configured (--strict).", file=sys.stderr)
        return ExitCode.CONFIGURATION
    return ExitCode.FINISHED


def _machine(options: argparse.Namespace, calibration: Calibration | None) -> tuple[int, str | None, tuple[str, ...]]:
    """Number and kind of GPUs, and what a person must know about them: as asked, or as this machine has them."""
    here = torch.cuda.device_count()
    gpu = options.gpu
    if gpu is None and calibration is None and here and options.gpus in (None, here):
        gpu = name_of_device(device_name())
    if options.gpus is not None:
        return options.gpus, gpu, ()
    if here:
        return here, gpu, ()
    kind = gpu or (DEFAULT_GPU if calibration is None else calibration.accelerator.name)
    return 1, gpu, (f"this machine has no GPU, so the plan is for one {kind}: say --gpus N --gpu KIND",)


def _write(options: argparse.Namespace, predicted: Plan) -> None:
    """Write what :func:`megavar.planning.report.yaml_lines` suggests, over the configuration as it was given.

    Raises:
        ConfigError: no layout fits.
    """
    if not predicted.better:
        raise ConfigError(f"No layout fits {predicted.gpus} GPUs, so {options.write} is not written.")
    tree: dict[str, Any] = {"base": str(found(options.config).absolute())}
    for override in options.overrides:
        apply_override(tree, override)
    tree = merge(tree, yaml.safe_load("\n".join(yaml_lines(predicted.better[0]))))
    words = f"# {predicted.name} on {predicted.gpus} x {predicted.workload.machine.gpu.name}, as megavar plan suggests"
    write_text_atomic(options.write, f"{words}\n{yaml.safe_dump(tree, sort_keys=False)}")
    print(f"wrote {options.write}: python -m megavar train {options.write}", file=sys.stderr)


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
