"""AliTok's encoder and its two decoders.

    [patches of the image, P + h w latent tokens] -> transformer -> P + h w vectors -> ids
    [learned tokens, vectors] -> transformer -> the last h w outputs -> image
                                 causal in the first stage, whose second head makes P patches of the prefix

Images are float32 [B, 3, H, W] in [-1, 1] as everywhere; inside they are in [0, 1]. Vectors are [B, L, C].
Sources: AliTok (arXiv:2506.05289); ali-vilab/alitok ``modeling/alitok.py``, ``train_tokenizer/model/vae_stage1.py``.
Attribute names are the published checkpoint's key names.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megavar.config.tokenizers.alitok import AliTokConfig
from megavar.errors import CheckpointError
from megavar.tokenizers.line import LineTokenizer
from megavar.tokenizers.vision import blocks, pixels


class Picture(NamedTuple):
    """What a decoder makes, in [0, 1]."""

    images: Tensor
    """[B, 3, H, W]."""
    strip: Tensor | None
    """Of the causal decoder: what the prefix stands for, [B, 3, patch, P * patch]."""


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] and latent tokens [L, W] -> [B, L, C]."""

    def __init__(self, config: AliTokConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.positional_embedding = nn.Parameter(torch.empty(config.side**2, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(config.space.length, width))
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = blocks(config.encoder)
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, config.code_dimension, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Encode."""
        patches = self.patch_embed(images).flatten(2).mT + self.positional_embedding
        latent = (latent_tokens + self.latent_token_positional_embedding).expand(len(images), -1, -1)
        x = self.ln_pre(torch.cat([patches, latent], 1))
        for block in self.transformer:
            x = block(x)
        return self.conv_out(self.ln_post(x[:, patches.shape[1] :]).mT[..., None]).squeeze(-1).mT


class Decoder(nn.Module):
    """Vectors [B, L, C] -> :class:`Picture`."""

    def __init__(self, config: AliTokConfig) -> None:
        super().__init__()
        width, learned = config.decoder.width, 1 if config.causal else config.registers
        self.side, self.patch, self.prefix, self.causal = config.side, config.patch, config.prefix, config.causal
        self.class_embedding = nn.Parameter(torch.empty(learned, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(config.space.length + learned, width))
        self.decoder_embed = nn.Linear(config.code_dimension, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = blocks(config.decoder)
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 3 * config.patch**2, 1))
        self.conv_out = nn.Conv2d(3, 3, 1)
        if config.causal:
            self.ffn_aux = nn.Sequential(nn.Conv2d(width, 3 * config.patch**2, 1))
            self.conv_out_aux = nn.Conv2d(3, 3, 1)

    def forward(self, vectors: Tensor) -> Picture:
        """Decode."""
        learned = self.class_embedding.expand(len(vectors), -1, -1)
        x = torch.cat([learned, self.decoder_embed(vectors)], 1) + self.latent_token_positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, causal=self.causal)
        x = self.ln_post(x[:, learned.shape[1] :]).mT  # [B, W, L]
        grid = x[..., self.prefix :].unflatten(-1, (self.side, self.side))
        images = self.conv_out(pixels(self.ffn(grid), self.patch)).sigmoid()
        if not self.causal:
            return Picture(images, None)
        strip = pixels(self.ffn_aux(x[..., None, : self.prefix]), self.patch)
        return Picture(images, self.conv_out_aux(strip).sigmoid())


class AliTok(LineTokenizer):
    """AliTok, a :class:`megavar.tokenizers.base.Codebook` of a line of tokens: the prefix, then the grid row by row."""

    decoder: Decoder
    trained_stage: Tensor
    """int64 scalar: of our training, the stage that it has reached; 2 of all other weights."""

    def __init__(self, config: AliTokConfig) -> None:
        super().__init__()
        self.config = config
        self.build_parts()
        self.register_buffer("trained_stage", torch.tensor(2))
        self.initialize()

    def build_parts(self) -> None:
        """Modules with values that :meth:`initialize` gives."""
        config = self.config
        self.latent_tokens = nn.Parameter(torch.empty(config.space.length, config.encoder.width))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = self.new_quantizer()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """As TiTok, but for the codes: normal with deviation 0.02, cut at twice of it."""
        super().initialize(generator)
        nn.init.trunc_normal_(self.quantize.embedding.weight, std=0.02, a=-0.04, b=0.04, generator=generator)

    def check_usable(self) -> None:
        """See :func:`megavar.frozen.check_usable`."""
        if int(self.trained_stage) == 1:
            raise CheckpointError(
                "These weights are of the first stage of AliTok's training, in which images are made by the causal "
                "decoder: the one that decodes tokens is trained in the second stage and random here. Continue the run "
                "(recipe.phases with stage: 2), or name a later checkpoint."
            )

    def picture(self, features: Tensor) -> tuple[Tensor, None]:
        """See :meth:`LineTokenizer.picture`; the last layer is a sigmoid."""
        return self.decoder(features).images, None

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] -> float32 [B, 3, H, W] in [-1, 1]."""
        return 2 * self.decoder(self.embed(tokens).to(self.dtype)).images.float() - 1
