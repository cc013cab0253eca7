"""The suite of the embedded digits: metrics of ``megavar.evaluation.digits``, with baselines."""

from pathlib import Path

import torch

from megavar.conditions import ClassConditions
from megavar.config.data import DataConfig
from megavar.config.suites.digits import DigitsSuite
from megavar.data.build import build_source
from megavar.evaluation import digits
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.images import ImageSet
from megavar.evaluation.suites.sources import classes_of, require_source


class Digits(Suite[DigitsSuite]):
    """Scores of digits that were asked for by class."""

    def __init__(self, choice: DigitsSuite, data: DataConfig) -> None:
        super().__init__(choice, data)
        self.untrained_beside = choice.baselines

    def check(self) -> None:
        """Only digits are scored."""
        require_source(self.choice.name, self.data, "digits")

    def conditions(self) -> ClassConditions:
        """Ten classes."""
        return ClassConditions(digits.NUM_CLASSES)

    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """All metrics of the suite."""
        metrics = digits.evaluate_digits(
            images.read(0, len(images)), classes_of(self.choice.name, images), directory=self._cache
        )
        extractor = digits.digits_extractor(self._cache)
        train = build_source(self.data)
        reference = {"name": "digits/train", "count": len(train), "fingerprint": train.fingerprint}
        return Scores(metrics, digits.METRICS, {"name": extractor.name, "sha256": extractor.sha256}, reference)

    def baselines(self, count: int) -> dict[str, dict[str, float]]:
        """Held-out digits, class Gaussians, class means, training copies and noise."""
        return digits.baselines(count, directory=self._cache) if self.choice.baselines else {}

    @property
    def _cache(self) -> Path | None:
        return Path(self.choice.extractor_cache) if self.choice.extractor_cache else None
