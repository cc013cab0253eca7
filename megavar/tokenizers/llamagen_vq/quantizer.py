"""Nearest codes by direction, at every scale independently.

    h_s  = area_resize(h, s)             every scale of the same feature map h: no residual
    z    = h_s / |h_s|                   unit length per position
    id   = nearest normalized code
    input of scale k + 1 = bicubic_resize(code of scale k, s_{k+1})

Sources: FlexVAR (arXiv:2502.20313) section 3, jiaosiyu1999/FlexVAR ``trainer.py``; the quantizer is LlamaGen's
``tokenizer_image/vq_model.py``. Everything is float32: a rounded distance picks another code.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.tokenizers.llamagen_vq import LlamaGenVQConfig
from megavar.tokenizers.nearest import nearest
from megavar.tokenizers.trainable import Codes, QuantizerOutput, by_side


class UnitQuantizer(nn.Module):
    """LlamaGen's quantizer: unit vectors to the nearest of V unit codes.

    Stored codes have any length; their directions count.
    """

    codebook_used: Tensor
    usage_average: Tensor

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__()
        self.commitment_weight = config.commitment_weight
        self.embedding = Codes(config.vocabulary_size, config.code_dimension)
        self.parts = by_side(config.scales[-1:])
        self.register_buffer("codebook_used", torch.zeros(config.usage_window))
        # Of our training, and not in published files.
        self.register_buffer("usage_average", torch.zeros(1, config.vocabulary_size))

    def codes(self) -> Tensor:
        """float32 [V, C], unit length."""
        return F.normalize(self.embedding(), dim=-1)

    def embed(self, ids: Tensor) -> Tensor:
        """Unit code vectors of tokens: int64 [...] -> float32 [..., C]."""
        return F.normalize(self.embedding(ids), dim=-1)

    def search(self, features: Tensor) -> Tensor:
        """Tokens of a feature map: float [B, C, h, w] -> int64 [B, h * w], row-major."""
        rows = F.normalize(features.float(), dim=1).flatten(2).mT
        return nearest(rows.flatten(0, 1), self.codes()).view(len(features), -1)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize one map for training: loss = mse(code, sg(z)) + beta mse(sg(code), z) of unit vectors z."""
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=1)
            ids = self.search(features)
            code = self.embed(ids).mT.reshape(z.shape)
            loss = F.mse_loss(code, z.detach()) + self.commitment_weight * F.mse_loss(code.detach(), z)
            usage = torch.bincount(ids.flatten(), minlength=self.embedding.num_embeddings).float()
            targets = z.detach().flatten(2).mT
            return QuantizerOutput(z + (code - z).detach(), loss, [ids], targets, usage[None])

    def maps(self, features: Tensor, sides: Sequence[int]) -> Iterator[Tensor]:
        """Tokens of every scale, coarse to fine: [B, C, h, w] -> int64 [B, s * s] each.

        Area resizing of maps of any size: images of another resolution have other, larger scales.
        """
        with torch.autocast(features.device.type, enabled=False):
            for side in sides:
                yield self.search(F.interpolate(features.float(), size=(side, side), mode="area"))

    def following(self, ids: Tensor, side: int, next_side: int) -> Tensor:
        """What is known of a scale from the one before it: int64 [B, side^2] -> float32 [B, next_side^2, C]."""
        known = self.embed(ids).mT.unflatten(-1, (side, side))
        return F.interpolate(known, size=(next_side, next_side), mode="bicubic").flatten(2).mT
