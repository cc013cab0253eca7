"""Quantizer of tokens without places in the image. Everything is float32: a rounded distance picks another code."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.tokenizers.nearest import nearest
from megavar.tokenizers.trainable import Codes


class QuantizedLine(NamedTuple):
    """What becomes of vectors [B, L, C]."""

    features: Tensor
    """Codes with the gradient passed straight through to the vectors, [B, L, C]."""
    ids: Tensor
    """int64 [B, L]."""
    commitment: Tensor
    """Weighted commitment loss, scalar."""
    codebook: Tensor
    """Codebook loss, scalar."""


class LineQuantizer(nn.Module):
    """Each vector to the nearest of V codes; of unit length both, if ``normalized``."""

    def __init__(self, vocabulary: int, channels: int, *, normalized: bool, commitment_weight: float) -> None:
        super().__init__()
        self.normalized, self.commitment_weight = normalized, commitment_weight
        self.embedding = Codes(vocabulary, channels)

    def scaled(self, vectors: Tensor) -> Tensor:
        """float32 [..., C] as they are compared."""
        return F.normalize(vectors.float(), dim=-1) if self.normalized else vectors.float()

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors: int64 [...] -> float32 [..., C]."""
        return self.scaled(self.embedding(ids))

    def search(self, vectors: Tensor) -> Tensor:
        """float [B, L, C] -> int64 [B, L]."""
        return nearest(self.scaled(vectors).flatten(0, 1), self.scaled(self.embedding())).view(vectors.shape[:2])

    def forward(self, vectors: Tensor) -> QuantizedLine:
        """Quantize for training: the losses are beta mse(sg(e), z) and mse(e, sg(z))."""
        with torch.autocast(vectors.device.type, enabled=False):
            z, ids = self.scaled(vectors), self.search(vectors)
            code = self.embed(ids)
            commitment = self.commitment_weight * F.mse_loss(code.detach(), z)
            return QuantizedLine(z + (code - z).detach(), ids, commitment, F.mse_loss(code, z.detach()))
