"""Training of a KL-VAE (Kingma and Welling 2014; latent diffusion).

    z    = mean + deviation * e                 e by (seed, epoch, sample)
    loss = mean (decoder(z) - image)^2 + w * KL(posterior, N(0, 1))         per image
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megavar.config.choice import resolve
from megavar.config.recipes.kl_vae import KLVAETrainingConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel import seeds
from megavar.parallel.logical import initialize_parameters
from megavar.parallel.parameter_rule import ParameterRule
from megavar.recipes.base import BaseRecipe, Losses, Parts, Pass
from megavar.tokenizers.base import LatentMap


class KLVAEInputs(NamedTuple):
    """A prepared micro-batch."""

    images: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    normal: Tensor
    """float32 [B, L, C]."""


def initial_value(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Scale of norms one, biases zero, weights normal with variance 1 / (3 fan-in), as PyTorch's convolutions."""
    if value.ndim > 1:
        value.normal_(std=(3 * value[0].numel()) ** -0.5, generator=generator)
    else:
        value.fill_(0.0 if name.endswith("bias") else 1.0)


class KLVAETraining(BaseRecipe):
    """Reconstruction of samples of the posterior."""

    def __init__(self, config: KLVAETrainingConfig, tokenizer: nn.Module, space: TokenSpace, seed: int) -> None:
        self.config, self.tokenizer, self.space, self.seed = config, tokenizer, space, seed

    @classmethod
    def build(cls, parts: Parts) -> "KLVAETraining":
        """See :meth:`Recipe.build`.

        Raises:
            ConfigError: the tokenizer is no KL autoencoder.
        """
        config = parts.config
        assert isinstance(config.recipe, KLVAETrainingConfig)
        tokenizer = resolve(config.tokenizer)(config.tokenizer)
        if not isinstance(tokenizer, LatentMap):
            raise ConfigError(
                f"recipe.name=kl_vae trains tokenizers of vectors, and tokenizer.name={config.tokenizer.name} is none. "
                f"Choose tokenizer.name=kl_vae, or the recipe that trains this one."
            )
        assert isinstance(tokenizer, nn.Module)
        initialize_parameters(tokenizer, initial_value, config.train.seed)
        return cls(config.recipe, tokenizer.to(parts.device), config.tokenizer.space, config.train.seed)

    def modules(self) -> dict[str, nn.Module]:
        """The one module."""
        return {"autoencoder": self.tokenizer}

    def rule(self, module: str, parameter: str) -> ParameterRule:
        """Weight decay on all but biases and norms."""
        return ParameterRule(decays=not (parameter.endswith("bias") or "norm" in parameter.split(".")[-2]))

    def prepare(self, batch: Batch, step: int) -> KLVAEInputs:
        """Images, and the noise of their posteriors."""
        space = self.space
        who = batch.epochs, batch.sample_ids
        normal = seeds.normal_tokens(self.seed, "posterior", *who, space.length, space.channels)
        return KLVAEInputs(batch.require_images(), normal)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Reconstruct."""
        return [Pass(lambda model, inputs: model(inputs.images, inputs.normal), self.loss)]

    def loss(self, output: tuple[Tensor, Tensor], inputs: KLVAEInputs) -> Losses:
        """Sums over images."""
        reconstruction, latents = output
        error = (reconstruction - inputs.images).square().flatten(1).mean(1)
        mean, logarithm = latents.chunk(2, 1)
        divergence = 0.5 * (mean.square() + logarithm.exp() - 1 - logarithm).flatten(1).sum(1)
        total = (error + self.config.kl_weight * divergence).sum()
        named = {"loss": total, "squared_error": error.sum(), "divergence": divergence.sum()}
        deviation = mean.detach().square().mean((1, 2, 3)).sum()
        return Losses(total, {name: value.detach() for name, value in named.items()} | {"latent_power": deviation})
