"""FID, Inception score, precision and recall by torch-fidelity on an extractor trained on the spot."""

from __future__ import annotations

from pathlib import Path

import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from megavar.errors import DataError
from megavar.evaluation.classifier import TrainedExtractor

NEIGHBOURS = 3


class ImageTensor(Dataset):
    """uint8 images [N, 3, H, W] as the dataset torch-fidelity reads."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def fidelity_metrics(images: Tensor, reference: Tensor, extractor: TrainedExtractor) -> dict[str, float]:
    """Compare ``images`` with ``reference`` (both uint8 [N, 3, H, W]) on the features of ``extractor``.

    Keys carry the extractor's name: ``fid@digits-cnn``, ``isc@...``, ``precision@...``, ``recall@...``. The Inception
    score takes all images as one split, because ten splits of a few hundred images would be biased low.
    """
    if len(images) <= NEIGHBOURS:
        raise DataError(f"precision and recall need more than {NEIGHBOURS} images, got {len(images)}: sample more")
    values = torch_fidelity.calculate_metrics(
        input1=ImageTensor(images),
        input2=ImageTensor(reference),
        fid=True,
        isc=True,
        prc=True,
        feature_extractor=extractor.name,
        feature_extractor_weights_path=str(Path(extractor.path)),
        isc_splits=1,
        prc_neighborhood=NEIGHBOURS,
        batch_size=256,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    keys = {
        "fid": torch_fidelity.KEY_METRIC_FID,
        "isc": torch_fidelity.KEY_METRIC_ISC_MEAN,
        "precision": torch_fidelity.KEY_METRIC_PRECISION,
        "recall": torch_fidelity.KEY_METRIC_RECALL,
    }
    return {f"{short}@{extractor.name}": float(values[key]) for short, key in keys.items()}
