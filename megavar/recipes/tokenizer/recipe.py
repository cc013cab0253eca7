"""Training of VQ tokenizers: VAR's, which its authors never released (VAR Eq. 5), and others of its kind.

    f              = encoder(image)
    f_hat, q       = quantizer(f)                           q: codebook + beta * commitment loss, mean over scales
    reconstruction = decoder(f_hat)
    loss           = pixels(reconstruction, image) + lambda_P * LPIPS(reconstruction, image) + q
                     + lambda_G * w * realism(discriminator(reconstruction))        from a start step on
    discriminator  : tells image from reconstruction; w balances it against the reconstruction (VQGAN Eq. 7)
    after the step : codes that are hardly used restart as vectors of the current batch

At step 0 the whole codebook is drawn from the first batch. Where a scale is an image by itself (FlexVAR), further
passes of a step reconstruct smaller images from coarser maps; nothing judges those but pixels, perception and
quantizer.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.choice import resolve
from megavar.config.recipes.tokenizer import TokenizerTrainingConfig
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel.parameter_rule import ParameterRule
from megavar.parallel.seeds import generator, random_bits
from megavar.recipes.base import BaseRecipe, KnowsRules, Losses, Parts, Pass, WriteRows, frozen
from megavar.recipes.tokenizer.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    lecam_regularization,
    reconstruction_realism_loss,
    with_gradient,
)
from megavar.recipes.tokenizer.blurred import BlurredDiscriminator
from megavar.recipes.tokenizer.codebook import NO_UPKEEP, CodebookUpkeep, Upkeep, usage_metrics
from megavar.tokenizers.logit_distance import LogitDistance
from megavar.tokenizers.perceptual import VGG16, PerceptualDistance
from megavar.tokenizers.trainable import Reconstruction, Trainable

_PEAK_TO_PEAK = 2.0  # images are in [-1, 1]


class TokenizerInputs(NamedTuple):
    """A prepared micro-batch."""

    images: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    keys: Tensor
    """int64 [B]: different for every sample and epoch."""


class LossWeights(NamedTuple):
    """What the parts of the reconstruction's loss are multiplied by."""

    l2: float
    l1: float
    perceptual: float
    """Of LPIPS; nothing where it is not configured."""
    convnext: float
    """Of the logits' distance; nothing where it is not configured."""


class Judgement(NamedTuple):
    """Logits of the discriminator, [B, 1, h, w] each."""

    real: Tensor
    fake: Tensor


