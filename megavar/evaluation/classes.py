"""Scores on any source with classes, by a classifier of these classes that is trained on the spot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavar.config.data import DataConfig
from megavar.data.build import build_source, build_transform
from megavar.data.reading import stored_images
from megavar.data.source import Split
from megavar.errors import ConfigError, DataError
from megavar.evaluation.classifier import Recipe, TrainedExtractor, accuracy, load_network, trained_extractor
from megavar.evaluation.fidelity import fidelity_metrics
from megavar.evaluation.table import Metric

_STEPS = 600
_TEST_IMAGES = 1024


@dataclass(frozen=True)
class ClassReference:
    """Real images that a source's generated images are compared with."""

    train: Tensor
    """uint8 [N, 3, S, S]."""
    train_labels: Tensor
    """int64 [N]."""
    test: Tensor
    test_labels: Tensor
    num_classes: int
    source_name: str
    fingerprint: str


def class_metrics(source_name: str) -> tuple[Metric, ...]:
    """The metrics of ``evaluate_classes``."""
    name = f"{source_name}-cnn"
    return (
        Metric(f"fid@{name}", better="lower"),
        Metric(f"isc@{name}", better="higher"),
        Metric(f"precision@{name}", better="higher"),
        Metric(f"recall@{name}", better="higher"),
        Metric(f"label_accuracy@{name}", better="higher"),
        Metric("nearest_train_distance", better="higher"),
    )


@functools.lru_cache(maxsize=2)
def class_reference(data: DataConfig, count: int) -> ClassReference:
    """The first ``count`` training and up to 1,024 test images of the configured source, transformed without chance."""

    def read(split: Split, limit: int) -> tuple[Tensor, Tensor]:
        source = build_source(data, split)
        if source.num_classes < 2:
            raise ConfigError(
                f"evaluation.suite.name=classifier needs classes, but data.source.name={data.source.name} has none. "
                f"Choose a suite that fits the data."
            )
        return stored_images(source, build_transform(data, "test"), range(min(limit, len(source))))

    train, test = read("train", count), read("test", _TEST_IMAGES)
    source = build_source(data, "train")
    return ClassReference(*train, *test, source.num_classes, data.source.name, source.fingerprint)


def class_extractor(reference: ClassReference, directory: Path | None = None) -> TrainedExtractor:
    """The registered extractor ``<source>-cnn``."""
    recipe = Recipe(resolution=reference.train.shape[-1], num_classes=reference.num_classes, steps=_STEPS)
    return trained_extractor(
        f"{reference.source_name}-cnn",
        recipe,
        (reference.train, reference.train_labels),
        (reference.test, reference.test_labels),
        directory=directory,
    )


def evaluate_classes(
    images: Tensor, labels: Tensor, reference: ClassReference, *, directory: Path | None = None
) -> dict[str, float]:
    """Score generated ``images`` (uint8 [N, 3, S, S]) that were asked to show ``labels`` (int64 [N]).

    Besides torch-fidelity's four: the share of images that the classifier puts into the class asked for, and the mean
    distance to the nearest training image (root mean square over pixels, in grey levels; 0 for copies).
    """
    if len(images) < 16 or len(labels) != len(images):
        raise DataError(
            f"scoring needs at least 16 images and one label for each, got {len(images)} images and {len(labels)} "
            f"labels: sample more"
        )
    extractor = class_extractor(reference, directory)
    return {
        **fidelity_metrics(images, reference.train, extractor),
        f"label_accuracy@{extractor.name}": accuracy(load_network(extractor.path), images, labels),
        "nearest_train_distance": _nearest_distance(images, reference.train),
    }


def class_baselines(
    reference: ClassReference, count: int, *, seed: int = 0, directory: Path | None = None
) -> dict[str, dict[str, float]]:
    """Scores of held-out images and of three samplers that need no network, up to ``count`` images each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % reference.num_classes
    copies = torch.randperm(len(reference.train), generator=generator)[:count]
    means = torch.stack([_class_mean(reference, label) for label in range(reference.num_classes)])
    noise = torch.randint(0, 256, (count, *reference.train.shape[1:]), generator=generator).to(torch.uint8)
    samplers: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "held-out real": lambda: (reference.test[:count], reference.test_labels[:count]),
        "class means": lambda: (means[labels], labels),
        "memoriser (train copies)": lambda: (reference.train[copies], reference.train_labels[copies]),
        "uniform noise": lambda: (noise, labels),
    }
    return {name: evaluate_classes(*draw(), reference, directory=directory) for name, draw in samplers.items()}


def _class_mean(reference: ClassReference, label: int) -> Tensor:
    members = reference.train[reference.train_labels == label]
    if len(members) == 0:
        raise DataError(
            f"class {label} has none among the first {len(reference.train)} training images: raise "
            f"evaluation.suite.reference_images, or set evaluation.suite.baselines=false"
        )
    return members.float().mean(dim=0).round().to(torch.uint8)


def _nearest_distance(images: Tensor, train: Tensor) -> float:
    flat = train.flatten(1).float()
    nearest = []
    for part in images.flatten(1).float().split(64):
        distances = torch.cdist(part, flat)  # which is nearest; its distance is computed again, without cancellation
        nearest.append((part - flat[distances.argmin(dim=1)]).square().mean(dim=1).sqrt())
    return float(torch.cat(nearest).double().mean())
