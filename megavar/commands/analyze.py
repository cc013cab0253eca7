"""``megavar analyze KIND RUN``: look at trained runs; data and pictures go into the first run's ``analysis`` folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megavar.analysis.base import Subject, write
from megavar.config.analyses.base import AnalysisChoice
from megavar.config.base import Section
from megavar.config.choice import resolve
from megavar.config.loading import apply_override, decode, load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import Environment, environment, limit_threads

SUBJECT = ("RUN", "run directory, or the YAML file of a run; LABEL=RUN gives it a name in pictures")
PREFIX = "analysis."


class _Asked(Section):
    """What the command line asks for."""

    analysis: AnalysisChoice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The kind stands before the run."""
    kinds = ", ".join(AnalysisChoice.alternatives())
    parser.add_argument("kind", metavar="KIND", help=f"one of {kinds}, or a plugin's; keys: {PREFIX}KEY=VALUE")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="RUN", help="another run to compare with; repeat"
    )
    parser.add_argument("--out", type=Path, help="where results go (default: analysis/ of the first run)")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    own = [word.removeprefix(PREFIX) for word in options.overrides if word.startswith(PREFIX)]
    shared = [word for word in options.overrides if not word.startswith(PREFIX)]
    choice = _choice(options.kind, own)
    place = environment()
    runs = [_subject(text, shared, place.device) for text in (options.config, *options.beside)]
    topology.initialize(ParallelConfig(), place)
    limit_threads(runs[0].config.train.cpu_threads)
    report = resolve(choice)(choice).look(runs)
    paths = write(report, choice, runs, options.out or runs[0].directory / "analysis")
    topology.shutdown()
    print(report.text)
    print("\n".join(map(str, paths)), flush=True)
    return ExitCode.FINISHED


def look(config: Config, words: Sequence[str], place: Environment) -> None:
    """An analysis of one run; ``words`` are those of ``megavar analyze`` without it: KIND analysis.KEY=VALUE ..."""
    kind, *own = words
    choice = _choice(kind, [word.removeprefix(PREFIX) for word in own])
    topology.initialize(ParallelConfig(), place)
    run = Subject(config, place.device)
    write(resolve(choice)(choice).look([run]), choice, [run], run.directory / "analysis")


def _subject(text: str, overrides: Sequence[str], device: torch.device) -> Subject:
    """``RUN`` or ``LABEL=RUN``."""
    label, _, path = text.rpartition("=")
    return Subject(load_config(path, overrides), device, label)


def _choice(kind: str, words: Sequence[str]) -> AnalysisChoice:
    tree: dict[str, Any] = {"kind": kind}
    for word in words:
        apply_override(tree, word)
    return decode({"analysis": tree}, _Asked, "the command line").analysis
