"""Training of VAR's tokenizer, which its authors never released (VAR Eq. 5).

    f              = encoder(image)
    f_hat, q       = residual multi-scale quantizer(f)      q: codebook + beta * commitment loss, mean over scales
    reconstruction = decoder(f_hat)
    loss           = pixels(reconstruction, image) + lambda_P * LPIPS(reconstruction, image) + q
                     + lambda_G * w * realism(discriminator(reconstruction))        from a start step on
    discriminator  : tells image from reconstruction; w balances it against the reconstruction (VQGAN Eq. 7)
    after the step : codes that are hardly used restart as vectors of the current batch

At step 0 the whole codebook is drawn from the first batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megavar.config.recipes.tokenizer import TokenizerTrainingConfig
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel.parameter_rule import ParameterRule
from megavar.parallel.seeds import generator, random_bits
from megavar.recipes.base import BaseRecipe, Losses, Parts, Pass, WriteRows, frozen
from megavar.recipes.tokenizer.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    lecam_regularization,
    reconstruction_realism_loss,
    with_gradient,
)
from megavar.recipes.tokenizer.codebook import CodebookUpkeep, usage_metrics
from megavar.tokenizers.multiscale_vq import MultiScaleVQ, Reconstruction
from megavar.tokenizers.perceptual import VGG16, PerceptualDistance

_PEAK_TO_PEAK = 2.0  # images are in [-1, 1]


class TokenizerInputs(NamedTuple):
    """A prepared micro-batch."""

    images: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    keys: Tensor
    """int64 [B]: different for every sample and epoch."""


class Judgement(NamedTuple):
    """Logits of the discriminator, [B, 1, h, w] each."""

    real: Tensor
    fake: Tensor


class TokenizerTraining(BaseRecipe):
    """Trains a :class:`MultiScaleVQ` (attribute ``tokenizer``)."""

    def __init__(
        self,
        config: TokenizerTrainingConfig,
        tokenizer: MultiScaleVQConfig,
        seed: int,
        device: torch.device,
        fresh: bool = True,
    ) -> None:
        """Build the tokenizer, with random weights, and the losses that the config asks for, on ``device``.

        Args:
            fresh: whether it is trained from these weights. If the trainer gives it others, their codebook is kept.

        Raises:
            ConfigError: the discriminator does not fit the images.
            CheckpointError: weights of the perceptual loss are missing or wrong.
        """
        self.config = config
        self.seed = seed
        self.tokenizer = MultiScaleVQ(tokenizer)
        self.tokenizer.initialize(generator(seed, "initial_autoencoder"))
        self.tokenizer.to(device)
        self.perceptual: PerceptualDistance | None = None
        if config.perceptual is not None:
            files = config.perceptual.vgg16_weights, config.perceptual.lpips_weights
            keys = "recipe.perceptual.vgg16_weights", "recipe.perceptual.lpips_weights"
            self.perceptual = PerceptualDistance(VGG16, *files, keys=keys).to(device)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial is not None:
            self.discriminator = PatchDiscriminator(config.adversarial, tokenizer.image_channels, tokenizer.image_side)
            self.discriminator.initialize(generator(seed, "initial_discriminator"))
            self.discriminator.to(device)
        self.codebook = CodebookUpkeep(config.codebook, self.tokenizer.quantizer, seed, fresh=fresh)
        self._dimensions = {  # before an engine empties or flattens parameters
            name: {parameter: value.ndim for parameter, value in module.named_parameters()}
            for name, module in self.modules().items()
        }

    @classmethod
    def build(cls, parts: Parts) -> "TokenizerTraining":
        """See :meth:`Recipe.build`."""
        config = parts.config
        assert isinstance(config.recipe, TokenizerTrainingConfig)
        if not isinstance(config.tokenizer, MultiScaleVQConfig):
            raise ConfigError(
                f"The recipe {config.recipe.name!r} trains multi-scale VQ tokenizers, not tokenizer.name="
                f"{config.tokenizer.name}. Choose the recipe that trains it."
            )
        fresh = config.initial_weights is None
        return cls(config.recipe, config.tokenizer, config.train.seed, parts.device, fresh)

    def modules(self) -> dict[str, nn.Module]:
        """The autoencoder, and the discriminator if there is one."""
        modules: dict[str, nn.Module] = {"autoencoder": self.tokenizer}
        return modules if self.discriminator is None else modules | {"discriminator": self.discriminator}

    def prepare(self, batch: Batch, step: int) -> TokenizerInputs:
        """Images and a key per sample."""
        keys = random_bits(self.seed, "tokenizer_sample", batch.epochs, batch.sample_ids)
        return TokenizerInputs(batch.require_images(), keys)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Reconstruct, or judge images and their reconstructions by the updated autoencoder."""
        if module == "autoencoder":
            return [Pass(self.reconstruction, functools.partial(self.autoencoder_loss, step=step))]
        return [Pass(self.judgement, self.discriminator_loss)]

    def reconstruction(self, model: Callable[..., Reconstruction], inputs: TokenizerInputs) -> Reconstruction:
        """Images through the autoencoder."""
        return model(inputs.images, inputs.keys)

    def judgement(self, model: Callable[..., Tensor], inputs: TokenizerInputs) -> Judgement:
        """Images and their reconstructions through the discriminator."""
        with torch.no_grad():
            reconstruction = self.tokenizer(inputs.images, inputs.keys).images
        return Judgement(*model(torch.cat([inputs.images, reconstruction])).float().chunk(2))

    def autoencoder_loss(self, output: Reconstruction, inputs: TokenizerInputs, step: int) -> Losses:
        """All losses of the autoencoder on one micro-batch."""
        adversarial = self.active("discriminator", step)
        # To balance two losses their gradients at the reconstructions are needed one by one: see _add_realism.
        images = output.images.detach().requires_grad_() if adversarial else output.images
        reconstruction, named = self._reconstruction_loss(images.float(), inputs.images)
        total = reconstruction
        if adversarial:
            total, more = self._add_realism(reconstruction, images, output)
            named |= more
        named["quantizer"] = output.quantized.loss
        total = total + self.config.quantizer_weight * output.quantized.loss
        if torch.is_grad_enabled():
            self.codebook.observe(step, output.quantized, inputs.keys)
        named = {"loss": total} | named
        pixels = inputs.images.numel()
        statistics = {
            "codebook_usage": output.quantized.usage,
            "squared_error": named["squared_error"].detach().double() * pixels,
            "pixels": torch.full((), pixels, dtype=torch.float64, device=total.device),
        }
        return _sums(total, named, len(inputs.images), statistics)

    def _reconstruction_loss(self, images: Tensor, originals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel plus perceptual loss of reconstructions, scalar, and its unweighted terms."""
        config = self.config
        error = images - originals
        terms = {"squared_error": error.square().mean(), "absolute_error": error.abs().mean()}
        total = config.l2_weight * terms["squared_error"] + config.l1_weight * terms["absolute_error"]
        if self.perceptual is not None and config.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, originals).mean()
            total = total + config.perceptual.weight * terms["perceptual"]
        return total, terms

    def _add_realism(
        self, reconstruction: Tensor, images: Tensor, output: Reconstruction
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``reconstruction + lambda_G * w * realism`` with its gradient at ``output.images``, and its terms.

        ``images`` is a copy of ``output.images`` that ends the graph: both losses are differentiated up to it, once
        each, and an engine's hooks on its module's output see only the backward pass of the total.
        """
        adversarial = self.config.adversarial
        assert adversarial is not None and self.discriminator is not None
        with frozen(self.discriminator):
            realism = reconstruction_realism_loss(adversarial.loss, self.discriminator(images).float())
        weight = realism.new_full((), adversarial.weight)
        if torch.is_grad_enabled():
            (of_reconstruction,) = torch.autograd.grad(reconstruction, images)
            (of_realism,) = torch.autograd.grad(realism, images)
            if adversarial.adaptive:
                weight = weight * adaptive_weight(of_reconstruction, of_realism, output.last_features, adversarial)
            gradient = of_reconstruction + weight * of_realism
            total = with_gradient(reconstruction + weight * realism, output.images, gradient)
        else:
            total = reconstruction + weight * realism
        return total, {"realism": realism, "adaptive_weight": weight}

    def discriminator_loss(self, output: Judgement, inputs: TokenizerInputs) -> Losses:
        """What the discriminator minimizes on one micro-batch."""
        adversarial = self.config.adversarial
        assert adversarial is not None and self.discriminator is not None
        total = discriminator_loss(adversarial.loss, output.real, output.fake)
        named = {"discriminator": total, "logits/real": output.real.mean(), "logits/fake": output.fake.mean()}
        if adversarial.lecam_weight > 0 and torch.is_grad_enabled():
            named["lecam"] = lecam_regularization(self.discriminator, output.real, output.fake, adversarial.lecam_decay)
            total = total + adversarial.lecam_weight * named["lecam"]
        return _sums(total, named, len(inputs.images))

    def active(self, module: str, step: int) -> bool:
        """The discriminator is trained, and its loss applied, from its start step on."""
        if module == "autoencoder":
            return True
        return self.config.adversarial is not None and step >= self.config.adversarial.start_step

    def rule(self, module: str, parameter: str) -> ParameterRule:
        """Weight decay applies to convolutions; not to vectors, nor to codes, which it would pull off their data."""
        return ParameterRule(decays=self._dimensions[module][parameter] > 2)

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB, perplexity and share of used codes per scale."""
        metrics = usage_metrics(statistics["codebook_usage"], self.tokenizer.scales)
        mean_square = statistics["squared_error"] / statistics["pixels"]
        return metrics | {"psnr": float(10 * torch.log10(_PEAK_TO_PEAK**2 / mean_square.clamp_min(1e-12)))}

    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Revive dead codes."""
        replacement = self.codebook.after_step(step)
        if replacement is not None:
            write_rows(self.tokenizer.quantizer.embedding.weight, replacement.rows, replacement.vectors)


def _sums(total: Tensor, named: dict[str, Tensor], images: int, statistics: dict[str, Tensor] | None = None) -> Losses:
    """Means over the images of a micro-batch, as sums."""
    sums = {name: value.detach() * images for name, value in named.items()}
    return Losses(total * images, sums, statistics=statistics or {})
