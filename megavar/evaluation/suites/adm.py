"""The suite that published numbers come from: ADM's metrics on Inception features."""

import functools
from pathlib import Path

import torch

from megavar.chunks import ChunkStore
from megavar.config.suites.adm import ADMSuite
from megavar.errors import check_all
from megavar.evaluation import adm
from megavar.evaluation.base import Scores, Suite
from megavar.evaluation.images import ImageSet
from megavar.evaluation.inception import ADMInception, check_weights
from megavar.evaluation.reference import check_reference, load_reference
from megavar.parallel.environment import Environment


class ADM(Suite[ADMSuite]):
    """FID, sFID, Inception score, precision and recall of any images.

    Features are taken while images are drawn, chunk by chunk, so that images need not be stored: 50,000 are 9.8 GB.
    """

    untrained_beside = False  # 50,000 images are no table row
    images_kept = 100  # those of the overview

    @property
    def label(self) -> str:
        """With the backend, whose formulas differ in the last digits."""
        return f"adm/{self.choice.backend}"

    def check(self) -> None:
        """The files must be there; any data fit."""
        weights, reference = Path(self.choice.inception_weights), Path(self.choice.reference)
        check_all(
            functools.partial(check_weights, weights, unofficial=self.choice.unofficial_weights),
            functools.partial(check_reference, reference),
        )

    def take_features(self, images: ImageSet, place: Environment, work_directory: Path) -> None:
        """Inception features of all images."""
        network = self._network(place.device)
        adm.stored_features(_features(work_directory, network), images, network, place)

    def score(self, images: ImageSet, device: torch.device, work_directory: Path) -> Scores:
        """Reduce the features."""
        network = self._network(device)
        features = adm.collect_features(ChunkStore.existing(_features(work_directory, network)))
        reference = load_reference(Path(self.choice.reference), network, device)
        if self.choice.backend == "torch-fidelity":
            metrics, notes = adm.torch_fidelity_metrics(features, reference, network)
        else:
            metrics, notes = adm.adm_metrics(features, reference, network, labels=images.labels)
        extractor = {"name": network.name, "sha256": network.weights_sha256}
        return Scores(metrics, (), extractor, reference.identity, notes + images.notes)

    def _network(self, device: torch.device) -> ADMInception:
        weights, unofficial = Path(self.choice.inception_weights), self.choice.unofficial_weights
        return ADMInception(weights, unofficial=unofficial).to(device)


def _features(work_directory: Path, network: ADMInception) -> Path:
    return work_directory / f"features-{network.name}"
