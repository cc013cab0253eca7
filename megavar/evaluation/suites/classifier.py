"""The suite of any source with classes: a classifier of these classes that is trained on the spot."""

from pathlib import Path

import torch

from megavar.conditions import ClassConditions
from megavar.config.data import DataConfig
from megavar.config.suites.classifier import ClassifierSuite
from megavar.data.build import build_source
from megavar.errors import ConfigError
from megavar.evaluation import classes
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.images import ImageSet
from megavar.evaluation.suites.sources import classes_of


class Classifier(Suite[ClassifierSuite]):
    """FID, Inception score, precision and recall on the classifier's features, and its verdict on the classes."""

    def __init__(self, choice: ClassifierSuite, data: DataConfig) -> None:
        super().__init__(choice, data)
        self.untrained_beside = choice.baselines

    def check(self) -> None:
        """Any source with classes but digits; test images are baselines."""
        source = self.data.source.name
        if source == "digits":
            raise ConfigError(
                "evaluation.suite.name=classifier does not score digits, which have a suite of their own with the same "
                "extractor name. Use evaluation.suite.name=digits."
            )
        if build_source(self.data).num_classes < 2:
            raise ConfigError(
                f"evaluation.suite.name=classifier needs classes, but data.source.name={source} has none. Use "
                f"evaluation.suite.name=shapes for captioned shapes, or adm with Inception weights."
            )
        if self.choice.baselines:
            build_source(self.data, "test")

    def conditions(self) -> ClassConditions:
        """The source's classes."""
        return ClassConditions(build_source(self.data).num_classes)

    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """All metrics of the suite."""
        real, labels = self._reference(), classes_of(self.choice.name, images)
        metrics = classes.evaluate_classes(images.read(0, len(images)), labels, real, directory=self._cache)
        extractor = classes.class_extractor(real, self._cache)
        reference = {"name": f"{real.source_name}/train", "count": len(real.train), "fingerprint": real.fingerprint}
        described = {"name": extractor.name, "sha256": extractor.sha256}
        return Scores(metrics, classes.class_metrics(real.source_name), described, reference)

    def baselines(self, count: int) -> dict[str, dict[str, float]]:
        """Held-out images, class means, training copies and noise."""
        if not self.choice.baselines:
            return {}
        return classes.class_baselines(self._reference(), count, directory=self._cache)

    def _reference(self) -> classes.ClassReference:
        return classes.class_reference(self.data, self.choice.reference_images)

    @property
    def _cache(self) -> Path | None:
        return Path(self.choice.extractor_cache) if self.choice.extractor_cache else None
