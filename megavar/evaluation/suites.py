"""From ``evaluation.suite`` and a set of images to scores: one function for every suite, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megavar.chunks import ChunkStore
from megavar.config.data import DataConfig
from megavar.config.suites.adm import ADMSuite
from megavar.config.suites.base import SuiteChoice
from megavar.config.suites.classifier import ClassifierSuite
from megavar.config.suites.digits import DigitsSuite
from megavar.config.suites.dpg import DPGSuite
from megavar.config.suites.geneval import GenEvalSuite
from megavar.config.suites.shapes import ShapesSuite
from megavar.data.build import build_source
from megavar.data.shapes_grammar import Prompt, evaluation_prompts
from megavar.errors import ConfigError
from megavar.evaluation import adm, classes, digits, layouts, shape_eval
from megavar.evaluation.images import ImageSet
from megavar.evaluation.inception import ADMInception, check_weights
from megavar.evaluation.reference import check_reference, load_reference
from megavar.evaluation.table import Metric
from megavar.parallel.environment import Environment


@dataclass(frozen=True)
class Scores:
    """What a suite found."""

    metrics: dict[str, float]
    table: tuple[Metric, ...]
    """Directions and thresholds for printing; empty prints every metric."""
    extractor: dict[str, Any] = field(default_factory=dict)
    """Name and sha256 of the network behind the numbers."""
    reference: dict[str, Any] = field(default_factory=dict)
    """What the images were compared with."""
    notes: list[str] = field(default_factory=list)


def check_suite(suite: SuiteChoice, data: DataConfig) -> None:
    """Refuse a suite that does not fit the data or whose files are not there, before anything is sampled.

    Raises:
        ConfigError: with the suites that do fit.
        CheckpointError, DataError: Inception weights or reference statistics are missing or of another kind.
    """
    if isinstance(suite, ADMSuite):
        check_weights(Path(suite.inception_weights), unofficial=suite.unofficial_weights)
        check_reference(Path(suite.reference))
        return
    source = data.source.name
    if isinstance(suite, (GenEvalSuite, DPGSuite)):
        layouts.read_prompts(suite.name, Path(suite.prompts))
        if build_source(data).num_classes:
            raise ConfigError(
                f"evaluation.suite.name={suite.name} asks for images of prompts, but data.source.name={source} has "
                f"classes and no captions. Use evaluation.suite.name=classifier or adm."
            )
        return
    wanted = {"digits": "digits", "shapes": "shapes"}.get(suite.name, source)
    if source != wanted:
        raise ConfigError(
            f"evaluation.suite.name={suite.name} scores the source {wanted!r}, but data.source.name is {source!r}. Use "
            f"evaluation.suite.name=classifier (any source with classes) or adm (with Inception weights)."
        )
    if isinstance(suite, ShapesSuite) and build_source(data).num_classes:
        raise ConfigError(
            "evaluation.suite.name=shapes asks for scenes by captions, but data.source.conditioning is class. Use "
            "evaluation.suite.name=classifier."
        )
    if isinstance(suite, ClassifierSuite) and source == "digits":
        raise ConfigError(
            "evaluation.suite.name=classifier does not score digits, which have a suite of their own with the same "
            "extractor name. Use evaluation.suite.name=digits."
        )
    if isinstance(suite, ClassifierSuite) and build_source(data).num_classes < 2:
        raise ConfigError(
            f"evaluation.suite.name=classifier needs classes, but data.source.name={source} has none. Use "
            f"evaluation.suite.name=shapes for captioned shapes, or adm with Inception weights."
        )


def image_count(suite: SuiteChoice, data: DataConfig, samples: int) -> int:
    """Number of images that the suite scores: ``samples``, or those of its own prompts."""
    if isinstance(suite, ShapesSuite):
        return len(shape_prompts(suite, data)) * suite.per_prompt
    if isinstance(suite, (GenEvalSuite, DPGSuite)):
        return len(layouts.read_prompts(suite.name, Path(suite.prompts))) * _per_prompt(suite)
    return samples


def _per_prompt(suite: GenEvalSuite | DPGSuite) -> int:
    return suite.per_prompt if isinstance(suite, GenEvalSuite) else layouts.PER_PROMPT


def suite_label(suite: SuiteChoice) -> str:
    """The suite's name in result files, for example ``digits`` or ``adm/torch-fidelity``."""
    return f"adm/{suite.backend}" if isinstance(suite, ADMSuite) else suite.name


def take_features(suite: SuiteChoice, images: ImageSet, place: Environment, *, work_directory: Path) -> None:
    """What all ranks do for a score. Collective.

    For the ADM suite: Inception features of ``images``, chunk by chunk, into ``work_directory``; images that are drawn
    when they are read need not be stored for it. The other suites look at all images together, when they score.
    """
    if isinstance(suite, ADMSuite):
        network = _inception(suite, place.device)
        adm.stored_features(_features_directory(work_directory, network), images, network, place)


