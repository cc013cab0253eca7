"""Feature extractors that are trained on the spot: a small classifier of a source's own classes.

Inception weights are a download; these are not. The network is trained on the source's training images in seconds,
deterministically, kept in the user's cache, and registered with torch-fidelity under the name that appears in every
number made from it (``fid@digits-cnn``): such numbers compare models on that source and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from megavar.storage import sha256_of_file, write_bytes_atomic, write_json_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides data, seed and torch version."""

    resolution: int
    num_classes: int
    width: int = 24
    feature_dimension: int = 64
    steps: int = 300
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    version: int = 1  # raise when the code below changes what is learned


@dataclass(frozen=True)
class TrainedExtractor:
    """A registered extractor: its torch-fidelity ``name``, its weights and how well it classifies held-out images."""

    name: str
    path: Path
    sha256: str
    test_accuracy: float


class ClassifierNetwork(nn.Module):
    """Convolutions with halving resolution down to 4x4, global average, two linear layers.

    ``forward(images uint8 [B, 3, H, W]) -> (features [B, D], logits [B, C])`` in float32. Images of another size are
    brought to the training resolution by area averaging (or nearest neighbour upwards).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        layers: list[nn.Module] = []
        channels, width, side = 3, recipe.width, recipe.resolution
        while True:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.GELU()]
            channels, width = width, min(2 * width, 4 * recipe.width)
            if side <= 4:
                break
            layers.append(nn.AvgPool2d(2))
            side //= 2
        self.convolutions = nn.Sequential(*layers)
        self.project = nn.Linear(channels, recipe.feature_dimension)
        self.classify = nn.Linear(recipe.feature_dimension, recipe.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of uint8 images."""
        x = images.to(torch.float32) / 127.5 - 1
        side = self.recipe.resolution
        if x.shape[-2:] != (side, side):
            x = functional.interpolate(x, size=(side, side), mode="area")
        x = self.convolutions(x).mean(dim=(2, 3))
        features = functional.gelu(self.project(x))
        return features, self.classify(features)


class ClassifierExtractor(FeatureExtractorBase):
    """A ``ClassifierNetwork`` as torch-fidelity sees it; one class serves every registered name."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **unused: Any
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError(f"{name} is trained on the spot: pass feature_extractor_weights_path=extractor.path")
        self.network = load_network(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the layers that can be asked for."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The Inception score reads logits, the distances read features."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """It runs for seconds; compiling would take longer."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """Images of the least size."""
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested layers of uint8 images ``[B, 3, H, W]``."""
        features, logits = self.network(input)
        layers = {"features": features, "logits": logits}
        return tuple(layers[name] for name in self.features_list)


def cache_directory() -> Path:
    """Where extractors are kept: ``$MEGAVAR_CACHE``, else ``$XDG_CACHE_HOME/megavar``, else ``~/.cache/megavar``."""
    if os.environ.get("MEGAVAR_CACHE"):
        return Path(os.environ["MEGAVAR_CACHE"]) / "extractors"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megavar" / "extractors"


def trained_extractor(
    name: str,
    recipe: Recipe,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    seed: int = 0,
    directory: Path | None = None,
) -> TrainedExtractor:
    """Return the extractor ``name`` for this data, training it unless the cache holds it, and register it.

    ``train`` and ``test`` are (images uint8 [N, 3, S, S], labels int64 [N]). The file is named by the hash of recipe,
    data, seed and torch version; a file whose content does not match its recorded sha256 is trained anew.
    """
    identity = {"recipe": asdict(recipe), "data": _fingerprint(*train), "seed": seed, "torch": torch.__version__}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = (directory or cache_directory()) / f"{name}-{key}.safetensors"
    record = _read_record(path)
    if record is None:
        logger.info("training %s on %d images", name, len(train[0]))
        network = train_network(recipe, *train, seed=seed)
        content = safetensors.torch.save(network.state_dict(), {"recipe": json.dumps(asdict(recipe))})
        write_bytes_atomic(path, content)
        record = {**identity, "sha256": hashlib.sha256(content).hexdigest(), "test_accuracy": accuracy(network, *test)}
        write_json_atomic(_record_path(path), record)
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, ClassifierExtractor)
    return TrainedExtractor(name, path, record["sha256"], record["test_accuracy"])


def train_network(recipe: Recipe, images: Tensor, labels: Tensor, *, seed: int = 0) -> ClassifierNetwork:
    """Train a classifier on (uint8 [N, 3, S, S], int64 [N]) with random shifts; one thread, so the same bytes again."""
    # enable_grad: whoever scores images does so without gradients, and may be the first to need the network.
    with _one_thread(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierNetwork(recipe).train()
        optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps)
        reach = max(1, recipe.resolution // 16)
        for _ in range(recipe.steps):
            chosen = torch.randint(len(images), (recipe.batch,))
            shift = torch.randint(-reach, reach + 1, (2,)).tolist()
            batch = functional.pad(images[chosen], (reach,) * 4, mode="replicate")
            batch = batch.roll(shift, dims=(2, 3))[:, :, reach:-reach, reach:-reach]
            loss = functional.cross_entropy(network(batch)[1], labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def load_network(path: Path) -> ClassifierNetwork:
    """Load a network that ``trained_extractor`` wrote."""
    with safetensors.safe_open(path, framework="pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
    network = ClassifierNetwork(recipe)
    network.load_state_dict(safetensors.torch.load_file(path))
    return network.eval().requires_grad_(False)


def accuracy(network: ClassifierNetwork, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 ``images`` [N, 3, H, W] that the network puts into the class in ``labels`` [N]."""
    with torch.no_grad():
        guesses = torch.cat([network(batch)[1].argmax(dim=1) for batch in images.split(256)])
    return float((guesses == labels).double().mean())


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_record(path: Path) -> dict[str, Any] | None:
    """The cache record of ``path``, or None if weights or record are absent or do not belong together."""
    try:
        record = json.loads(_record_path(path).read_text())
        if record["sha256"] == sha256_of_file(path):
            return record
        logger.warning("%s is damaged (its sha256 is not the recorded one): training it anew", path)
    except FileNotFoundError:
        pass
    except (json.JSONDecodeError, KeyError, TypeError):
        logger.warning("%s is not readable: training %s anew", _record_path(path), path.name)
    return None


def _fingerprint(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(json.dumps([list(images.shape), list(labels.shape)]).encode())
    digest.update(images.contiguous().numpy().tobytes())
    digest.update(labels.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
