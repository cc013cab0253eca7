"""What generated images are compared with: Inception statistics and features of real images.

Three kinds of files are read: ADM's ``VIRTUAL_imagenet*.npz`` (statistics of the whole training set plus 10,000
images), statistics alone as MAR publishes them (``mu`` and ``sigma``: enough for FID and IS, not for precision and
recall), and our own, which ``tools/evaluate_fid.py reference`` makes from any images or from one of the former.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavar.errors import DataError
from megavar.evaluation.images import ImageSet, NpzImages
from megavar.evaluation.inception import ADMInception
from megavar.evaluation.statistics import Gaussian, gaussian
from megavar.storage import sha256_of_file, write_bytes_atomic

POOL_COUNT = 10_000
"""Reference images of which precision and recall use the features, as in ADM."""
ADM_BATCH = 64


@dataclass(frozen=True)
class Reference:
    """Statistics of real images; what a file does not offer is None."""

    pool: Gaussian
    """Of the pooled features: FID."""
    spatial: Gaussian | None
    """Of the spatial features: sFID."""
    pool_features: Tensor | None
    """float32 [R, 2048]: precision and recall."""
    identity: dict[str, Any]
    """Kind, path and sha256 of the file, and what is known of the images."""


def check_reference(path: Path) -> None:
    """Check that ``path`` is a reference of one of the three kinds, without reading it whole.

    Raises:
        DataError: it is absent or something else.
    """
    with _open(path) as file:
        _kind(path, file.files)


def load_reference(path: Path, network: ADMInception, device: torch.device) -> Reference:
    """Read reference statistics from any of the three kinds of files.

    ADM's file holds images instead of features: they go through ``network`` on ``device`` (10,000 images).

    Raises:
        DataError: the file is absent or none of the three kinds, or was made with other Inception weights.
    """
    with _open(path) as file:
        kind = _kind(path, file.files)
        small = {name: file[name] for name in file.files if name not in ("arr_0", "arr_1")}
    identity: dict[str, Any] = {"path": str(path), "sha256": sha256_of_file(path)}
    if kind == "megavar":
        return _own(path, small, network, identity)
    if kind == "adm":
        return _adm(path, small, network, device, identity)
    pool = _gaussian(path, small, "mu", "sigma", network.pool_dimensions)
    spatial = _gaussian(path, small, "mu_s", "sigma_s", network.spatial_dimensions) if "mu_s" in small else None
    return Reference(pool, spatial, None, {"kind": "statistics", **identity})


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(
            f"the reference statistics {path} do not exist: download ADM's VIRTUAL_imagenet256_labeled.npz, or make "
            f"statistics of your own images with tools/evaluate_fid.py reference"
        ) from error
    except DataError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:  # TypeError: an npy file
        raise DataError(f"the reference statistics {path} are not a readable npz file ({error})") from error


def _kind(path: Path, names: Collection[str]) -> str:
    if "meta" in names:
        return "megavar"
    if "arr_0" in names:
        return "adm"
    if {"mu", "sigma"} <= set(names):
        return "statistics"
    raise DataError(
        f"{path} holds {', '.join(sorted(names)) or 'nothing'}, but reference statistics hold arr_0 (ADM), mu and "
        f"sigma (statistics), or were made with tools/evaluate_fid.py reference"
    )


def save_reference(path: Path, reference: Reference, network: ADMInception) -> None:
    """Write ``reference`` as one npz of our own kind (82 MB of features instead of ADM's 2 GB of images)."""
    assert reference.spatial is not None and reference.pool_features is not None
    # ADM's file does not say of how many images its statistics are
    meta = {**reference.identity, "weights_sha256": network.weights_sha256, "count": reference.pool.count or None}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        allow_pickle=False,
        meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        mu=reference.pool.mean.cpu().numpy(),
        sigma=reference.pool.covariance.cpu().numpy(),
        mu_s=reference.spatial.mean.cpu().numpy(),
        sigma_s=reference.spatial.covariance.cpu().numpy(),
        pool=reference.pool_features.cpu().numpy(),
    )
    write_bytes_atomic(Path(path), buffer.getvalue())


def _own(path: Path, content: dict[str, np.ndarray], network: ADMInception, identity: dict[str, Any]) -> Reference:
    try:
        meta = json.loads(content["meta"].tobytes())
        count = int(meta["count"] or 0)
        made_with = str(meta["weights_sha256"])
        features = torch.from_numpy(content["pool"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): make the reference again") from error
    if made_with != network.weights_sha256:
        raise DataError(
            f"{path} was made with Inception weights {made_with[:8]}, but the loaded ones are "
            f"{network.weights_sha256[:8]}: use the same weights, or make the reference again"
        )
    pool = _gaussian(path, content, "mu", "sigma", network.pool_dimensions, count)
    spatial = _gaussian(path, content, "mu_s", "sigma_s", network.spatial_dimensions, count)
    origin = {key: value for key, value in meta.items() if key != "weights_sha256"}
    return Reference(pool, spatial, features, {**identity, "kind": "megavar", "of": origin})


def _adm(
    path: Path, content: dict[str, np.ndarray], network: ADMInception, device: torch.device, identity: dict[str, Any]
) -> Reference:
    pool, spatial = features_of(NpzImages(path), network, device)
    if "mu" in content:  # then ADM's script takes all statistics from the file, and the images serve P and R alone
        return Reference(
            _gaussian(path, content, "mu", "sigma", network.pool_dimensions),
            _gaussian(path, content, "mu_s", "sigma_s", network.spatial_dimensions),
            pool,
            {"kind": "adm", **identity, "precision_recall_count": len(pool)},
        )
    return Reference(
        gaussian(pool.split(1024)),
        gaussian(spatial.split(1024)),
        pool,
        {"kind": "images", **identity, "count": len(pool)},
    )


def features_of(images: ImageSet, network: ADMInception, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pooled [N, 2048] and spatial [N, 2023] features of all ``images``, float32 on the CPU."""
    pools, spatials = [], []
    for first in range(0, len(images), ADM_BATCH):
        features = network(images.read(first, min(first + ADM_BATCH, len(images))).to(device))
        pools.append(features.pool.cpu())
        spatials.append(features.spatial.cpu())
    return torch.cat(pools), torch.cat(spatials)


def _gaussian(
    path: Path, content: dict[str, np.ndarray], mean: str, covariance: str, dimensions: int, count: int = 0
) -> Gaussian:
    for name, shape in ((mean, (dimensions,)), (covariance, (dimensions, dimensions))):
        if name not in content or content[name].shape != shape:
            found = "is missing" if name not in content else f"has shape {list(content[name].shape)}"
            raise DataError(
                f"{name} {found} in {path}, but Inception statistics hold {name} of shape {list(shape)}: "
                f"the file is not ADM's, or was made with another network"
            )
        if content[name].dtype.kind not in "fiu" or not np.isfinite(content[name]).all():
            raise DataError(f"{name} in {path} holds values that are not finite numbers: make or fetch the file again")
    return Gaussian(torch.from_numpy(content[mean]).double(), torch.from_numpy(content[covariance]).double(), count)
