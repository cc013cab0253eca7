"""Training of variational autoencoders (Kingma and Welling 2014): a KL-VAE (latent diffusion), TiTok's VAE mode.

    z    = mean + deviation * e                 e by (seed, epoch, sample)
    loss = pixels(decoder(z), image) + perceptual losses + realism + w * KL(posterior, N(0, 1))         per image
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavar.config.choice import resolve
from megavar.config.recipes.kl_vae import KLVAETrainingConfig
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel import seeds
from megavar.recipes.base import Losses, Parts, Pass
from megavar.recipes.tokenizer.reconstruction import ReconstructionTraining, sums
from megavar.tokenizers.trainable import PosteriorReconstruction, Variational


class KLVAEInputs(NamedTuple):
    """A prepared micro-batch."""

    images: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    normal: Tensor
    """float32 [B, L, C]."""


class KLVAETraining(ReconstructionTraining):
    """Trains a :class:`~megavar.tokenizers.trainable.Variational` by reconstruction of samples of its posteriors."""

    config: KLVAETrainingConfig

    def __init__(
        self, config: KLVAETrainingConfig, tokenizer: TokenizerChoice, seed: int, device: torch.device
    ) -> None:
        """Build the autoencoder, with random weights, and the losses that the config asks for, on ``device``.

        Raises:
            ConfigError: the tokenizer has no posteriors, or the discriminator does not fit the images.
            CheckpointError: weights of the perceptual losses are missing or wrong.
        """
        built: Any = resolve(tokenizer)(tokenizer)
        if not isinstance(built, Variational) or tokenizer.space.vocabulary is not None:
            raise ConfigError(
                f"recipe.name=kl_vae trains tokenizers of vectors that have posteriors, and tokenizer.name="
                f"{tokenizer.name} as configured has none. Choose tokenizer.name=kl_vae, tokenizer.name=titok with "
                f"quantization=vae and legacy=false, or the recipe that trains this one."
            )
        built.initialize(seeds.generator(seed, "initial_autoencoder"))
        super().__init__(config, built.to(device), tokenizer.space, seed, device)  # type: ignore[attr-defined]

    @classmethod
    def build(cls, parts: Parts) -> "KLVAETraining":
        """See :meth:`Recipe.build`."""
        config = parts.config
        assert isinstance(config.recipe, KLVAETrainingConfig)
        return cls(config.recipe, config.tokenizer, config.train.seed, parts.device)

    def prepare(self, batch: Batch, step: int) -> KLVAEInputs:
        """Images, and the noise of their posteriors."""
        space = self.tokenizer.space
        who = batch.epochs, batch.sample_ids
        normal = seeds.normal_tokens(self.seed, "posterior", *who, space.length, space.channels)
        return KLVAEInputs(batch.require_images(), normal)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Reconstruct, or judge images and their reconstructions by the updated autoencoder."""
        if module == "autoencoder":
            return [Pass(self.reconstruction, functools.partial(self.autoencoder_loss, step=step))]
        return self.judgements(step)

    def reconstruction(
        self, model: Callable[..., PosteriorReconstruction], inputs: KLVAEInputs
    ) -> PosteriorReconstruction:
        """Images through the autoencoder."""
        return model(inputs.images, normal=inputs.normal)

    def autoencoder_loss(self, output: PosteriorReconstruction, inputs: KLVAEInputs, step: int) -> Losses:
        """All losses of the autoencoder on one micro-batch."""
        total, named = self.image_loss(output.images, inputs.images, step, output.last_features)
        named["divergence"] = output.posterior.divergence().flatten(1).sum(1).mean()
        named["latent_power"] = output.posterior.mean.square().mean()
        total = total + self.config.kl_weight * named["divergence"]
        return sums(total, {"loss": total} | named, len(inputs.images), self.errors(named, inputs.images))
