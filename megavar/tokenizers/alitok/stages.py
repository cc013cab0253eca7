"""AliTok while it is trained: the released tokenizer, and the causal decoder that its tokens were made for."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megavar.config.tokenizers.alitok import AliTokConfig
from megavar.tokenizers.alitok.model import AliTok, Decoder, Picture
from megavar.tokenizers.trainable import QuantizerOutput


class StagedReconstruction(NamedTuple):
    """A :class:`~megavar.tokenizers.trainable.Reconstruction`, and what the causal decoder makes of the prefix."""

    images: Tensor
    quantized: QuantizerOutput
    last_features: None
    strip: Tensor | None
    """[B, 3, patch, P * patch] in [-1, 1]."""


class TwoDecoders(AliTok):
    """An :class:`AliTok` with the causal decoder under ``heads.``, which exports and readers leave out."""

    def __init__(self, config: AliTokConfig) -> None:
        super().__init__(config)
        self.enter(1)

    def enter(self, stage: int) -> None:
        """Mean the causal decoder (1), or that of the result (2)."""
        self.stage = stage
        self.trained_stage.fill_(stage)

    def build_parts(self) -> None:
        """Also the causal decoder."""
        super().build_parts()
        causal = self.config.model_copy(update={"causal": True})
        self.heads = nn.ModuleDict({"causal_decoder": Decoder(causal)})

    @property
    def current(self) -> Decoder:
        """The decoder of this stage."""
        decoder = self.heads["causal_decoder"] if self.stage == 1 else self.decoder
        assert isinstance(decoder, Decoder)
        return decoder

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Also the causal decoder."""
        super().initialize(generator)
        for parameter in self.heads["causal_decoder"].parameters(recurse=False):
            parameter.normal_(std=self.config.decoder.width**-0.5, generator=generator)

    def forward(  # type: ignore[override]
        self, images: Tensor, keys: Tensor | None = None, side: int | None = None
    ) -> StagedReconstruction:
        """Training forward pass; in stage 2 tokens are made without gradient."""
        assert side is None, "a line has no smaller images"
        with torch.set_grad_enabled(self.stage == 1 and torch.is_grad_enabled()):
            line = self.quantize(self.vectors(images))
        picture: Picture = self.current(line.features.to(self.dtype))
        strip = None if picture.strip is None else 2 * picture.strip - 1
        return StagedReconstruction(2 * picture.images - 1, self.quantize.watched(line), None, strip)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """By this stage's decoder."""
        return 2 * self.current(self.embed(tokens).to(self.dtype)).images.float() - 1

    def strip(self, images: Tensor) -> Tensor:
        """What the prefix stands for: the first patch, then the first row of patches, [B, 3, patch, P * patch]."""
        patch = self.config.patch
        return torch.cat([images[:, :, :patch, :patch], images[:, :, :patch]], -1)
