"""From ``evaluation.reconstruction`` and a tokenizer to reconstruction metrics, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from megavar.chunks import ChunkStore, share
from megavar.config.data import DataConfig
from megavar.config.evaluation import PerceptualWeights, ReconstructionConfig
from megavar.data.build import build_source
from megavar.data.pixels import Rounding, quantize, to_float
from megavar.data.shapes_grammar import evaluation_prompts
from megavar.data.source import content_fingerprint
from megavar.errors import ConfigError, check_all
from megavar.evaluation.base import Scores
from megavar.evaluation.classes import class_extractor, class_reference
from megavar.evaluation.classifier import load_network
from megavar.evaluation.digits import digits_extractor
from megavar.evaluation.inception import ADMInception, check_weights
from megavar.evaluation.reconstruction import (
    METRICS,
    ROUNDING,
    Instruments,
    reconstruct_chunks,
    reconstruction_metrics,
)
from megavar.evaluation.reference import check_reference, load_reference
from megavar.evaluation.shape_eval import tokenizer_ceiling
from megavar.parallel.environment import Environment
from megavar.storage import sha256_of_file
from megavar.tokenizers.perceptual import ALEXNET, VGG16, PerceptualDistance

_CLASSIFIER_IMAGES = 4096
_CEILING_PROMPTS_PER_TAG = 50


@torch.no_grad()
def score_tokenizer(
    config: ReconstructionConfig,
    data: DataConfig,
    reconstruct: Callable[[Tensor], Tensor],
    place: Environment,
    *,
    work_directory: Path,
    identity: dict[str, Any],
) -> Scores | None:
    """Measure the reconstructions of the test split. Collective; rank 0 gets the scores, the others None.

    Args:
        reconstruct: decode(encode(x)) of float images [B, 3, S, S] in [-1, 1] on ``place.device``.
        work_directory: keeps per-image results, so that interrupted work continues.
        identity: which weights; kept work of others is refused.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is measured, if settings contradict each other or files
            are missing.
    """
    check_all(*_checks(config, data))
    instruments, network, extractor = _instruments(config, data, place.device)
    source = build_source(data, "test")
    count = min(config.images or len(source), len(source))
    described = {
        **identity,
        "source": content_fingerprint(source),
        "protocol": config.protocol,
        "model_size": config.model_size or data.image_size,
        "size": data.image_size,
        "extractor": extractor,
    }
    store = ChunkStore.open(
        work_directory / f"reconstruction-{config.protocol}", count=count, size=config.chunk_size, identity=described
    )
    mine = share(store.missing(), place)
    # disable=None: a bar on terminals only
    with tqdm(desc="reconstructing", unit="image", disable=True if place.rank or not mine else None) as bar:
        reconstruct_chunks(
            store,
            source,
            reconstruct,
            instruments,
            protocol=config.protocol,
            model_size=config.model_size or data.image_size,
            size=data.image_size,
            device=place.device,
            chunks=mine,
            on_progress=bar.update,
        )
    if dist.is_initialized():
        dist.barrier()
    if place.rank != 0:
        return None
    reference = None
    if config.reference is not None and isinstance(network, ADMInception):
        reference = load_reference(Path(config.reference), network, place.device)
    metrics, notes = reconstruction_metrics(store, config.protocol, instruments, reference=reference)
    if data.source.name == "shapes" and data.source.conditioning == "caption":
        metrics |= _shapes_ceiling(reconstruct, data, place.device)
    if reference is not None:
        extractor |= {"rfid_adm": reference.identity}
    compared = {"name": f"{data.source.name}/test", "count": count, "fingerprint": source.fingerprint}
    return Scores(metrics, METRICS if config.protocol == "standard" else (), extractor, compared, notes)


def check_reconstruction(config: ReconstructionConfig, data: DataConfig) -> None:
    """Refuse settings that contradict each other and references that are not there, before anything is measured.

    Raises:
        ConfigError: names the keys.
        CheckpointError, DataError: weights, the reference or test images are missing or of another kind. All problems
            are in one error.
    """
    check_all(
        *_checks(config, data),
        lambda: config.inception_weights is None
        or check_weights(Path(config.inception_weights), unofficial=config.unofficial_weights),
        lambda: _perceptual(config, torch.device("cpu")),
        lambda: build_source(data, "test"),
    )


def _checks(config: ReconstructionConfig, data: DataConfig) -> tuple[Callable[[], object], ...]:
    """What loading the instruments does not find out."""
    return (
        lambda: _check_settings(config, data),
        lambda: check_reference(Path(config.reference)) if config.reference is not None else None,
    )


def _check_settings(config: ReconstructionConfig, data: DataConfig) -> None:
    if config.reference is not None and config.inception_weights is None:
        raise ConfigError(
            "evaluation.reconstruction.reference compares Inception features, but "
            "evaluation.reconstruction.inception_weights is not set. Set it, or leave reference out."
        )
    for name, least in (("lpips_vgg", 16), ("lpips_alex", 63)):
        if getattr(config, name) is not None and data.image_size < least:
            raise ConfigError(
                f"evaluation.reconstruction.{name} needs images of at least {least} pixels, but data.image_size is "
                f"{data.image_size}. Leave it out."
            )


def _instruments(
    config: ReconstructionConfig, data: DataConfig, device: torch.device
) -> tuple[Instruments, nn.Module | None, dict[str, Any]]:
    """What measures, the network of rFID, and what identifies all of it."""
    perceptual = _perceptual(config, device)
    files: dict[str, Any] = {name: _hashes(getattr(config, name)) for name in perceptual}
    if config.inception_weights is not None:
        inception = ADMInception(Path(config.inception_weights), unofficial=config.unofficial_weights).to(device)
        identity = {"name": inception.name, "sha256": inception.weights_sha256, **files}
        return Instruments(lambda images: inception(images).pool, inception.name, perceptual), inception, identity
    if build_source(data, "test").num_classes < 2:
        return Instruments(None, "none", perceptual), None, {"name": "none", **files}
    cache = Path(config.extractor_cache) if config.extractor_cache else None
    if data.source.name == "digits":
        extractor = digits_extractor(cache)
    else:
        extractor = class_extractor(class_reference(data, _CLASSIFIER_IMAGES), cache)
    classifier = load_network(extractor.path).to(device)
    identity = {"name": extractor.name, "sha256": extractor.sha256, **files}
    return Instruments(lambda images: classifier(images)[0], extractor.name, perceptual), classifier, identity


def _perceptual(config: ReconstructionConfig, device: torch.device) -> dict[str, nn.Module]:
    """The LPIPS distances that are configured, by the names of their keys.

    Raises:
        CheckpointError: weights are missing or of another network.
    """
    found: dict[str, nn.Module] = {}
    for name, network in (("lpips_vgg", VGG16), ("lpips_alex", ALEXNET)):
        given: PerceptualWeights | None = getattr(config, name)
        if given is not None:
            keys = f"evaluation.reconstruction.{name}.backbone", f"evaluation.reconstruction.{name}.linear"
            found[name] = PerceptualDistance(network, given.backbone, given.linear, keys=keys).to(device)
    return found


def _hashes(weights: PerceptualWeights) -> dict[str, str]:
    return {name: sha256_of_file(Path(path)) for name, path in weights.model_dump().items()}


def _shapes_ceiling(
    reconstruct: Callable[[Tensor], Tensor], data: DataConfig, device: torch.device
) -> dict[str, float]:
    """ShapeEval of reconstructed right scenes, as ``ceiling/strict`` and so on."""
    prompts = evaluation_prompts(data.image_size, per_tag=_CEILING_PROMPTS_PER_TAG, held_out=False)
    ceiling = tokenizer_ceiling(on_bytes(reconstruct, device, ROUNDING["standard"]), prompts, data.image_size)
    return {f"ceiling/{name}": value for name, value in ceiling.items()}


def on_bytes(
    reconstruct: Callable[[Tensor], Tensor], device: torch.device, rounding: Rounding
) -> Callable[[Tensor], Tensor]:
    """A reconstruction of float images in [-1, 1] on ``device`` as one of uint8 images on the CPU."""
    return lambda images: quantize(reconstruct(to_float(images.to(device))), rounding).cpu()
