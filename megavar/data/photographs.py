"""Crops of ten colour photographs bundled with scikit-image and scikit-learn: natural images without a download.

Class = photograph. Training and test crops come from disjoint regions of each photograph. Credits: scikit-image's
``skimage/data/README.txt`` (public domain or CC0: astronaut and hubble by NASA, rocket by SpaceX, chelsea, coffee,
retina, immunohistochemistry, motorcycle of the Middlebury stereo set) and scikit-learn's ``china`` and ``flower``
(CC BY 2.0, T. Boyd and D. Sinclair).
"""

import functools
import hashlib

import numpy as np
import torch
from PIL import Image

from megavar.data.source import Sample, Split
from megavar.errors import ConfigError
from megavar.parallel.seeds import uniform

TRAIN_SHARE = 0.7
"""Share of the longer side of a photograph that training crops come from; test crops come from the rest."""


def _load_photographs() -> dict[str, np.ndarray]:
    from skimage import data
    from sklearn.datasets import load_sample_image

    return {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "china": load_sample_image("china.jpg"),
        "coffee": data.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "hubble": data.hubble_deep_field(),
        "immunohistochemistry": data.immunohistochemistry(),
        "motorcycle": data.stereo_motorcycle()[0],
        "retina": data.retina(),
        "rocket": data.rocket(),
    }


@functools.cache
def _resized_photographs(short_side: int) -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] by name, the shorter side resized to ``short_side`` pixels (0: as bundled)."""
    resized = {}
    for name, pixels in _load_photographs().items():
        image = Image.fromarray(pixels)
        if short_side:
            scale = short_side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS)
        resized[name] = np.asarray(image)
    return resized


class Photographs:
    """A fixed number of square crops. Crop i shows photograph ``i % 10`` at a place given by (seed, i) alone."""

    def __init__(self, split: Split, image_size: int, *, length: int, short_side: int = 256, seed: int = 0) -> None:
        photographs = _resized_photographs(short_side)
        self.split: Split = split
        self.class_names = tuple(photographs)
        self.image_size = image_size
        self._regions = [self._region(pixels) for pixels in photographs.values()]
        smallest = min(min(region.shape[:2]) for region in self._regions)
        if image_size > smallest:
            raise ConfigError(
                f"data.image_size is {image_size}, but the {split} region of the smallest photograph is only "
                f"{smallest} pixels wide. Use a smaller image_size or a larger data.source.short_side."
            )
        self._places = uniform(seed, f"photographs/{split}", torch.arange(length)[:, None], torch.arange(2)).numpy()
        content = hashlib.sha256(b"".join(region.tobytes() for region in self._regions) + self._places.tobytes())
        self.fingerprint = f"photographs-{split}-{image_size}-{content.hexdigest()[:16]}"

    def _region(self, pixels: np.ndarray) -> np.ndarray:
        axis = int(pixels.shape[1] >= pixels.shape[0])
        boundary = round(pixels.shape[axis] * TRAIN_SHARE)
        train, test = np.split(pixels, [boundary], axis=axis)
        return train if self.split == "train" else test

    @property
    def num_classes(self) -> int:
        """Number of photographs."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Sample:
        """Crop ``index``, an image of shape [image_size, image_size, 3]."""
        label = index % len(self._regions)
        region, size = self._regions[label], self.image_size
        top = int(self._places[index, 0] * (region.shape[0] - size + 1))
        left = int(self._places[index, 1] * (region.shape[1] - size + 1))
        image = region[top : top + size, left : left + size]
        return Sample(key=f"{self.class_names[label]}-{top}-{left}", label=label, image=image)
