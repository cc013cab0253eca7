"""``megavar evaluate``: score a trained generator or tokenizer, with baselines beside it."""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavar.assembly import load_tokenizer
from megavar.commands.sample import GRID_IMAGES, describe, open_samples, write_grid
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.root import Config
from megavar.config.suites.adm import ADMSuite
from megavar.config.suites.dpg import DPGSuite
from megavar.config.suites.geneval import GenEvalSuite
from megavar.errors import ExitCode
from megavar.evaluation import suites
from megavar.evaluation.reconstruction import ROUNDING
from megavar.evaluation.reconstruction_suite import score_tokenizer
from megavar.evaluation.results import Result, class_histogram, write_result
from megavar.evaluation.suites import Scores
from megavar.evaluation.table import format_table, thresholds_missed
from megavar.frozen import identify
from megavar.parallel import topology
from megavar.parallel.environment import Environment, environment
from megavar.sampling.samples import Samples
from megavar.tokenizers.base import Tokenizer
from megavar.training.checkpoint.weights import find_checkpoint

ORDER = "index i has class i modulo the number of classes"


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


def score(config: Config, place: Environment, *, untrained: bool = False) -> dict[str, float]:
    """Score the run's latest checkpoint, print a table, write a result file. Collective; rank 0 gets the scores."""
    if isinstance(config.recipe, MEPAConfig):
        return _score_generator(config, place, untrained)
    return _score_tokenizer(config, place)


def _score_generator(config: Config, place: Environment, untrained: bool) -> dict[str, float]:
    """Draw the images that the suite wants and score them beside its baselines."""
    suite = config.evaluation.suite
    suites.check_suite(suite, config.data)
    config = _with_sampling(config)
    name = "untrained model" if untrained else config.run.name
    # 50,000 images are no table row, and official scorers run elsewhere
    compared = [] if isinstance(suite, (ADMSuite, GenEvalSuite, DPGSuite)) else ["untrained model"]
    drawn: dict[str, Samples] = {}
    for row in dict.fromkeys((name, *compared)):
        drawn[row] = open_samples(config, place, untrained=row == "untrained model")
        suites.take_features(suite, drawn[row], place, work_directory=drawn[row].directory)
        drawn[row].fill(place)
    if place.rank != 0:
        return {}
    found = {
        row: suites.score_images(suite, config.data, samples, place.device, work_directory=samples.directory)
        for row, samples in drawn.items()
    }
    rows = {row: scores.metrics for row, scores in found.items()}
    rows |= suites.suite_baselines(suite, config.data, config.sampling.number)
    samples, scores = drawn[name], found[name]
    result = Result(
        suite=suites.suite_label(suite),
        metrics=scores.metrics,
        count=len(samples),
        class_histogram=class_histogram(samples.labels) if samples.labels is not None else {},
        rounding=config.sampling.rounding,
        order=ORDER,
        extractor=scores.extractor,
        reference=scores.reference,
        sampler=config.sampling.model_dump(mode="json", exclude={"keep_images"}),
        checkpoint=samples.identity["model"],
        notes=scores.notes,
    )
    label = result.suite.replace("/", "-")
    path = Path(config.run.path) / f"scores-{label}-{samples.directory.name}.json"
    _report(name, rows, scores, result, path)
    print(f"{describe(samples)} in {samples.directory}, overview in {write_grid(samples)}", flush=True)
    return scores.metrics


def _with_sampling(config: Config) -> Config:
    """``config`` with the number of samples that the suite wants, and the images of it that are worth keeping."""
    suite, sampling = config.evaluation.suite, config.sampling
    keep = sampling.keep_images
    if keep is None and isinstance(suite, ADMSuite):
        keep = GRID_IMAGES
    number = suites.image_count(suite, config.data, config.evaluation.samples)
    return config.model_copy(
        update={"sampling": sampling.model_copy(update={"number": number, "keep_images": keep})}
    )


@torch.no_grad()
def _reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    return tokenizer.decode(tokenizer.tokens(tokenizer.encode(images)))


def _score_tokenizer(config: Config, place: Environment) -> dict[str, float]:
    """Reconstruct the test images and compare."""
    directory = Path(config.run.path)
    checkpoint, _ = find_checkpoint(directory, verify=False)  # loading verifies it
    tokenizer = load_tokenizer(config.tokenizer, str(checkpoint), place.device)
    identity: dict[str, Any] = identify(checkpoint).to_json()
    scores = score_tokenizer(
        config.evaluation.reconstruction,
        config.data,
        functools.partial(_reconstruct, tokenizer),
        place,
        work_directory=directory / "reconstructed" / checkpoint.name,
        identity=identity,
    )
    if scores is None:
        return {}
    settings = config.evaluation.reconstruction
    result = Result(
        suite=f"reconstruction/{settings.protocol}",
        metrics=scores.metrics,
        count=int(scores.reference["count"]),
        class_histogram={},
        rounding=ROUNDING[settings.protocol],
        order="the source's",
        extractor=scores.extractor,
        reference=scores.reference,
        sampler=settings.model_dump(mode="json", include={"protocol", "model_size", "chunk_size"}),
        checkpoint=identity,
        notes=scores.notes,
    )
    path = directory / f"scores-reconstruction-{settings.protocol}-{checkpoint.name}.json"
    _report(config.run.name, {config.run.name: scores.metrics}, scores, result, path)
    return scores.metrics


def _report(name: str, rows: dict[str, dict[str, float]], scores: Scores, result: Result, path: Path) -> None:
    write_result(path, result)
    if scores.metrics:
        print(format_table(rows, scores.table or None))
    missed = thresholds_missed(rows[name], scores.table)
    if any(metric.threshold is not None for metric in scores.table):
        print(f"\n{name}: " + (f"misses {', '.join(missed)}" if missed else "meets every threshold"))
    for note in scores.notes:
        print(f"note: {note}")
    print(f"scores: {path}", flush=True)
