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

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.alitok import AliTokConfig
from megavar.tokenizers.line import LineQuantizer
from megavar.tokenizers.vision import blocks, initialize_layers, pixels


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


class AliTok(nn.Module):
    """AliTok, a :class:`megavar.tokenizers.base.Codebook` of a line of tokens."""

    def __init__(self, config: AliTokConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_tokens = nn.Parameter(torch.empty(config.space.length, config.encoder.width))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = LineQuantizer(
            config.vocabulary_size, config.code_dimension, normalized=config.normalized_codes,
            commitment_weight=config.commitment_weight,
        )  # fmt: skip
        self.initialize()

    @property
    def space(self) -> TokenSpace:
        """Its tokens, as all others see them."""
        return self.config.space

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of all computation outside the quantizer, which is float32."""
        return self.latent_tokens.dtype

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters as TiTok does: tokens and positions normal with deviation 1 / sqrt(width)."""
        initialize_layers(self, generator)
        for part, width in ((self.encoder, self.config.encoder.width), (self.decoder, self.config.decoder.width)):
            for parameter in part.parameters(recurse=False):
                parameter.normal_(std=width**-0.5, generator=generator)
        self.latent_tokens.normal_(std=self.config.encoder.width**-0.5, generator=generator)
        bound = 1 / self.config.vocabulary_size
        self.quantize.embedding.weight.uniform_(-bound, bound, generator=generator)

    def vectors(self, images: Tensor) -> Tensor:
        """Encoder alone, with gradient: float [B, 3, H, W] in [-1, 1] -> [B, L, C]."""
        return self.encoder((images.to(self.dtype) + 1) / 2, self.latent_tokens)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Vectors before quantization: float [B, 3, H, W] in [-1, 1] -> float32 [B, L, C].

        Not under autocast, whatever the caller does: a rounded feature picks another token.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.vectors(images).float()

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """int64 [B, L]: the prefix, then the grid row by row."""
        return self.quantize.search(latents)

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors: int64 [...] -> float32 [..., C]."""
        return self.quantize.embed(ids)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] -> float32 [B, 3, H, W] in [-1, 1]."""
        return 2 * self.decoder(self.embed(tokens).to(self.dtype)).images.float() - 1
