"""Reconstruction metrics of a tokenizer: rFID, PSNR, SSIM and LPIPS, under an explicit protocol.

Published reconstruction numbers differ in how images are cropped, resized and rounded, so the protocol is part of the
key: ``psnr`` is ours, ``psnr@vgt`` is VGT's.

    standard  ADM centre crop; both sides rounded bytes; SSIM with data range 1 (``ssim_dr2``: with 2)
    llamagen  as standard, reconstructions by floor(127.5 x + 128); its published SSIM is ``ssim_dr2``
    titok     shorter side resized (bicubic, antialiased), centre crop; otherwise as standard
    vgt       aspect ratio squashed to the model's size, originals in bfloat16, both sides shrunk bilinearly without
              antialias, bytes by truncation, PSNR and SSIM on unrounded values; its published SSIM is ``ssim_dr2``

Sources: FoundationVision/LlamaGen ``tokenizer_image/reconstruction_vq_ddp.py``, bytedance/1d-tokenizer
``evaluator/evaluator.py``, hustvl/VGT ``tokenizer/scripts/eval/eval_resconstruct.py`` and ``tokenizer/evaluator``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from megavar.chunks import ChunkStore
from megavar.data.pixels import Rounding, quantize, to_float
from megavar.data.source import Source
from megavar.data.transforms import BICUBIC, adm_center_crop, center_crop, decode, resize_shorter_side
from megavar.errors import CheckpointError, DataError
from megavar.evaluation.image_quality import psnr, ssim
from megavar.evaluation.inception import full_precision
from megavar.evaluation.reference import Reference
from megavar.evaluation.statistics import frechet_distance, gaussian
from megavar.evaluation.table import Metric

Protocol = Literal["standard", "vgt", "llamagen", "titok"]
ROUNDING: dict[Protocol, Rounding] = {
    "standard": "round",
    "titok": "round",
    "llamagen": "half_up",
    "vgt": "truncate",
}
METRICS = (
    Metric("rfid", better="lower"),
    Metric("psnr", better="higher"),
    Metric("ssim", better="higher"),
    Metric("ssim_dr2", better="higher"),
    Metric("lpips_vgg", better="lower"),
    Metric("lpips_alex", better="lower"),
)


@dataclass(frozen=True)
class Pair:
    """Original and reconstruction as a protocol compares them, [B, 3, H, W]."""

    original: Tensor
    """float32 in [0, 1], for PSNR, SSIM and LPIPS."""
    reconstruction: Tensor
    original_bytes: Tensor
    """uint8, for the features of rFID."""
    reconstruction_bytes: Tensor


@dataclass(frozen=True)
class Instruments:
    """Networks that measure; without one its metrics are left out."""

    features: Callable[[Tensor], Tensor] | None = None
    """From uint8 [B, 3, H, W] to float32 [B, D]: for rFID."""
    features_name: str = "inception"
    """``inception`` (published weights), or what the metric's key must name."""
    perceptual: Mapping[str, nn.Module] = field(default_factory=dict)
    """Distances on [-1, 1] by key, for example ``lpips_vgg``."""


def prepare(image: np.ndarray | bytes, protocol: Protocol, size: int) -> np.ndarray:
    """Crop and resize a stored image as ``protocol`` does: uint8 [size, size, 3]."""
    picture = decode(image)
    match protocol:
        case "standard" | "llamagen":
            return np.asarray(adm_center_crop(picture, size))
        case "titok":
            return np.asarray(center_crop(resize_shorter_side(picture, size, BICUBIC), size))
        case "vgt":
            return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def model_input(images: Tensor, protocol: Protocol) -> Tensor:
    """What the tokenizer sees of uint8 images [B, 3, S, S]: float32 in [-1, 1]."""
    x = to_float(images)
    return x.to(torch.bfloat16).float() if protocol == "vgt" else x


def compare(inputs: Tensor, outputs: Tensor, protocol: Protocol, *, size: int) -> Pair:
    """Bring model input and output (float [B, 3, S, S] in [-1, 1]) to what ``protocol`` compares at ``size`` pixels."""
    if protocol == "vgt":
        return _compare_vgt(inputs, outputs, size)
    if size != inputs.shape[-1]:
        raise DataError(
            f"the {protocol} protocol compares at the tokenizer's own size {inputs.shape[-1]}, not at {size}: set the "
            f"evaluation size to {inputs.shape[-1]}, or use the vgt protocol"
        )
    original = quantize(inputs, "round")
    reconstruction = quantize(outputs, ROUNDING[protocol])
    return Pair(original.float() / 255, reconstruction.float() / 255, original, reconstruction)


