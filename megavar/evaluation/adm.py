"""The ADM metric set: FID, sFID, Inception score, precision and recall, from stored features of all images.

``notes``: a score is a property of (images, order, count, weights, reference), so keys say what deviates from the usual
protocol: ``fid`` is on 50,000 images with the published weights, ``fid@5000`` on 5,000, ``fid@inception-1a2b3c4d`` with
other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from megavar.chunks import ChunkStore, share
from megavar.evaluation.images import ImageSet
from megavar.evaluation.inception import ADMInception, full_precision
from megavar.evaluation.reference import POOL_COUNT, Reference
from megavar.evaluation.statistics import (
    Gaussian,
    GaussianAccumulator,
    frechet_distance,
    inception_score,
    precision_recall,
)
from megavar.evaluation.table import Metric
from megavar.parallel.environment import Environment
from megavar.parallel.seeds import random_bits

USUAL_COUNT = 50_000
SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity's default: the headline Inception score equals its own
NEIGHBOURS = 3
_STATISTICS_BLOCK = 1024  # images taken into the statistics at a time

METRICS = (
    Metric("fid", better="lower"),
    Metric("sfid", better="lower"),
    Metric("is", better="higher"),
    Metric("precision", better="higher"),
    Metric("recall", better="higher"),
)


@dataclass(frozen=True)
class Features:
    """What all five metrics need of N images."""

    pool: Tensor
    """float32 [N, 2048] in index order."""
    pool_statistics: Gaussian
    spatial_statistics: Gaussian


def extract_features(
    store: ChunkStore,
    images: ImageSet,
    network: ADMInception,
    chunks: Iterable[int],
    *,
    on_progress: Callable[[int], object] = lambda images: None,
) -> None:
    """Put the features of ``chunks`` of ``images`` into ``store``."""
    device = next(network.parameters()).device
    for chunk in chunks:
        first, last = store.range(chunk)
        features = network(images.read(first, last).to(device))
        store.write(chunk, {"pool": features.pool.cpu().numpy(), "spatial": features.spatial.cpu().numpy()})
        on_progress(last - first)


def stored_features(directory: Path, images: ImageSet, network: ADMInception, place: Environment) -> ChunkStore:
    """Features of all ``images`` in ``directory``, chunk by chunk. Collective: ranks divide what is missing, rank 0
    shows a bar. When it returns, all chunks are there.

    Raises:
        DataError: ``directory`` holds features of other images or of another network.
    """
    identity = {"images": images.identity, "weights_sha256": network.weights_sha256}
    store = ChunkStore.open(directory, count=len(images), size=images.chunk_size, identity=identity)
    mine = share(store.missing(), place)
    total = sum(store.range(chunk)[1] - store.range(chunk)[0] for chunk in mine)
    # disable=None: a bar on terminals only
    with tqdm(total=total, desc="features", unit="image", disable=True if place.rank or not mine else None) as bar:
        extract_features(store, images, network, mine, on_progress=bar.update)
    if dist.is_initialized():
        dist.barrier()
    return store


def collect_features(store: ChunkStore) -> Features:
    """Reduce the chunks of ``store`` in their order, in float64 on the CPU.

    The same bits from any number of ranks, with the same number of threads.
    """
    pool, spatial = GaussianAccumulator(), GaussianAccumulator()
    pools: list[Tensor] = []
    waiting: list[tuple[Tensor, Tensor]] = []

    def take_in() -> None:
        pool.add(torch.cat([part for part, _ in waiting]))
        spatial.add(torch.cat([part for _, part in waiting]))
        waiting.clear()

    for arrays in store.read_all():
        pools.append(torch.from_numpy(arrays["pool"]))
        waiting.append((pools[-1], torch.from_numpy(arrays["spatial"])))
        if sum(len(part) for part, _ in waiting) >= _STATISTICS_BLOCK:
            take_in()
    if waiting:
        take_in()
    return Features(torch.cat(pools), pool.result(), spatial.result())


def reference_from(features: Features, identity: dict[str, object], *, seed: int = 0) -> Reference:
    """Make features of real images a reference; precision and recall use ``POOL_COUNT`` of them, drawn by ``seed``."""
    keys = random_bits(seed, "reference_images", torch.arange(len(features.pool)))
    chosen = torch.sort(torch.argsort(keys, stable=True)[:POOL_COUNT]).values
    return Reference(features.pool_statistics, features.spatial_statistics, features.pool[chosen].clone(), identity)


def adm_metrics(
    features: Features, reference: Reference, network: ADMInception, *, labels: Tensor | None = None
) -> tuple[dict[str, float], list[str]]:
    """Compute all metrics that ``reference`` allows, and the notes that belong beside them.

    Precision and recall are headlined with ADM's float16 distances and given in float32 as ``*_fp32``. The Inception
    score is over a seeded shuffle (10 splits); ``is_single_split`` and, where ``labels`` (int64 [N]) are known,
    ``is_interleaved`` (classes in turn, 10 splits) are given because papers used these orders without saying so.
    """
    device = next(network.parameters()).device
    pool = features.pool.to(device)
    metrics = {"fid": frechet_distance(features.pool_statistics, reference.pool)}
    notes = count_notes(len(pool)) + reference_notes(reference)
    if reference.spatial is not None:
        metrics["sfid"] = frechet_distance(features.spatial_statistics, reference.spatial)
    logits = network.logits(pool)
    metrics["is"], metrics["is_deviation"] = inception_score(logits, splits=SPLITS, order=shuffled_order(len(pool)))
    metrics["is_single_split"] = inception_score(logits, splits=1)[0]
    if labels is not None:
        metrics["is_interleaved"] = inception_score(logits, splits=SPLITS, order=interleaved_order(labels))[0]
    if reference.pool_features is not None:
        real = reference.pool_features.to(device)
        with full_precision(device):
            metrics["precision"], metrics["recall"] = precision_recall(pool, real, neighbours=NEIGHBOURS, half=True)
            metrics["precision_fp32"], metrics["recall_fp32"] = precision_recall(pool, real, neighbours=NEIGHBOURS)
    return qualified(metrics, len(pool), network), notes


def torch_fidelity_metrics(
    features: Features, reference: Reference, network: ADMInception
) -> tuple[dict[str, float], list[str]]:
    """FID, Inception score, precision and recall by torch-fidelity's own functions on the same features (no sFID)."""

    def statistics(gaussian: Gaussian) -> dict[str, np.ndarray]:
        # torch-fidelity asserts equal types on both sides; its own means are float32, which costs six digits.
        return {"mu": gaussian.mean.numpy(), "sigma": gaussian.covariance.numpy()}

    fid = fid_statistics_to_metric(statistics(features.pool_statistics), statistics(reference.pool), False)
    logits = network.logits(features.pool.to(next(network.parameters()).device)).cpu()
    isc = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SHUFFLE_SEED)
    metrics = {"fid": fid[KEY_METRIC_FID], "is": isc[KEY_METRIC_ISC_MEAN], "is_deviation": isc[KEY_METRIC_ISC_STD]}
    if reference.pool_features is not None:
        prc = prc_features_to_metric(
            features.pool, reference.pool_features, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        metrics |= {"precision_fp32": prc[KEY_METRIC_PRECISION], "recall_fp32": prc[KEY_METRIC_RECALL]}
    notes = count_notes(len(features.pool)) + reference_notes(reference)
    return qualified(metrics, len(features.pool), network), notes


def shuffled_order(count: int) -> Tensor:
    """The permutation of the headline Inception score: int64 [count]."""
    return torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))


