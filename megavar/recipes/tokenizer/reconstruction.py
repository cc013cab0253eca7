"""What trainings of autoencoders share: losses of a reconstruction, and the discriminator that judges it.

    loss          = pixels(reconstruction, image) + lambda_P * LPIPS(reconstruction, image) + lambda_C * ConvNeXt(...)
                    + lambda_G * w * realism(discriminator(reconstruction))        from a start step on
    discriminator : tells image from reconstruction; w balances it against the reconstruction (VQGAN Eq. 7)
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megavar.config.recipes.tokenizer import ReconstructionConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.parallel.parameter_rule import ParameterRule
from megavar.parallel.seeds import generator
from megavar.recipes.base import BaseRecipe, KnowsRules, Losses, Pass, WriteRows, frozen
from megavar.recipes.tokenizer.adversarial import (
    LeCam,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    reconstruction_realism_loss,
    with_gradient,
)
from megavar.recipes.tokenizer.blurred import BlurredDiscriminator
from megavar.tokenizers.logit_distance import LogitDistance
from megavar.tokenizers.perceptual import VGG16, PerceptualDistance

_PEAK_TO_PEAK = 2.0  # images are in [-1, 1]


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


class HasImages(Protocol):
    """A prepared micro-batch."""

    @property
    def images(self) -> Tensor:
        """float32 [B, C, H, W] in [-1, 1]."""
        ...


class ReconstructionTraining(BaseRecipe):
    """A recipe of its own says ``reconstruction``, ``prepare`` and ``passes``."""

    def __init__(
        self, config: ReconstructionConfig, tokenizer: Any, space: TokenSpace, seed: int, device: torch.device
    ) -> None:
        """Build the losses that the config asks for, around ``tokenizer``, which is on ``device``.

        Raises:
            ConfigError: the discriminator does not fit the images, or its weight not the tokenizer.
            CheckpointError: weights of the perceptual losses are missing or wrong.
        """
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
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
        self.lecam: LeCam | None = None
        if config.adversarial is not None:
            self.discriminator = (
                PatchDiscriminator(config.adversarial, space.image_channels, space.image_side)
                if config.adversarial.network == "patchgan"
                else BlurredDiscriminator(config.adversarial, space.image_channels)
            )
            self.discriminator.initialize(generator(seed, "initial_discriminator"))
            self.discriminator.to(device)
            if config.adversarial.lecam_weight > 0:
                self.lecam = LeCam(self.discriminator, config.adversarial.lecam_decay)
        self.dimensions = {  # before an engine empties or flattens parameters
            name: {parameter: value.ndim for parameter, value in module.named_parameters()}
            for name, module in self.modules().items()
        }

    def _check_weight(self) -> None:
        adversarial = self.config.adversarial
        if adversarial is not None and adversarial.adaptive and not self.tokenizer.ends_in_convolution:
            raise ConfigError(
                "recipe.adversarial.adaptive balances gradients at a last 3x3 convolution, and this tokenizer does not "
                "end in one. Set recipe.adversarial.adaptive=false."
            )

    def modules(self) -> dict[str, nn.Module]:
        """The autoencoder, and the discriminator if there is one."""
        modules: dict[str, nn.Module] = {"autoencoder": self.tokenizer}
        return modules if self.discriminator is None else modules | {"discriminator": self.discriminator}

    def reconstruction(self, model: Any, inputs: Any) -> Any:
        """What the autoencoder makes of the inputs' images: has ``images``, not clamped, [B, C, H, W]."""
        raise NotImplementedError

    def judgements(self, step: int) -> Sequence[Pass]:
        """The passes that train the discriminator."""
        if self.lecam is not None:
            self.lecam.begin(step)
        return [Pass(self.judgement, self.discriminator_loss)]

    def judgement(self, model: Any, inputs: HasImages) -> Judgement:
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

    def image_loss(
        self, reconstruction: Tensor, originals: Tensor, step: int, last_features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All losses of reconstructions, a scalar mean over images, and its unweighted terms.

        Args:
            reconstruction: as the module made it, [B, C, H, W].
            last_features: input of the convolution that made it, for the adaptive weight.
        """
        if not self.active("discriminator", step):
            return self.reconstruction_loss(reconstruction.float(), originals, self.weights(step))
        # To balance two losses their gradients at the reconstructions are needed one by one: see _add_realism.
        images = reconstruction.detach().requires_grad_()
        loss, named = self.reconstruction_loss(images.float(), originals, self.weights(step))
        total, more = self._add_realism(loss, images, reconstruction, last_features)
        return total, named | more

    def reconstruction_loss(
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
        self, loss: Tensor, images: Tensor, reconstruction: Tensor, last_features: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss + lambda_G * w * realism`` with its gradient at ``reconstruction``, and its terms.

        ``images`` is a copy of ``reconstruction`` that ends the graph: both losses are differentiated up to it, once
        each, and an engine's hooks on its module's output see only the backward pass of the total.
        """
        adversarial = self.config.adversarial
        assert adversarial is not None and self.discriminator is not None
        with frozen(self.discriminator):
            realism = reconstruction_realism_loss(adversarial.loss, self.discriminator(images).float())
        weight = realism.new_full((), adversarial.weight)
        if torch.is_grad_enabled():
            (of_reconstruction,) = torch.autograd.grad(loss, images)
            (of_realism,) = torch.autograd.grad(realism, images)
            if adversarial.adaptive:
                assert last_features is not None
                weight = weight * adaptive_weight(of_reconstruction, of_realism, last_features, adversarial)
            gradient = of_reconstruction + weight * of_realism
            total = with_gradient(loss + weight * realism, reconstruction, gradient)
        else:
            total = loss + weight * realism
        return total, {"realism": realism, "adaptive_weight": weight}

    def discriminator_loss(self, output: Judgement, inputs: HasImages) -> Losses:
        """What the discriminator minimizes on one micro-batch."""
        adversarial = self.config.adversarial
        assert adversarial is not None and self.discriminator is not None
        total = discriminator_loss(adversarial.loss, output.real, output.fake)
        named = {"discriminator": total, "logits/real": output.real.mean(), "logits/fake": output.fake.mean()}
        if self.lecam is not None and torch.is_grad_enabled():
            named["lecam"] = self.lecam.loss(output.real, output.fake)
            total = total + adversarial.lecam_weight * named["lecam"]
        return sums(total, named, len(inputs.images))

    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Remember what the discriminator said."""
        if self.lecam is not None:
            self.lecam.after_step(step)

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
        return ParameterRule(decays=self.dimensions[module][parameter] > 2, frozen=frozen)

    def frozen_parameter(self, name: str) -> bool:
        """Whether a parameter of the autoencoder is not trained at all: none."""
        return False

    def errors(self, named: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Statistics from which :meth:`summarize` computes the signal-to-noise ratio."""
        pixels = images.numel()
        return {
            "squared_error": named["squared_error"].detach().double() * pixels,
            "pixels": torch.full((), pixels, dtype=torch.float64, device=images.device),
        }

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB."""
        mean_square = statistics["squared_error"] / statistics["pixels"]
        return {"psnr": float(10 * torch.log10(_PEAK_TO_PEAK**2 / mean_square.clamp_min(1e-12)))}


def sums(total: Tensor, named: dict[str, Tensor], images: int, statistics: dict[str, Tensor] | None = None) -> Losses:
    """Means over the images of a micro-batch, as sums."""
    summed = {name: value.detach() * images for name, value in named.items()}
    return Losses(total * images, summed, statistics=statistics or {})
