"""MaskGIT's quantizer: the nearest code in Euclidean distance. In float32: a rounded distance picks another code."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.tokenizers.nearest import nearest
from megavar.tokenizers.trainable import Codes, QuantizerOutput, by_side


class NearestCode(nn.Module):
    """Vectors of a map to the nearest of V codes."""

    usage_average: Tensor

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        self.codebook_weight = config.codebook_weight
        self.embedding = Codes(config.vocabulary_size, config.code_dimension)
        self.parts = by_side((config.side,))
        self.register_buffer("usage_average", torch.zeros(1, config.vocabulary_size))  # of our training

    def search(self, features: Tensor) -> Tensor:
        """Tokens of a feature map: float [B, C, h, w] -> int64 [B, h * w], row-major."""
        rows = features.float().flatten(2).mT
        return nearest(rows.flatten(0, 1), self.embedding()).view(len(features), -1)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize for training: loss = mse(sg(e), z) + beta mse(e, sg(z)), beta on the *codebook* term."""
        with torch.autocast(features.device.type, enabled=False):
            z = features.float()
            ids = self.search(z)
            code = self.embedding(ids).mT.reshape(z.shape)
            loss = F.mse_loss(code.detach(), z) + self.codebook_weight * F.mse_loss(code, z.detach())
            usage = torch.bincount(ids.flatten(), minlength=self.embedding.num_embeddings).float()
            targets = z.detach().flatten(2).mT
            return QuantizerOutput(z + (code - z).detach(), loss, [ids], targets, usage[None])
