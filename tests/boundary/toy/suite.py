"""One metric: distance of class means."""

from pathlib import Path

import torch
from torch import Tensor

from megavar.conditions import ClassConditions
from megavar.data.build import build_source
from megavar.data.digits import Digits
from megavar.errors import ConfigError
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.images import ImageSet
from megavar.evaluation.table import Metric
from tests.boundary.toy.choices import ClassMeansSuite

CLASSES = 10


class ClassMeans(Suite[ClassMeansSuite]):
    """Mean over classes of the distance between mean images, in levels."""

    def check(self) -> None:
        """It knows the digits only."""
        if self.data.source.name != "digits":
            raise ConfigError(f"The suite {self.label} scores digits, not {self.data.source.name!r}.")

    def conditions(self) -> ClassConditions:
        """Ten classes in turn."""
        return ClassConditions(CLASSES)

    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """Compare with the training images."""
        assert images.labels is not None
        found = _means(images.read(0, len(images)), images.labels)
        distance = float((found - self._reference()).abs().mean())
        return Scores({"class_mean_distance": distance}, (Metric("class_mean_distance", "lower"),))

    def _reference(self) -> Tensor:
        source = build_source(self.data)
        assert isinstance(source, Digits)
        samples = [source.read(index) for index in range(len(source))]
        images = torch.stack([torch.as_tensor(sample.image).permute(2, 0, 1) for sample in samples])
        return _means(images, torch.tensor([sample.label for sample in samples]))


def _means(images: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([images[labels == label].float().mean(0) for label in range(CLASSES)])
