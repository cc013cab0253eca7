"""What a vision-language model still understands after a run trained a part of it (VGT Table 1).

original  = the folder that the run began with
tuned     = a copy of it with the run's language model or vision encoder in the place of its own
retained  = 100 score(tuned) / score(original)
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavar.assembly import resolve, trained_choice, write_into_folder
from megavar.config.root import Config
from megavar.config.understanding import UnderstandingConfig
from megavar.errors import ConfigError
from megavar.evaluation.base import Scores
from megavar.evaluation.results import Result
from megavar.evaluation.table import Metric
from megavar.evaluation.understanding.answering import Answers
from megavar.evaluation.understanding.model import VisionLanguageModel, check_folder
from megavar.evaluation.understanding.questions import Benchmark
from megavar.frozen import Identity, identify
from megavar.parallel.environment import Environment
from megavar.scoring import report_scores
from megavar.storage import write_text_atomic
from megavar.training.checkpoint.weights import HEADS, find_checkpoint, read_weights

ORIGINAL = "original"
RETAINED = "retained/"
"""Before the name of a metric: percent of the original's."""


def score_understanding(config: Config, place: Environment, checkpoint: Path | None = None) -> dict[str, float]:
    """Score a checkpoint of the run (default: the latest) inside its vision-language model, and the original beside it;
    print a table, write a result file. Collective; rank 0 gets the scores.

    Raises:
        ConfigError: ``evaluation.understanding`` is not set, or what the run trains is no part of such a model.
        CheckpointError, DataError: the model or benchmarks are missing or of another kind.
    """
    settings = config.evaluation.understanding
    if settings is None:
        raise ConfigError("evaluate --understanding needs the section evaluation.understanding: model and benchmarks.")
    check_folder(Path(settings.model))
    benchmarks = read_benchmarks(settings)
    directory = Path(config.run.path)
    checkpoint, _ = find_checkpoint(checkpoint or directory, verify=False)  # reading verifies it
    work = directory / "understanding"
    tuned = work / checkpoint.name / "model"
    identities: dict[str, Identity] = {}
    if place.rank == 0:  # gigabytes are read by one rank, once
        identities[ORIGINAL] = identify(settings.model)
        write_tuned(config, checkpoint, Path(settings.model), tuned, identities[ORIGINAL])
        identities[config.run.name] = identify(tuned)
    rows = {
        name: _scores(settings, benchmarks, folder, identities.get(name), work, place)
        for name, folder in ((config.run.name, tuned), (ORIGINAL, Path(settings.model)))
    }
    if place.rank != 0:
        return {}
    metrics, original = rows[config.run.name], rows[ORIGINAL]
    table = [metric for benchmark in benchmarks for metric in benchmark.table if metric.key in metrics]
    kept = {f"{RETAINED}{one.key}": 100 * metrics[one.key] / original[one.key] for one in table if original[one.key]}
    rows[config.run.name] = metrics | kept
    scores = Scores(
        rows[config.run.name],
        (*table, *(Metric(key, "higher") for key in kept)),
        {"name": Path(settings.model).name, "sha256": identities[ORIGINAL].sha256},
        {benchmark.choice.name: benchmark.identity for benchmark in benchmarks},
    )
    result = Result(
        suite="understanding",
        metrics=scores.metrics,
        count=sum(len(benchmark.questions) for benchmark in benchmarks),
        class_histogram={},
        rounding="none",
        order="the files'",
        extractor=scores.extractor,
        reference=scores.reference,
        sampler={
            **settings.model_dump(mode="json", exclude={"model", "benchmarks", "chunk_size"}),
            "weights": "ema" if _averaged(config) else "model",
        },
        checkpoint=identify(checkpoint).to_json(),
    )
    report_scores(config.run.name, rows, scores, result, directory / f"scores-understanding-{checkpoint.name}.json")
    return scores.metrics


def read_benchmarks(settings: UnderstandingConfig) -> list[Benchmark[Any]]:
    """The configured benchmarks.

    Raises:
        DataError: files are missing or of another kind.
    """
    return [resolve(choice)(choice, settings.prompts) for choice in settings.benchmarks]


def _averaged(config: Config) -> bool:
    return config.recipe.trains == "generator" and config.sampling.weights == "ema"


def write_tuned(config: Config, checkpoint: Path, origin: Path, folder: Path, identity: Identity) -> None:
    """Write the folder ``origin``, which ``identity`` is of, with what the run trained in the place of its own.

    A ``folder`` that is there already is kept if it was made of the same: ``made_of.json`` beside it says of what.

    Raises:
        ConfigError, CheckpointError: see :func:`megavar.assembly.write_into_folder`.
    """
    record = folder.parent / "made_of.json"
    made_of = {"checkpoint": identify(checkpoint).sha256, "ema": _averaged(config), "model": identity.sha256}
    if folder.exists() and record.exists() and record.read_text() == json.dumps(made_of):
        return
    shutil.rmtree(folder, ignore_errors=True)
    _, manifest = find_checkpoint(checkpoint, verify=False)
    tensors = read_weights(checkpoint, next(iter(manifest.modules)), _averaged(config))
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(record, json.dumps(made_of))
    own = {name: value for name, value in tensors.items() if not name.startswith(HEADS)}
    write_into_folder(trained_choice(config), own, origin, folder)


def _scores(
    settings: UnderstandingConfig,
    benchmarks: list[Benchmark[Any]],
    folder: Path,
    known: Identity | None,
    work: Path,
    place: Environment,
) -> dict[str, float]:
    """Those of one model, whose identity rank 0 knows, on all benchmarks; nothing on other ranks than the first."""
    identity = [{} if known is None else known.to_json()]
    if dist.is_initialized():
        dist.broadcast_object_list(identity, src=0)

    @functools.cache
    def model() -> VisionLanguageModel:
        return VisionLanguageModel(folder, place.device, settings.precision, settings.tiles)

    scores: dict[str, float] = {}
    for benchmark in benchmarks:
        answers = Answers(benchmark, settings, identity[0], work / "answers")
        answers.ask(model, place)
        if dist.is_initialized():
            dist.barrier()
        if place.rank == 0:
            scores |= answers.score()
    return scores
