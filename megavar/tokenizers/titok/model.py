"""TiTok's encoder and decoder.

    [patches of the image, K latent tokens]  -> transformer -> K vectors -> ids (or normal distributions)
    [mask tokens of all positions, K vectors] -> transformer -> codes of a VQGAN (legacy), or pixels

Images are float32 [B, 3, H, W] in [-1, 1] as everywhere; inside they are in [0, 1]. Vectors are [B, K, C].
Sources: TiTok (arXiv:2406.07550); bytedance/1d-tokenizer ``modeling/titok.py``, ``modeling/modules/blocks.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.config.tokenizers.titok import TiTokConfig
from megavar.tokenizers import convolution, maskgit_vqgan
from megavar.tokenizers.line import LineTokenizer
from megavar.tokenizers.posterior import Posterior
from megavar.tokenizers.trainable import MixedCodes, PosteriorReconstruction, QuantizerOutput, Reconstruction
from megavar.tokenizers.vision import blocks, pixels


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] and latent tokens [K, W] -> [B, K, C]."""

    def __init__(self, config: TiTokConfig, channels: int) -> None:
        super().__init__()
        sizes = config.encoder
        self.legacy = config.legacy
        self.class_embedding = nn.Parameter(torch.empty(1, sizes.width))
        positions = (config.image_side // config.patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(torch.empty(positions, sizes.width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(config.tokens, sizes.width))
        self.patch_embed = nn.Conv2d(3, sizes.width, config.patch, stride=config.patch)
        self.ln_pre = nn.LayerNorm(sizes.width)
        self.transformer = blocks(sizes)
        self.ln_post = nn.LayerNorm(sizes.width)
        self.conv_out = nn.Conv2d(sizes.width, channels, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Encode."""
        patches = self.patch_embed(images).flatten(2).mT
        first = self.class_embedding.expand(len(images), 1, -1)
        latent = (latent_tokens + self.latent_token_positional_embedding).expand(len(images), -1, -1)
        x = self.ln_pre(torch.cat([torch.cat([first, patches], 1) + self.positional_embedding, latent], 1))
        for block in self.transformer:
            x = block(x)
        h = self.ln_post(x[:, -latent.shape[1] :])
        # [B, K, W] read as [B, W, K], without a transpose: a slip of the first public code, and part of its weights.
        h = h.reshape(len(h), h.shape[2], h.shape[1], 1) if self.legacy else h.mT[..., None]
        return self.conv_out(h).squeeze(-1).mT


class Decoder(nn.Module):
    """Vectors [B, K, C] -> logits of codes [B, V, h, w] (legacy), or images [B, 3, H, W] in [0, 1], not clamped."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        width = config.decoder.width
        self.side = config.image_side // config.decoder_patch
        self.patch, self.legacy = config.decoder_patch, config.legacy
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(self.side**2 + 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(config.tokens, width))
        self.decoder_embed = nn.Linear(config.code_dimension, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = blocks(config.decoder)
        self.ln_post = nn.LayerNorm(width)
        if self.legacy:
            last = nn.Conv2d(2 * width, config.pixel.vocabulary_size, 1)
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), last)
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * self.patch**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Decode."""
        h = self.before_convolution(vectors)
        return h if self.legacy else self.conv_out(h)

    def before_convolution(self, vectors: Tensor) -> Tensor:
        """Logits of codes, or the input [B, 3, H, W] of the last convolution."""
        latent = self.decoder_embed(vectors) + self.latent_token_positional_embedding
        masks = self.mask_token.expand(len(vectors), self.side**2, -1)
        first = self.class_embedding.expand(len(vectors), 1, -1)
        x = self.ln_pre(torch.cat([torch.cat([first, masks], 1) + self.positional_embedding, latent], 1))
        for block in self.transformer:
            x = block(x)
        h = self.ffn(self.ln_post(x[:, 1 : 1 + self.side**2]).mT.unflatten(-1, (self.side, self.side)))
        return h if self.legacy else pixels(h, self.patch)


class PixelCodes(nn.Module):
    """The codebook of the VQGAN whose codes a legacy model predicts."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.embedding = MixedCodes(config.pixel.vocabulary_size, config.pixel.code_dimension)

    def forward(self, logits: Tensor) -> Tensor:
        """Expected code: logits [B, V, h, w] -> float32 [B, C, h, w]."""
        shares = logits.float().softmax(1).flatten(2).mT
        return self.embedding(shares).mT.unflatten(-1, logits.shape[2:])


class Predicted(NamedTuple):
    """What the first stage trains."""

    logits: Tensor
    """Of the proxy's codes, [B, V, h, w]."""
    quantized: QuantizerOutput


class TiTok(LineTokenizer):
    """TiTok, a :class:`megavar.tokenizers.base.Codebook` of 1-D tokens; with ``quantization=vae`` of vectors.

    A legacy model always holds the decoder of the VQGAN whose codes it predicts; in the first stage that is frozen.
    """

    decoder: Decoder
    ends_in_convolution = True
    decoding = ("decoder.", "pixel_quantize.", "pixel_decoder.")

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.config = config
        discrete = config.quantization == "vq"
        self.latent_tokens = nn.Parameter(torch.empty(config.tokens, config.encoder.width))
        self.encoder = Encoder(config, config.code_dimension * (1 if discrete else 2))
        self.decoder = Decoder(config)
        if discrete:
            self.quantize = self.new_quantizer()
        if config.legacy:
            self.pixel_quantize = PixelCodes(config)
            self.pixel_decoder = maskgit_vqgan.Decoder(config.pixel)
        self.initialize()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Also the decoder of the VQGAN and its codes."""
        super().initialize(generator)
        if self.config.legacy:
            convolution.initialize_layers(self.pixel_decoder, generator)
            bound = 1 / self.config.pixel.vocabulary_size
            self.pixel_quantize.embedding.weight.uniform_(-bound, bound, generator=generator)

    def posterior(self, latents: Tensor) -> Posterior:
        """Of ``quantization=vae``: means and log variances [B, K, 2 C] -> distributions of [B, K, C]."""
        return Posterior.of(latents, -1)

    def picture(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`LineTokenizer.picture`."""
        h = self.decoder.before_convolution(features)
        if not self.config.legacy:
            return self.decoder.conv_out(h), h
        last_features = self.pixel_decoder.last_features(self.pixel_quantize(h).to(self.dtype))
        return self.pixel_decoder.conv_out(last_features), last_features

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        keys: Tensor | None = None,
        side: int | None = None,
        *,
        codes: bool = False,
        normal: Tensor | None = None,
    ) -> Reconstruction | Predicted | PosteriorReconstruction:
        """See :meth:`LineTokenizer.forward`; with ``codes``, which legacy models offer, the first stage's; with
        ``normal``, standard normal numbers [B, K, C], of ``quantization=vae``."""
        if normal is not None:
            posterior = self.posterior(self.vectors(images))
            made, last_features = self.picture(posterior.sample(normal).to(self.dtype))
            return PosteriorReconstruction(2 * made - 1, posterior, last_features.detach())
        if not codes:
            return super().forward(images, keys, side)
        line = self.quantize(self.vectors(images))
        return Predicted(self.decoder(line.features.to(self.dtype)), self.quantize.watched(line))

    @property
    def proxy(self) -> MaskGITVQGANConfig | None:
        """The VQGAN whose codes a legacy model predicts."""
        return self.config.pixel if self.config.legacy else None

    @torch.no_grad()
    def adopt(self, proxy: maskgit_vqgan.MaskGITVQGAN) -> None:
        """Take the decoder and the codes of the VQGAN."""
        self.pixel_decoder.load_state_dict(proxy.decoder.state_dict())
        self.pixel_quantize.embedding.weight.copy_(proxy.quantizer.embedding.weight)

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """int64 [B, K]; of ``quantization=vae`` means, float32 [B, K, C]."""
        return super().tokens(latents) if self.config.quantization == "vq" else self.posterior(latents).mean

    def sample(self, latents: Tensor, normal: Tensor) -> Tensor:
        """Of ``quantization=vae``: see :class:`megavar.tokenizers.base.Continuous`."""
        return self.posterior(latents).sample(normal)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [B, K] (or vectors [B, K, C]) -> float32 [B, 3, H, W] clamped to [-1, 1]."""
        vectors = self.embed(tokens) if self.config.quantization == "vq" else tokens
        return (2 * self.picture(vectors.to(self.dtype))[0].float() - 1).clamp(-1, 1)
