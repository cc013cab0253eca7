"""Scores of generated digits, with the baselines that show what the scores are worth.

No single number suffices (measured, reference = the 1,433 training images): class means reach judge accuracy 1.0 and
precision 1.0, copies of training images reach every optimum at once. So the scores are read together: accuracy and
Fréchet distance, precision *and* recall, and the distance to the nearest training image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from megavar.data.digits import Digits
from megavar.errors import DataError
from megavar.evaluation.classifier import Recipe, TrainedExtractor, trained_extractor
from megavar.evaluation.fidelity import fidelity_metrics
from megavar.evaluation.statistics import frechet_distance, gaussian, precision_recall
from megavar.evaluation.table import Metric

NUM_CLASSES = 10
SIDE = 8  # pixels of a digit as it was published, grey values 0..16
EXTRACTOR_NAME = "digits-cnn"
_EXTRACTOR_RECIPE = Recipe(resolution=16, num_classes=NUM_CLASSES)

METRICS: tuple[Metric, ...] = (
    Metric("fid@digits-cnn", better="lower"),
    Metric("isc@digits-cnn", better="higher"),
    Metric("precision@digits-cnn", better="higher"),
    Metric("recall@digits-cnn", better="higher"),
    Metric("fd64", better="lower", threshold=60),
    Metric("judge_accuracy", better="higher", threshold=0.9),
    Metric("precision@pixels64", better="higher", threshold=0.5),
    Metric("recall@pixels64", better="higher", threshold=0.5),
    Metric("nearest_train_distance", better="higher", threshold=5),
)


@dataclass(frozen=True)
class DigitsReference:
    """The published digits: 64 grey values 0..16 (float64 [N, 64]) and labels (int64 [N]) of both splits."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def evaluate_digits(images: Tensor, labels: Tensor, *, directory: Path | None = None) -> dict[str, float]:
    """Score generated digits against the training split.

    ``images`` is uint8 [N, 3, H, W] with H = W a multiple of 8, ``labels`` int64 [N] the digit that was asked for;
    ``directory`` replaces the user's cache for the extractor. Returns the keys of ``METRICS``: torch-fidelity's four on
    ``digits-cnn``; ``fd64``, precision and recall (k=3) and the mean distance to the nearest training image on the
    64 grey values 0..16; and the accuracy of a support vector machine (98.9 % on held-out real digits).
    """
    pixels = grey_values(images)
    if len(images) < 16 or len(labels) != len(images):
        raise DataError(
            f"scoring digits needs at least 16 images and one label for each, got {len(images)} images and "
            f"{len(labels)} labels: sample more"
        )
    reference = digits_reference()
    precision, recall = precision_recall(pixels, reference.train)
    return {
        **fidelity_metrics(images, as_images(reference.train), digits_extractor(directory)),
        "fd64": frechet_distance(gaussian(pixels), gaussian(reference.train)),
        "judge_accuracy": float(_judge().score(pixels.numpy(), labels.numpy())),
        "precision@pixels64": precision,
        "recall@pixels64": recall,
        "nearest_train_distance": _nearest_distance(pixels, reference.train),
    }


def baselines(count: int = 1000, *, seed: int = 0, directory: Path | None = None) -> dict[str, dict[str, float]]:
    """Score five samplers that need no network, ``count`` images each (the held-out images are 364)."""
    reference = digits_reference()
    scores = {"held-out real": evaluate_digits(as_images(reference.test), reference.test_labels, directory=directory)}
    labels = torch.arange(count) % NUM_CLASSES
    for name, sampler in BASELINES.items():
        pixels, chosen = sampler(reference, labels, np.random.default_rng(seed))
        scores[name] = evaluate_digits(as_images(pixels), chosen, directory=directory)
    return scores


def digits_extractor(directory: Path | None = None) -> TrainedExtractor:
    """The registered extractor ``digits-cnn``, trained on the training split at 16x16 unless it is in the cache."""
    reference = digits_reference()
    return trained_extractor(
        EXTRACTOR_NAME,
        _EXTRACTOR_RECIPE,
        (as_images(reference.train), reference.train_labels),
        (as_images(reference.test), reference.test_labels),
        directory=directory,
    )


@functools.cache
def digits_reference() -> DigitsReference:
    """Both splits of the data source ``digits`` (1,433 and 364 images)."""
    train, test = Digits("train", SIDE), Digits("test", SIDE)
    # The source's images rather than its integers: a copied training image then has distance exactly 0.
    return DigitsReference(*_pixels_and_labels(train), *_pixels_and_labels(test))


def _pixels_and_labels(source: Digits) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.stack([np.asarray(source.read(i).image) for i in range(len(source))]))
    return grey_values(images.permute(0, 3, 1, 2)), torch.from_numpy(source.labels)


def grey_values(images: Tensor) -> Tensor:
    """Average uint8 images [N, 3, H, W] down to 8x8 grey values 0..16: float64 [N, 64]."""
    side = images.shape[-1]
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-2] != side or side % SIDE:
        raise DataError(
            f"digits are scored as uint8 [N, 3, S, S] with S a multiple of {SIDE}, got {images.dtype} "
            f"{list(images.shape)}: set the image size to 8, 16 or 32"
        )
    # Scaled last: the mean of equal integers is exact, so the size at which a digit is shown does not matter.
    grey = functional.avg_pool2d(images.double().mean(dim=1, keepdim=True), side // SIDE)
    return grey.flatten(1) * (16 / 255)


def as_images(pixels: Tensor, side: int = 16) -> Tensor:
    """Grey values 0..16 [N, 64] as uint8 images [N, 3, side, side]."""
    grey = (pixels.clamp(0, 16) * (255 / 16)).round().to(torch.uint8).view(-1, 1, SIDE, SIDE)
    scale = side // SIDE
    return grey.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3).expand(-1, 3, -1, -1).contiguous()


def _nearest_distance(pixels: Tensor, train: Tensor) -> float:
    distances = torch.cdist(pixels, train, compute_mode="donot_use_mm_for_euclid_dist")
    return float(distances.min(dim=1).values.mean())


@functools.cache
def _judge() -> SVC:
    reference = digits_reference()
    return SVC(gamma=0.001, C=10).fit(reference.train.numpy(), reference.train_labels.numpy())


Sampler = Callable[[DigitsReference, Tensor, np.random.Generator], tuple[Tensor, Tensor]]


def _class_gaussians(reference: DigitsReference, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    pixels = torch.zeros(len(labels), SIDE * SIDE, dtype=torch.float64)
    for digit in range(NUM_CLASSES):
        fit = gaussian(reference.train[reference.train_labels == digit])
        wanted = labels == digit
        drawn = random.multivariate_normal(fit.mean.numpy(), fit.covariance.numpy(), int(wanted.sum()), method="eigh")
        pixels[wanted] = torch.from_numpy(drawn)
    return pixels.clamp(0, 16).round(), labels


def _class_means(reference: DigitsReference, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    means = [reference.train[reference.train_labels == digit].mean(dim=0) for digit in range(NUM_CLASSES)]
    return torch.stack(means)[labels], labels


def _train_copies(reference: DigitsReference, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.from_numpy(random.permutation(len(reference.train)))[: len(labels)]
    return reference.train[chosen], reference.train_labels[chosen]


def _uniform_noise(reference: DigitsReference, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(random.uniform(0, 16, (len(labels), SIDE * SIDE))), labels


BASELINES: dict[str, Sampler] = {
    "per-class Gaussian": _class_gaussians,
    "class means": _class_means,
    "memoriser (train copies)": _train_copies,
    "uniform noise": _uniform_noise,
}
