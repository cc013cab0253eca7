"""Latents of test images: what analyses of tokenizers look at. N images, L places in each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.analysis.base import Subject
from megavar.analysis.images import first_images
from megavar.assembly import load_tokenizer
from megavar.config.analyses.base import ObservedChoice
from megavar.data.pixels import to_float
from megavar.errors import ConfigError
from megavar.tokenizers.base import Codebook, Semantic, Tokenizer

PIXELS = "pixels"


@dataclass(frozen=True)
class Shown:
    """Images, and several representations of them by name."""

    images: Tensor
    """uint8 [N, 3, H, W]."""
    labels: np.ndarray
    """Their classes, int64 [N]; all alike where the data have none."""
    vectors: dict[str, np.ndarray]
    """float32 [N, L, C], places row by row."""

    @property
    def classes(self) -> int:
        """How many there are among the images."""
        return len(np.unique(self.labels))


def show(runs: Sequence[Subject], choice: ObservedChoice) -> Shown:
    """Latents of every run, what pretrained encoders say before (once where several say the same), and the pixels of
    the first run's patches.

    Raises:
        ConfigError: a run trains no tokenizer, or the first one's latents are no map.
    """
    vectors: dict[str, np.ndarray] = {}
    read: list[tuple[Tensor, Tensor]] = []
    for run in runs:
        if run.config.recipe.trains != "tokenizer":
            raise ConfigError(f"The run {run.name} trains no tokenizer: name the run of its tokenizer.")
        read.append(first_images(run.config, choice.images))
        tokenizer = load_tokenizer(run.config.tokenizer, str(run.directory), run.device)
        for name, found in _of(tokenizer, read[-1][0], choice.batch, run).items():
            if not any(np.array_equal(found, other) for other in vectors.values()):  # frozen encoders are alike
                vectors[name] = found
    images, labels = read[0]
    places = next(iter(vectors.values())).shape[1]
    return Shown(images, labels.numpy(), vectors | {PIXELS: patches(images, places, runs[0].name)})


def patches(images: Tensor, places: int, name: str) -> np.ndarray:
    """uint8 [N, 3, H, W] as float32 [N, ``places``, 3 p p] in [-1, 1], row by row.

    Raises:
        ConfigError: so many patches are no square map of the images of ``name``.
    """
    side = round(places**0.5)
    if side * side != places or images.shape[2] % side or images.shape[3] % side:
        raise ConfigError(f"The latents of {name} are no square map: this analysis compares places of images.")
    size = (images.shape[2] // side, images.shape[3] // side)
    return F.unfold(to_float(images), size, stride=size).mT.numpy()


@torch.no_grad()
def _of(tokenizer: Tokenizer, images: Tensor, batch: int, run: Subject) -> dict[str, np.ndarray]:
    latents, semantic = [], []
    for part in images.split(batch):
        given = to_float(part).to(run.device)
        tokens = tokenizer.tokens(tokenizer.encode(given))
        if isinstance(tokenizer, Codebook) and tokenizer.space.vocabulary is not None:
            tokens = tokenizer.embed(tokens)
        latents.append(tokens.float().cpu())
        if isinstance(tokenizer, Semantic):
            semantic.append(tokenizer.semantic(given).float().cpu())
    found = {f"{run.name}, latents": torch.cat(latents).numpy()}
    return found | ({f"{run.name}, encoder": torch.cat(semantic).numpy()} if semantic else {})
