"""Training of VGT-AE (VGT section 3.2).

    f   = E(x),  z = phi(f)                      E: vision encoder, begins as a vision-language model's
    x^  = D(z + noise)                           z normalized and disturbed in the second stage, Eq. 5
    L   = |x - x^|^2 + LPIPS + GAN               Eq. 2 (second stage: without GAN, Eq. 6; released: with)
          + w |E_0(x) - E(x)|^2                  Eq. 3, 4: E_0 is E before training, frozen

Images are in [-1, 1], where squared errors are four times those of the released code, whose images are in [0, 1].
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavar.config.choice import resolve
from megavar.config.recipes.vgt_ae import VGTAETrainingConfig
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel import seeds
from megavar.parallel.parameter_rule import ParameterRule
from megavar.recipes.base import Losses, Parts, Pass
from megavar.recipes.latent_noise import disturbance
from megavar.recipes.tokenizer.reconstruction import ReconstructionTraining, sums
from megavar.tokenizers.posterior import Posterior
from megavar.tokenizers.vgt_ae import VGTAE
from megavar.tokenizers.vgt_ae.model import AutoencoderOutput
from megavar.tokenizers.vgt_ae.pretrained import load_decoder, load_encoder

ENCODER, TOWER = "encoder.", "encoder.tower."
_POSITIONS = ("embed", "cls_token")
"""In names of tensors that do not decay whatever their shape: patches, positions, the class token (released)."""


class AutoencoderInputs(NamedTuple):
    """A prepared micro-batch."""

    images: Tensor
    """float32 [B, 3, H, W] in [-1, 1]."""
    noise: Tensor | None
    """Added to latents, float32 [B, L, d_z]."""
    normal: Tensor | None
    """Of a posterior's sample, float32 [B, L, d_z]."""
    semantic: Tensor | None
    """What the frozen encoder says, float32 [B, L, d]."""


class VGTAETraining(ReconstructionTraining):
    """Trains a :class:`VGTAE`."""

    config: VGTAETrainingConfig
    tokenizer: VGTAE

    def __init__(
        self, config: VGTAETrainingConfig, tokenizer: TokenizerChoice, seed: int, device: torch.device
    ) -> None:
        """Build the autoencoder and what its training asks for, on ``device``.

        Raises:
            ConfigError: the tokenizer is another one, or a package is missing.
            CheckpointError: weights are missing or wrong.
        """
        built = resolve(tokenizer)(tokenizer)
        if not isinstance(built, VGTAE):
            raise ConfigError(
                f"recipe.name=vgt_ae trains tokenizer.name=vgt_ae, and tokenizer.name={tokenizer.name} is another one. "
                f"Choose the recipe that trains it."
            )
        built.initialize(seed)
        if config.encoder_weights is not None:
            load_encoder(built, config.encoder_weights, key="recipe.encoder_weights")
        if config.decoder_weights is not None:
            load_decoder(built, config.decoder_weights, key="recipe.decoder_weights")
        self.teacher: Any = None
        if config.encoder == "trained" and config.distillation_weight > 0:
            self.teacher = copy.deepcopy(built.encoder).eval().requires_grad_(False).to(device)
        super().__init__(config, built.to(device), tokenizer.space, seed, device)

    @classmethod
    def build(cls, parts: Parts) -> "VGTAETraining":
        """See :meth:`Recipe.build`."""
        config = parts.config
        assert isinstance(config.recipe, VGTAETrainingConfig)
        return cls(config.recipe, config.tokenizer, config.train.seed, parts.device)

    def rule(self, module: str, parameter: str) -> ParameterRule:
        """Matrices and convolutions decay, but not embeddings; the vision encoder has a learning rate of its own."""
        matrix = self.dimensions[module][parameter] > 1 and not any(part in parameter for part in _POSITIONS)
        if module != "autoencoder":
            return ParameterRule(decays=matrix)
        factor = self.config.encoder_lr_factor if parameter.startswith(TOWER) else 1.0
        frozen = self.config.encoder == "frozen" and parameter.startswith(ENCODER)
        return ParameterRule(decays=matrix, lr_factor=factor, frozen=frozen)

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> AutoencoderInputs:
        """Images, noise by (seed, epoch, sample), and what the frozen encoder says."""
        images, config = batch.require_images(), self.config
        noise = None
        if config.noise is not None:
            uniform = seeds.uniform(self.seed, "latent_noise_strength", batch.epochs, batch.sample_ids)
            noise = disturbance(config.noise.kind, config.noise.strength, self._normal("latent_noise", batch), uniform)
        normal = self._normal("posterior", batch) if self.tokenizer.config.posterior else None
        semantic = None if self.teacher is None else self.teacher.semantic(images)
        return AutoencoderInputs(images, noise, normal, semantic)

    def _normal(self, stream: str, batch: Batch) -> Tensor:
        space = self.tokenizer.space
        who = batch.epochs, batch.sample_ids
        return seeds.normal_tokens(self.seed, stream, *who, space.length, space.channels)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Reconstruct, or judge images and their reconstructions by the updated autoencoder."""
        if module == "autoencoder":
            return [Pass(self.reconstruction, functools.partial(self.autoencoder_loss, step=step))]
        return self.judgements(step)

    def reconstruction(self, model: Callable[..., AutoencoderOutput], inputs: AutoencoderInputs) -> AutoencoderOutput:
        """Images through the autoencoder."""
        return model(inputs.images, inputs.noise, inputs.normal)

    def autoencoder_loss(self, output: AutoencoderOutput, inputs: AutoencoderInputs, step: int) -> Losses:
        """All losses of the autoencoder on one micro-batch."""
        total, named = self.image_loss(output.images, inputs.images, step)
        if inputs.semantic is not None:
            named["distillation"] = (output.semantic - inputs.semantic).square().mean()
            total = total + self.config.distillation_weight * named["distillation"]
        if self.tokenizer.config.posterior:
            divergence = Posterior.of(output.latents, 1).divergence()
            named["divergence"] = divergence.flatten(1).sum(1).mean()
            total = total + self.config.kl_weight * named["divergence"]
        named["latent_power"] = output.latents[:, : self.tokenizer.space.channels].square().mean()
        return sums(total, {"loss": total} | named, len(inputs.images), self.errors(named, inputs.images))