def _compare_vgt(inputs: Tensor, outputs: Tensor, size: int) -> Pair:
    mean = torch.tensor((0.485, 0.456, 0.406), device=inputs.device).view(1, 3, 1, 1)
    deviation = torch.tensor((0.229, 0.224, 0.225), device=inputs.device).view(1, 3, 1, 1)
    shrunk = functional.interpolate(inputs.to(torch.bfloat16), size=(size, size), mode="bilinear").float()
    # Normalized and back, as the published evaluator does: exact levels come back off by one in 63 of 256 cases.
    original = ((shrunk + 1) / 2 - mean) / deviation * deviation + mean
    reconstruction = functional.interpolate(outputs.float(), size=(size, size), mode="bilinear").clamp(-1, 1)
    reconstruction = (reconstruction + 1) / 2
    return Pair(
        original, reconstruction, *((x * 255).clamp(0, 255).to(torch.uint8) for x in (original, reconstruction))
    )


def measure(pair: Pair, instruments: Instruments) -> dict[str, np.ndarray]:
    """All per-image numbers and features of a pair, as arrays [B] or [B, D]."""
    arrays = {
        "psnr": psnr(pair.original, pair.reconstruction),
        "ssim": ssim(pair.original, pair.reconstruction),
        "ssim_dr2": ssim(pair.original, pair.reconstruction, data_range=2.0),
    }
    with full_precision(pair.original.device):
        for name, distance in instruments.perceptual.items():
            arrays[name] = distance(pair.original * 2 - 1, pair.reconstruction * 2 - 1)
        if instruments.features is not None:
            arrays["features_original"] = instruments.features(pair.original_bytes)
            arrays["features_reconstruction"] = instruments.features(pair.reconstruction_bytes)
    return {name: values.cpu().numpy() for name, values in arrays.items()}


@torch.no_grad()
def reconstruct_chunks(
    store: ChunkStore,
    source: Source,
    reconstruct: Callable[[Tensor], Tensor],
    instruments: Instruments,
    *,
    protocol: Protocol,
    model_size: int,
    size: int,
    device: torch.device,
    chunks: Iterable[int],
    on_progress: Callable[[int], object] = lambda images: None,
) -> None:
    """Measure ``chunks`` of ``source`` after ``reconstruct`` (float [B, 3, S, S] in [-1, 1] to same).

    Args:
        model_size: side of the images that the tokenizer sees.
        size: side at which images are compared.
    """
    for chunk in chunks:
        first, last = store.range(chunk)
        images = torch.from_numpy(
            np.stack([prepare(_image(source, index), protocol, model_size) for index in range(first, last)])
        )
        inputs = model_input(images.permute(0, 3, 1, 2).to(device), protocol)
        outputs = reconstruct(inputs)
        if not bool(outputs.isfinite().all()):
            raise CheckpointError(
                f"Reconstructions of images {first} to {last - 1} are not finite. The weights are damaged or belong to "
                f"another model: name other ones."
            )
        store.write(chunk, measure(compare(inputs, outputs, protocol, size=size), instruments))
        on_progress(last - first)


def _image(source: Source, index: int) -> np.ndarray | bytes:
    image = source.read(index).image
    if image is None:
        raise DataError(
            f"sample {index} of {source.fingerprint} has no image: measure reconstruction on images, not on a cache of "
            f"tokens or latents"
        )
    return image


def reconstruction_metrics(
    store: ChunkStore, protocol: Protocol, instruments: Instruments, *, reference: Reference | None = None
) -> tuple[dict[str, float], list[str]]:
    """Reduce the chunks of ``store`` in their order; returns metrics and notes.

    PSNR is the mean of per-image PSNRs; images that come back exactly have none and are counted in the notes.
    ``reference`` (ADM's training statistics) adds ``rfid_adm``, which is larger than ``rfid`` for the same tokenizer.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for arrays in store.read_all():
        for name, values in arrays.items():
            columns.setdefault(name, []).append(values)
    metrics, notes = {}, []
    features = {name: gaussian(map(torch.from_numpy, parts)) for name, parts in columns.items() if "features" in name}
    if features:
        suffix = "" if instruments.features_name == "inception" else f"@{instruments.features_name}"
        rebuilt = features["features_reconstruction"]
        metrics[f"rfid{suffix}"] = frechet_distance(rebuilt, features["features_original"])
        if reference is not None:
            metrics[f"rfid_adm{suffix}"] = frechet_distance(rebuilt, reference.pool)
    for name, parts in columns.items():
        values = np.concatenate(parts)
        if "features" in name:
            continue
        finite = values[np.isfinite(values)]
        if len(finite) < len(values):
            exact = len(values) - len(finite)
            notes.append(f"{exact} of {len(values)} images were reconstructed exactly; {name} leaves them out")
        if len(finite):
            metrics[name] = float(finite.mean())
    if protocol != "standard":
        metrics = {f"{name}@{protocol}": value for name, value in metrics.items()}
    return metrics, notes
