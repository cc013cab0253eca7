"""Scores of a run: a generator's samples by the configured suite, or a tokenizer's reconstructions."""

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavar.assembly import load_tokenizer, require_generator_recipe, resolve
from megavar.config.root import Config
from megavar.errors import ConfigError, check_all
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.reconstruction import ROUNDING
from megavar.evaluation.reconstruction_suite import check_reconstruction, on_bytes, score_tokenizer
from megavar.evaluation.results import Result, class_histogram, write_result
from megavar.evaluation.table import format_table, thresholds_missed
from megavar.frozen import identify
from megavar.parallel.environment import Environment
from megavar.run_samples import check_conditions, class_names, default_conditions, describe, open_samples, write_grid
from megavar.sampling.samples import Samples
from megavar.tokenizers.base import Tokenizer
from megavar.training.checkpoint.weights import find_checkpoint

FEWEST = 16
"""Samples of which statistics say anything at all."""


def check(config: Config) -> None:
    """Refuse what cannot be scored in the end, before a run is trained or sampled.

    Raises:
        ConfigError: the suite does not fit the data or the generator.
        CheckpointError, DataError: its files are missing or of another kind. All problems are in one error.
    """
    _refuse_teacher(config)
    if config.recipe.trains == "generator":
        suite: Suite[Any] = resolve(config.evaluation.suite)(config.evaluation.suite, config.data)
        check_all(suite.check, functools.partial(_check_asked, config, suite))
    else:
        check_reconstruction(config.evaluation.reconstruction, config.data)


def score(
    config: Config, place: Environment, *, untrained: bool = False, checkpoint: Path | None = None
) -> dict[str, float]:
    """Score a checkpoint of the run (default: the latest), print a table, write a result file. Collective; rank 0 gets
    the scores.
    """
    _refuse_teacher(config)
    if config.recipe.trains == "generator":
        return _score_generator(config, place, untrained, checkpoint)
    return _score_tokenizer(config, place, checkpoint)


def _refuse_teacher(config: Config) -> None:
    if config.recipe.trains == "teacher":
        raise ConfigError(
            f"Run {config.run.name} trains a teacher (recipe {config.recipe.name!r}), for which there are no scores. "
            f"Score the runs that it guides; set evaluation.after_training=false here."
        )


def _checked_suite(config: Config) -> Suite[Any]:
    suite: Suite[Any] = resolve(config.evaluation.suite)(config.evaluation.suite, config.data)
    suite.check()
    _check_asked(config, suite)
    return suite


def _check_asked(config: Config, suite: Suite[Any]) -> None:
    """Whether the generator can be asked for what the suite wants, or at all."""
    asked, drawn = suite.conditions() or default_conditions(config), _with_sampling(config, suite)
    check_conditions(drawn, asked, f"evaluation.suite.name={config.evaluation.suite.name}")
    if asked.count is None and drawn.sampling.number < FEWEST:
        raise ConfigError(
            f"sampling.number={drawn.sampling.number} images are too few to be scored. Draw {FEWEST} or more: "
            f"sampling.number={FEWEST}."
        )


def _score_generator(config: Config, place: Environment, untrained: bool, checkpoint: Path | None) -> dict[str, float]:
    """Draw the images that the suite asks for and score them beside its baselines."""
    suite = _checked_suite(config)
    config = _with_sampling(config, suite)
    conditions = suite.conditions() or default_conditions(config)
    name = "untrained model" if untrained else config.run.name
    drawn: dict[str, Samples] = {}
    for row in dict.fromkeys((name, *(["untrained model"] if suite.untrained_beside else []))):
        fresh = row == "untrained model"
        samples = open_samples(config, place, conditions=conditions, untrained=fresh, checkpoint=checkpoint)
        suite.take_features(samples, place, samples.directory)
        samples.fill(place)
        drawn[row] = samples
    if place.rank != 0:
        return {}
    found = {row: suite.score(samples, place.device, samples.directory) for row, samples in drawn.items()}
    rows = {row: scores.metrics for row, scores in found.items()}
    rows |= suite.baselines(config.sampling.number) | suite.ceiling(_through_tokenizer(config, place))
    samples, scores = drawn[name], found[name]
    result = Result(
        suite=suite.label,
        metrics=scores.metrics,
        count=len(samples),
        class_histogram=class_histogram(samples.labels) if samples.labels is not None else {},
        rounding=config.sampling.rounding,
        order=f"image i has condition i: {conditions.describe()}",
        extractor=scores.extractor,
        reference=scores.reference,
        sampler=config.sampling.model_dump(mode="json", exclude=set(config.sampling.changes_no_sample))
        | {"conditions": conditions.identity},
        checkpoint=samples.identity["model"],
        notes=scores.notes,
    )
    label = result.suite.replace("/", "-")
    path = Path(config.run.path) / f"scores-{label}-{samples.directory.name}.json"
    report_scores(name, rows, scores, result, path)
    grid = write_grid(samples, class_names(config))
    print(f"{describe(samples)} in {samples.directory}, overview in {grid}", flush=True)
    return scores.metrics


def _with_sampling(config: Config, suite: Suite[Any]) -> Config:
    """``config`` with the number of samples that the suite asks for, and the images of it that are worth keeping."""
    asked, sampling = suite.conditions(), config.sampling
    number = sampling.number if asked is None or asked.count is None else asked.count
    keep = suite.images_kept if sampling.keep_images is None else sampling.keep_images
    return config.model_copy(update={"sampling": sampling.model_copy(update={"number": number, "keep_images": keep})})


def _through_tokenizer(config: Config, place: Environment) -> Callable[[Tensor], Tensor]:
    """What a generator's tokenizer makes of images, uint8 [B, 3, S, S]; it is loaded when there are any."""

    @functools.cache
    def tokenizer() -> Tokenizer:
        weights = require_generator_recipe(config).tokenizer_weights
        found: Tokenizer = load_tokenizer(config.sampling.tokenizer_of(config.tokenizer), weights, place.device)
        return found

    return on_bytes(lambda images: _reconstruct(tokenizer(), images), place.device, config.sampling.rounding)


@torch.no_grad()
def _reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    return tokenizer.decode(tokenizer.tokens(tokenizer.encode(images)))


def _score_tokenizer(config: Config, place: Environment, named: Path | None) -> dict[str, float]:
    """Reconstruct the test images and compare."""
    directory = Path(config.run.path)
    checkpoint, _ = find_checkpoint(named or directory, verify=False)  # loading verifies it
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
    report_scores(config.run.name, {config.run.name: scores.metrics}, scores, result, path)
    return scores.metrics


def report_scores(name: str, rows: dict[str, dict[str, float]], scores: Scores, result: Result, path: Path) -> None:
    """Write the file of ``result`` and print it: what is scored is the row ``name``, the others are baselines."""
    missed = thresholds_missed(rows[name], scores.table)
    baselines = {row: dict(metrics) for row, metrics in rows.items() if row != name}
    write_result(path, replace(result, baselines=baselines, table=list(map(asdict, scores.table)), missed=missed))
    if scores.metrics:
        print(format_table(rows, scores.table or None))
    if any(metric.threshold is not None for metric in scores.table):
        print(f"\n{name}: " + (f"misses {', '.join(missed)}" if missed else "meets every threshold"))
    for note in scores.notes:
        print(f"note: {note}")
    print(f"scores: {path}", flush=True)
