"""ADM's Inception network: the pooled, spatial and class features that FID, sFID, IS, precision and recall are made of.

The network and its weights are torch-fidelity's conversion of the TensorFlow graph of 2015-12-05 that ADM's evaluator
runs; torch-fidelity offers no spatial layer, so a hook takes it. Measured by a public port built the same way, the
five numbers agree with ADM's own script to 0.07 % (FID, sFID, IS) and 0.0023 (precision, recall).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from megavar.errors import CheckpointError
from megavar.storage import sha256_of_file
from megavar.weight_file import read_state_dict

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256_PREFIX = "6726825d"


@dataclass(frozen=True)
class InceptionFeatures:
    """Features of B images, float32: ``pool`` [B, 2048] and ``spatial`` [B, 2023]."""

    pool: Tensor
    spatial: Tensor


class ADMInception(nn.Module):
    """Inception as ADM's evaluator uses it.

    ``forward(images uint8 [B, 3, H, W]) -> InceptionFeatures``: TensorFlow's bilinear resize to 299, ``pool_3`` and the
    first 7 channels of ``mixed_6/conv`` flattened as TensorFlow lays them out (height, width, channel). The order
    matters: the published ``mu_s`` and ``sigma_s`` are in it, and sFID against them is 299 instead of 6 otherwise.
    """

    pool_dimensions = 2048
    spatial_dimensions = 17 * 17 * 7

    def __init__(self, weights: Path, *, unofficial: bool = False) -> None:
        """Load ``weights``, the file ``WEIGHTS_NAME``; ``unofficial`` accepts other weights of the same layout.

        Raises:
            CheckpointError: the file is absent or is not the expected one.
        """
        super().__init__()
        self.weights_sha256 = check_weights(weights, unofficial=unofficial)
        self.official = self.weights_sha256.startswith(WEIGHTS_SHA256_PREFIX)
        read_state_dict(weights, "Inception weights")  # torch-fidelity unpickles whatever it is given: check before
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"{weights} does not hold the tensors of torch-fidelity's inception-v3-compat "
                f"({str(error).splitlines()[-1].strip()[:200]}): pass {WEIGHTS_NAME}, or a state dict of its layout"
            ) from error
        self.eval().requires_grad_(False)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)  # TensorFlow's mixed_6 is torch's Mixed_6d

    @property
    def name(self) -> str:
        """``inception``, or for other than the official weights ``inception-`` and the start of their sha256."""
        return "inception" if self.official else f"inception-{self.weights_sha256[:8]}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of uint8 images [B, 3, H, W], computed in float32 whatever the surrounding precision settings."""
        with full_precision(images.device):
            (pool,) = self.network(images)
        assert self._spatial is not None
        spatial = self._spatial[:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
        self._spatial = None
        return InceptionFeatures(pool, spatial)

    @torch.no_grad()
    def logits(self, pool: Tensor) -> Tensor:
        """Class scores [N, 1008] of pooled features [N, 2048], without the bias (ADM multiplies by the weight only)."""
        with full_precision(pool.device):
            return pool @ self.network.fc.weight.T.to(pool.device)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output


def check_weights(path: Path, *, unofficial: bool = False) -> str:
    """Return the sha256 of the Inception weights in ``path`` after checking that they are the published ones."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"The Inception weights {path} do not exist. FID, sFID, IS, precision and recall of ADM's protocol need "
            f"the file {WEIGHTS_NAME} (sha256 starts with {WEIGHTS_SHA256_PREFIX}), published with release v0.2.0 of "
            f"toshas/torch-fidelity: download it on a machine with network and give its "
            f"path (--inception-weights, or inception_weights in a configuration)."
        )
    sha256 = sha256_of_file(path)
    if not unofficial and not sha256.startswith(WEIGHTS_SHA256_PREFIX):
        raise CheckpointError(
            f"The sha256 of the Inception weights {path} starts with {sha256[:8]}, but {WEIGHTS_NAME} starts with "
            f"{WEIGHTS_SHA256_PREFIX}: the file is truncated or is another network, and numbers made with it could not "
            f"be compared with published ones. Download it again, or use it under the name inception-{sha256[:8]} with "
            f"--unofficial-weights (unofficial_weights: true in a configuration)."
        )
    return sha256


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 that is float32: no autocast, no TF32 (samplers switch it on globally), restored afterwards."""
    # By torch's newer switches alone: its older ones raise where someone has set a newer one.
    backends: Any = torch.backends  # their attributes are not typed
    switches = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision
