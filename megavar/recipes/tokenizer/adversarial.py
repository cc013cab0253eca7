"""Adversarial loss of tokenizers: a PatchGAN discriminator and VQGAN's adaptive weight.

Sources: pix2pix (arXiv:1611.07004) for the discriminator, VQGAN (arXiv:2012.09841) Eq. 7 and its code for the weight,
LeCam (arXiv:2104.03310) Eq. 3 for the regularization. Logits are [B, 1, h, w], one per patch.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from megavar.config.recipes.tokenizer import AdversarialConfig
from megavar.errors import ConfigError
from megavar.recipes.ranks import mean_over_ranks, sum_over_ranks

_INITIAL_STD = 0.02
"""Standard deviation of fresh convolutions (pix2pix)."""


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: float [B, C, H, W] in [-1, 1] -> logits [B, 1, h, w], positive for real.

    ``layers`` halvings and two convolutions at the lowest resolution, all 4x4, GroupNorm in between. Holds LeCam's
    running means of the logits of real and reconstructed images.
    """

    mean_logits: Tensor

    def __init__(self, config: AdversarialConfig, image_channels: int, image_side: int) -> None:
        super().__init__()
        smallest = 3 * 2**config.layers
        if image_side < smallest:
            raise ConfigError(
                f"recipe.adversarial.layers is {config.layers}, which needs images of at least {smallest} pixels, but "
                f"the tokenizer's images have {image_side}. Use fewer layers."
            )
        widths = [config.base_channels * min(2**index, 8) for index in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, len(widths)):
            stride = 2 if index < config.layers else 1
            layers += [
                nn.Conv2d(widths[index - 1], widths[index], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(config.norm_groups, widths[index]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean_logits", torch.zeros(2))
        self.initialize()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Fresh parameters: convolutions normal with deviation 0.02, norms the identity, biases zero."""
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=_INITIAL_STD, generator=generator)
            elif isinstance(module, nn.GroupNorm):
                module.weight.fill_(1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()  # type: ignore[operator,union-attr]
        self.mean_logits.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Judge. Computes in the type of the parameters."""
        return self.layers(images.to(next(self.parameters()).dtype))


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimizes, from logits of real and reconstructed images; scalar."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def reconstruction_realism_loss(kind: str, fake: Tensor) -> Tensor:
    """What the tokenizer minimizes, from logits of its reconstructions; scalar."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def last_layer_gradient(at_images: Tensor, last_features: Tensor) -> Tensor:
    """Gradient of a loss with respect to the weight [C_out, C_in, 3, 3] of the decoder's last convolution.

    It follows from the gradient at the convolution's output ``at_images`` [B, C_out, H, W] and its input
    ``last_features`` [B, C_in, H, W] without touching the parameter: right whatever an engine does with parameters.
    """
    shape = (at_images.shape[1], last_features.shape[1], 3, 3)
    return conv2d_weight(last_features.float(), shape, at_images.float(), padding=1)


def adaptive_weight(
    reconstruction_at_images: Tensor, realism_at_images: Tensor, last_features: Tensor, config: AdversarialConfig
) -> Tensor:
    """VQGAN Eq. 7: ||gradient of reconstruction|| / (||gradient of realism|| + epsilon), bounded; scalar.

    The norms are of gradients with respect to the decoder's last convolution over the batch of all ranks, so the weight
    does not depend on how the batch is split over them.

    Args:
        reconstruction_at_images: gradient of pixel plus perceptual loss at the reconstructions, [B, C, H, W].
        realism_at_images: the same of the tokenizer's adversarial loss.
        last_features: input of the convolution that made the reconstructions, [B, C_in, H, W].
        config: epsilon and bound.
    """
    both = [last_layer_gradient(g, last_features) for g in (reconstruction_at_images, realism_at_images)]
    numerator, denominator = mean_over_ranks(torch.stack(both)).flatten(1).norm(dim=1)
    return (numerator / (denominator + config.adaptive_epsilon)).clamp(0, config.adaptive_maximum)


def with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """A scalar that equals ``value`` and whose gradient at the tensor ``at`` is ``gradient``."""
    carrier = (at * gradient.detach()).sum()
    return value.detach() + (carrier - carrier.detach())


class Judge(Protocol):
    """A discriminator."""

    mean_logits: Tensor
    """Running means of the logits of real and reconstructed images, [2]: a persistent buffer."""


class LeCam:
    """Regularization of a discriminator (LeCam Eq. 3): logits stay near the running means of the opposite kind.

    The means of a step are those of the steps before it, and move once a step by the logits of the global batch, so
    that neither ranks nor micro-batches matter. (Public code moves them in every forward pass, before they are used.)
    """

    def __init__(self, discriminator: Judge, decay: float) -> None:
        self.discriminator, self.decay = discriminator, decay
        self._step = -1
        self._said: list[Tensor] = []
        """Of each micro-batch: sums of the logits of real and of reconstructed images, and how many, [3]."""

    def begin(self, step: int) -> None:
        """A step of the discriminator begins: forget what was said in one that was not applied."""
        self._step, self._said = step, []

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Eq. 3 of a micro-batch's logits [B, 1, h, w], scalar; notes what was said."""
        count = real.new_full((), real.numel())
        self._said.append(torch.stack([real.detach().sum(), fake.detach().sum(), count]).double())
        mean_real, mean_fake = self.discriminator.mean_logits.clone()
        return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the means, if the discriminator was trained in ``step``. Collective."""
        if step != self._step or not self._said:
            return
        *sums, count = sum_over_ranks(torch.stack(self._said).sum(0))
        self._said = []
        means = self.discriminator.mean_logits
        means.lerp_((torch.stack(sums) / count).to(means), 1 - self.decay)
