"""Handwritten digits: 1797 real 8x8 images in ten classes, bundled with scikit-learn.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI machine learning repository (CC BY
4.0), test part. ``sklearn.datasets.load_digits`` reads it without network.
"""

import hashlib

import numpy as np

from megavar.data.source import Sample, Split
from megavar.errors import ConfigError

LEVELS = 16
"""Original grey values are the integers 0..16."""


class Digits:
    """The digits, enlarged by pixel repetition and shown in grey RGB.

    The split is fixed: within each class, in file order, every fifth image from the first on is a test image (364),
    the others are for training (1433).
    """

    def __init__(self, split: Split, image_size: int = 16) -> None:
        from sklearn.datasets import load_digits

        if image_size % 8:
            raise ConfigError(
                f"data.image_size is {image_size}, but digits are 8x8 images enlarged by pixel repetition. "
                f"Use a multiple of 8, for example 16."
            )
        digits = load_digits()
        rank_in_class = np.zeros(len(digits.target), dtype=np.int64)
        for label in range(10):
            members = np.flatnonzero(digits.target == label)
            rank_in_class[members] = np.arange(len(members))
        chosen = np.flatnonzero((rank_in_class % 5 == 0) == (split == "test"))
        self.split: Split = split
        self.class_names = tuple(str(label) for label in range(10))
        self.original = digits.images[chosen].astype(np.uint8)
        """uint8 [N, 8, 8], values 0..16."""
        self.labels = digits.target[chosen].astype(np.int64)
        grey = np.rint(self.original * (255 / LEVELS)).astype(np.uint8)
        grey = grey.repeat(image_size // 8, axis=1).repeat(image_size // 8, axis=2)
        self._images = np.ascontiguousarray(np.broadcast_to(grey[..., None], (*grey.shape, 3)))
        content = hashlib.sha256(self._images.tobytes() + self.labels.tobytes())
        self.fingerprint = f"digits-{split}-{image_size}-{content.hexdigest()[:16]}"

    @property
    def num_classes(self) -> int:
        """Ten."""
        return 10

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Sample:
        """Sample ``index``, an image of shape [image_size, image_size, 3]."""
        return Sample(key=f"digit-{index}", label=int(self.labels[index]), image=self._images[index])