def score_images(
    suite: SuiteChoice, data: DataConfig, images: ImageSet, device: torch.device, *, work_directory: Path
) -> Scores:
    """Score ``images`` after :func:`take_features`. On one rank; the others need not wait for it."""
    if isinstance(suite, ADMSuite):
        return _adm(suite, images, device, work_directory)
    if isinstance(suite, (GenEvalSuite, DPGSuite)):
        root = work_directory / suite.name
        notes = layouts.emit(suite.name, root, Path(suite.prompts), images, per_prompt=_per_prompt(suite))
        return Scores({}, (), {"name": f"the official scorer of {suite.name}, to be run on {root}"}, notes=notes)
    everything = images.read(0, len(images))
    if isinstance(suite, ShapesSuite):
        prompts = [prompt for prompt in shape_prompts(suite, data) for _ in range(suite.per_prompt)]
        records = shape_eval.score_scenes(everything, prompts)
        shape_eval.write_records(work_directory / "shape_eval.jsonl", records)
        reference = {**suite.model_dump(), "image_size": data.image_size, "prompts": len(prompts) // suite.per_prompt}
        return Scores(shape_eval.summarize(records), shape_eval.METRICS, {"name": "shape detector"}, reference)
    if images.labels is None:
        raise ConfigError(
            f"evaluation.suite.name={suite.name} needs the class of every image: score the chunks of megavar sample"
        )
    cache = Path(suite.extractor_cache) if suite.extractor_cache else None
    if isinstance(suite, DigitsSuite):
        metrics = digits.evaluate_digits(everything, images.labels, directory=cache)
        extractor, table = digits.digits_extractor(cache), digits.METRICS
        train = build_source(data)
        reference = {"name": "digits/train", "count": len(train), "fingerprint": train.fingerprint}
    else:
        real = classes.class_reference(data, suite.reference_images)
        metrics = classes.evaluate_classes(everything, images.labels, real, directory=cache)
        extractor, table = classes.class_extractor(real, cache), classes.class_metrics(real.source_name)
        reference = {"name": f"{real.source_name}/train", "count": len(real.train), "fingerprint": real.fingerprint}
    return Scores(metrics, table, {"name": extractor.name, "sha256": extractor.sha256}, reference)


def suite_baselines(suite: SuiteChoice, data: DataConfig, count: int) -> dict[str, dict[str, float]]:
    """Scores of samplers that need no network, for the table beside the model; empty where the suite has none."""
    if isinstance(suite, DigitsSuite) and suite.baselines:
        return digits.baselines(count, directory=Path(suite.extractor_cache) if suite.extractor_cache else None)
    if isinstance(suite, ClassifierSuite) and suite.baselines:
        reference = classes.class_reference(data, suite.reference_images)
        cache = Path(suite.extractor_cache) if suite.extractor_cache else None
        return classes.class_baselines(reference, count, directory=cache)
    if isinstance(suite, ShapesSuite):
        prompts = shape_prompts(suite, data)
        true = shape_eval.true_scenes(prompts, data.image_size)
        turned = prompts[1:] + prompts[:1]
        return {
            "right scenes": shape_eval.summarize(shape_eval.score_scenes(true, prompts)),
            "other captions": shape_eval.summarize(shape_eval.score_scenes(true, turned)),
        }
    return {}


def shape_prompts(suite: ShapesSuite, data: DataConfig) -> list[Prompt]:
    """The prompts of ShapeEval in index order; sample j of prompt p is image ``p * per_prompt + j``."""
    return evaluation_prompts(data.image_size, per_tag=suite.per_tag, held_out=suite.held_out, seed=suite.seed)


def _adm(suite: ADMSuite, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
    network = _inception(suite, device)
    features = adm.collect_features(ChunkStore.existing(_features_directory(work_directory, network)))
    reference = load_reference(Path(suite.reference), network, device)
    if suite.backend == "torch-fidelity":
        metrics, notes = adm.torch_fidelity_metrics(features, reference, network)
    else:
        metrics, notes = adm.adm_metrics(features, reference, network, labels=images.labels)
    extractor = {"name": network.name, "sha256": network.weights_sha256}
    return Scores(metrics, (), extractor, reference.identity, notes + images.notes)


def _inception(suite: ADMSuite, device: torch.device) -> ADMInception:
    return ADMInception(Path(suite.inception_weights), unofficial=suite.unofficial_weights).to(device)


def _features_directory(work_directory: Path, network: ADMInception) -> Path:
    return work_directory / f"features-{network.name}"
