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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.config.choice import resolve
from megavar.config.recipes.tokenizer import TokenizerTrainingConfig
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel.seeds import generator, random_bits
from megavar.recipes.base import Losses, Parts, Pass, WriteRows
from megavar.recipes.tokenizer.clustering import ClusteredCodebook
from megavar.recipes.tokenizer.codebook import NO_UPKEEP, CodebookUpkeep, Upkeep, usage_metrics
from megavar.recipes.tokenizer.reconstruction import ReconstructionTraining, sums
from megavar.tokenizers.trainable import Reconstruction, Trainable


class TokenizerInputs(NamedTuple):
    """A prepared micro-batch."""

    images: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    keys: Tensor
    """int64 [B]: different for every sample and epoch."""


class TokenizerTraining(ReconstructionTraining):
    """Trains a :class:`~megavar.tokenizers.trainable.Trainable` (attribute ``tokenizer``)."""

    config: TokenizerTrainingConfig

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
        built = self.trainable(tokenizer)
        built.initialize(generator(seed, "initial_autoencoder"))
        super().__init__(config, built.to(device), tokenizer.space, seed, device)
        self.codebook = self.upkeep(fresh)

    @classmethod
    def build(cls, parts: Parts) -> "TokenizerTraining":
        """See :meth:`Recipe.build`."""
        config = parts.config
        assert isinstance(config.recipe, TokenizerTrainingConfig)
        fresh = config.train.initial_weights is None
        return cls(config.recipe, config.tokenizer, config.train.seed, parts.device, fresh)

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

    def upkeep(self, fresh: bool) -> Upkeep:
        """What keeps the codebook alive; see ``fresh`` above."""
        config, quantizer = self.config, self.tokenizer.quantizer
        if config.trained == "decoder":
            return CodebookUpkeep(NO_UPKEEP, quantizer, self.seed, fresh=fresh)
        if config.clustering:
            return ClusteredCodebook(quantizer, config.clustering_decay)
        return CodebookUpkeep(config.codebook, quantizer, self.seed, fresh=fresh)

    def prepare(self, batch: Batch, step: int) -> TokenizerInputs:
        """Images and a key per sample."""
        keys = random_bits(self.seed, "tokenizer_sample", batch.epochs, batch.sample_ids)
        return TokenizerInputs(batch.require_images(), keys)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Reconstruct, or judge images and their reconstructions by the updated autoencoder."""
        if module == "autoencoder":
            self.codebook.begin()
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
        return self.judgements(step)

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

    def smaller_loss(
        self, output: Reconstruction, inputs: TokenizerInputs, step: int, side: int, share: float
    ) -> Losses:
        """Of the smaller images of one scale; what they should be is the area-resized original."""
        originals = F.interpolate(inputs.images, size=output.images.shape[-2:], mode="area")
        loss, terms = self.reconstruction_loss(output.images.float(), originals, self.weights(step))
        total = share * (loss + self.config.quantizer_weight * output.quantized.loss)
        images = len(inputs.images)
        error = terms["squared_error"].detach() * images, images
        return Losses(total * images, means={f"squared_error/scale_{side:02d}": error})

    def autoencoder_loss(
        self, output: Reconstruction, inputs: TokenizerInputs, step: int, share: float = 1.0
    ) -> Losses:
        """All losses of the autoencoder on one micro-batch, ``share`` of which counts."""
        total, named = self.image_loss(output.images, inputs.images, step, output.last_features)
        named["quantizer"] = output.quantized.loss
        total = total + self.config.quantizer_weight * output.quantized.loss
        beside, more = self.beside(output, inputs)
        total, named = total + beside, named | more
        if torch.is_grad_enabled():
            self.codebook.observe(step, output.quantized, inputs.keys)
        named = {"loss": total} | named
        statistics = {"codebook_usage": output.quantized.usage} | self.errors(named, inputs.images)
        return sums(share * total, named, len(inputs.images), statistics)

    def beside(self, output: Reconstruction, inputs: TokenizerInputs) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What a tokenizer's training adds to the losses of the full images, a mean, and its unweighted terms."""
        return 0.0, {}

    def frozen_parameter(self, name: str) -> bool:
        """Whether a parameter of the autoencoder is not trained at all."""
        return self.config.trained == "decoder" and not name.startswith(self.tokenizer.decoding)

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB, perplexity and share of used codes per scale."""
        metrics = usage_metrics(statistics["codebook_usage"], self.tokenizer.quantizer.parts)
        return metrics | super().summarize(statistics)

    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Revive dead codes; remember what the discriminator said."""
        super().after_step(step, write_rows)
        replacement = self.codebook.after_step(step)
        if replacement is not None:
            write_rows(self.tokenizer.quantizer.embedding.weight, *replacement)