def interleaved_order(labels: Tensor) -> Tensor:
    """Indices that visit the classes in turn: first image of every class, then the second of every class, ..."""
    by_class = torch.argsort(labels, stable=True)
    sorted_labels = labels[by_class]
    starts = torch.searchsorted(sorted_labels, sorted_labels)
    place_in_class = torch.arange(len(labels)) - starts
    return by_class[torch.argsort(place_in_class, stable=True)]


def qualified(metrics: dict[str, float], count: int, network: ADMInception) -> dict[str, float]:
    """Append to the keys what deviates from the usual protocol: another count, other weights."""
    suffix = ("" if count == USUAL_COUNT else f"@{count}") + ("" if network.official else f"@{network.name}")
    return {key + suffix: value for key, value in metrics.items()}


def reference_notes(reference: Reference) -> list[str]:
    """What to say about precision and recall from ``reference``."""
    if reference.pool_features is None:
        return ["the reference holds statistics only: precision and recall cannot be computed from it"]
    count = len(reference.pool_features)
    if count == POOL_COUNT:
        return []
    return [f"precision and recall use {count} reference images instead of ADM's {POOL_COUNT}"]


def count_notes(count: int) -> list[str]:
    """What to say about numbers made from ``count`` images."""
    if count == USUAL_COUNT:
        return []
    return [
        f"{count} images instead of {USUAL_COUNT}: FID and sFID are biased upwards, the Inception score downwards, "
        f"and recall depends on the number of images; do not compare with published numbers"
    ]