class TokenizerTraining(BaseRecipe):
    """Trains a :class:`~megavar.tokenizers.trainable.Trainable` (attribute ``tokenizer``)."""

    def __init__(
        self,
        config: TokenizerTrainingConfig,
        tokenizer: TokenizerChoice,
        seed: int,
        device: torch.device,
        fresh: bool = True,
    ) -> None:
        """Build the tokenizer, with random weights, and the losses that the config asks for, on ``device``.

        Args:
            fresh: whether it is trained from these weights. If the trainer gives it others, their codebook is kept.

        Raises:
            ConfigError: the tokenizer is not one that can be trained so, or the discriminator does not fit the images.
            CheckpointError: weights of the perceptual loss are missing or wrong.
        """
        self.config = config
        self.seed = seed
        self.tokenizer = self.trainable(tokenizer)
        self.tokenizer.initialize(generator(seed, "initial_autoencoder"))
        self.tokenizer.to(device)
        self._check_weight()
        self.perceptual: PerceptualDistance | None = None
        self.convnext: LogitDistance | None = None
        if config.convnext is not None:
            self.convnext = LogitDistance(config.convnext.weights, key="recipe.convnext.weights").to(device)
        if config.perceptual is not None:
            files = config.perceptual.vgg16_weights, config.perceptual.lpips_weights
            keys = "recipe.perceptual.vgg16_weights", "recipe.perceptual.lpips_weights"
            self.perceptual = PerceptualDistance(VGG16, *files, keys=keys).to(device)
        self.discriminator: PatchDiscriminator | BlurredDiscriminator | None = None
        space = tokenizer.space
        if config.adversarial is not None:
            self.discriminator = (
                PatchDiscriminator(config.adversarial, space.image_channels, space.image_side)
                if config.adversarial.network == "patchgan"
                else BlurredDiscriminator(config.adversarial, space.image_channels)
            )
            self.discriminator.initialize(generator(seed, "initial_discriminator"))
            self.discriminator.to(device)
        upkeep = config.codebook if config.trained == "all" else NO_UPKEEP
        self.codebook: Upkeep = CodebookUpkeep(upkeep, self.tokenizer.quantizer, seed, fresh=fresh)
        self._dimensions = {  # before an engine empties or flattens parameters
            name: {parameter: value.ndim for parameter, value in module.named_parameters()}
            for name, module in self.modules().items()
        }

    @classmethod
    def build(cls, parts: Parts) -> "TokenizerTraining":
        """See :meth:`Recipe.build`."""
        config = parts.config
        assert isinstance(config.recipe, TokenizerTrainingConfig)
        fresh = config.initial_weights is None
        return cls(config.recipe, config.tokenizer, config.train.seed, parts.device, fresh)

    def _check_weight(self) -> None:
        """Refuse the adaptive weight where there is no last convolution to ask.

        Raises:
            ConfigError: there is none.
        """
        adversarial = self.config.adversarial
        if adversarial is not None and adversarial.adaptive and not self.tokenizer.ends_in_convolution:
            raise ConfigError(
                "recipe.adversarial.adaptive balances gradients at a last 3x3 convolution, and this tokenizer does not "
                "end in one. Set recipe.adversarial.adaptive=false."
            )

    def trainable(self, choice: TokenizerChoice) -> Any:
        """The tokenizer, if this recipe can train it."""
        tokenizer, recipe = resolve(choice)(choice), self.config
        if not isinstance(tokenizer, Trainable):
            raise ConfigError(
                f"The recipe {recipe.name!r} trains VQ tokenizers by reconstruction, and tokenizer.name={choice.name} "
                f"is none of them. Choose the recipe that trains it."
            )
        if recipe.smaller_images > len(tokenizer.separate_scales):
            raise ConfigError(
                f"recipe.smaller_images={recipe.smaller_images}, but tokenizer.name={choice.name} has "
                f"{len(tokenizer.separate_scales)} coarser scales that are images by themselves. Lower it."
            )
        return tokenizer

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
            sides = self.smaller_sides(step)
            share = 1 / (1 + len(sides))
            full = Pass(self.reconstruction, functools.partial(self.autoencoder_loss, step=step, share=share))
            smaller = [
                Pass(
                    functools.partial(self.reconstruction, side=side),
                    functools.partial(self.smaller_loss, step=step, side=side, share=share),
                )
                for side in sides
            ]
            return [full, *smaller]
        return [Pass(self.judgement, self.discriminator_loss)]

    def smaller_sides(self, step: int) -> list[int]:
        """Scales whose own images are reconstructed in a step, beside the last one: drawn without repetition."""
        sides = self.tokenizer.separate_scales
        order = random_bits(self.seed, "smaller_sides", step, torch.arange(len(sides))).argsort()
        return sorted(sides[number] for number in order[: self.config.smaller_images].tolist())

    def reconstruction(
        self, model: Callable[..., Reconstruction], inputs: TokenizerInputs, side: int | None = None
    ) -> Reconstruction:
        """Images through the autoencoder."""
        return model(inputs.images, inputs.keys) if side is None else model(inputs.images, inputs.keys, side)

    def judgement(self, model: Callable[..., Tensor], inputs: TokenizerInputs) -> Judgement:
        """Images and their reconstructions through the discriminator."""
        with torch.no_grad():
            reconstruction = self.reconstruction(self.tokenizer, inputs).images
        return Judgement(*model(torch.cat([inputs.images, reconstruction])).float().chunk(2))

    def weights(self, step: int) -> LossWeights:
        """The configured ones, in every step."""
        config = self.config
        perceptual = 0.0 if config.perceptual is None else config.perceptual.weight
        convnext = 0.0 if config.convnext is None else config.convnext.weight
        return LossWeights(config.l2_weight, config.l1_weight, perceptual, convnext)

    def smaller_loss(
        self, output: Reconstruction, inputs: TokenizerInputs, step: int, side: int, share: float
    ) -> Losses:
        """Of the smaller images of one scale; what they should be is the area-resized original."""
        originals = F.interpolate(inputs.images, size=output.images.shape[-2:], mode="area")
        loss, terms = self._reconstruction_loss(output.images.float(), originals, self.weights(step))
        total = share * (loss + self.config.quantizer_weight * output.quantized.loss)
        images = len(inputs.images)
        error = terms["squared_error"].detach() * images, images
        return Losses(total * images, means={f"squared_error/scale_{side:02d}": error})

    def autoencoder_loss(
        self, output: Reconstruction, inputs: TokenizerInputs, step: int, share: float = 1.0
    ) -> Losses:
        """All losses of the autoencoder on one micro-batch, ``share`` of which counts."""
        adversarial = self.active("discriminator", step)
        # To balance two losses their gradients at the reconstructions are needed one by one: see _add_realism.
        images = output.images.detach().requires_grad_() if adversarial else output.images
        reconstruction, named = self._reconstruction_loss(images.float(), inputs.images, self.weights(step))
        total = reconstruction
        if adversarial:
            total, more = self._add_realism(reconstruction, images, output)
            named |= more
        named["quantizer"] = output.quantized.loss
        total = total + self.config.quantizer_weight * output.quantized.loss
        beside, more = self.beside(output, inputs)
        total, named = total + beside, named | more
        if torch.is_grad_enabled():
            self.codebook.observe(step, output.quantized, inputs.keys)
        named = {"loss": total} | named
        pixels = inputs.images.numel()
        statistics = {
            "codebook_usage": output.quantized.usage,
            "squared_error": named["squared_error"].detach().double() * pixels,
            "pixels": torch.full((), pixels, dtype=torch.float64, device=total.device),
        }
        return _sums(share * total, named, len(inputs.images), statistics)

    def beside(self, output: Reconstruction, inputs: TokenizerInputs) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What a tokenizer's training adds to the losses of the full images, a mean, and its unweighted terms."""
        return 0.0, {}

    def _reconstruction_loss(
        self, images: Tensor, originals: Tensor, weights: LossWeights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel plus perceptual loss of reconstructions, scalar, and its unweighted terms."""
        error = images - originals
        terms = {"squared_error": error.square().mean(), "absolute_error": error.abs().mean()}
        total = weights.l2 * terms["squared_error"] + weights.l1 * terms["absolute_error"]
        if self.perceptual is not None and weights.perceptual > 0:
            terms["perceptual"] = self.perceptual(images, originals).mean()
            total = total + weights.perceptual * terms["perceptual"]
        if self.convnext is not None and weights.convnext > 0:
            terms["logit_distance"] = self.convnext(images, originals).mean()
            total = total + weights.convnext * terms["logit_distance"]
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
                features = output.last_features
                assert features is not None
                weight = weight * adaptive_weight(of_reconstruction, of_realism, features, adversarial)
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
        """Weight decay applies to convolutions; not to vectors, nor to codes, which it would pull off their data.

        Transformers say themselves what decays.
        """
        frozen = module == "autoencoder" and self.frozen_parameter(parameter)
        own = self.modules()[module]
        if isinstance(own, KnowsRules):
            return replace(own.rule(parameter), frozen=frozen)
        return ParameterRule(decays=self._dimensions[module][parameter] > 2, frozen=frozen)

    def frozen_parameter(self, name: str) -> bool:
        """Whether a parameter of the autoencoder is not trained at all."""
        return self.config.trained == "decoder" and not name.startswith(self.tokenizer.decoding)

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB, perplexity and share of used codes per scale."""
        metrics = usage_metrics(statistics["codebook_usage"], self.tokenizer.quantizer.parts)
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
