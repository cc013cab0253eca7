"""The sampler of next-scale generators: from sample indices to tokens and images."""

import numpy as np
import torch
from torch import Tensor

from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.data.pixels import Rounding, quantize
from megavar.errors import CheckpointError
from megavar.generators.var import VAR
from megavar.sampling.next_scale import decode, noise_of_samples
from megavar.tokenizers.multiscale_vq import MultiScaleVQ


class TokenDecoder:
    """Images of the tokens of a multi-scale tokenizer, all scales one after the other."""

    def __init__(self, tokenizer: MultiScaleVQ, device: torch.device, rounding: Rounding = "round") -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.rounding: Rounding = rounding

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] to uint8 [B, 3, H, W] on the CPU.

        Raises:
            CheckpointError: an image is not finite, which bytes would hide.
        """
        images = self.tokenizer.decode(tokens.to(self.device))
        if not bool(images.isfinite().all()):
            raise CheckpointError(
                "The tokenizer decodes tokens to values that are not finite. Its weights are damaged or belong to "
                "another model: name other tokenizer weights."
            )
        return quantize(images, self.rounding).cpu()


class NextScaleSampler:
    """Samples of a next-scale generator; sample i has label i modulo the number of classes and noise of its own."""

    def __init__(
        self, generator: VAR, tokenizer: MultiScaleVQ, settings: NextScaleSampling, device: torch.device
    ) -> None:
        self.generator = generator
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = device
        self.decoder = TokenDecoder(tokenizer, device, settings.rounding)
        self.stored_type: type[np.generic] = np.uint16 if tokenizer.config.vocabulary_size <= 2**16 else np.int32

    @torch.no_grad()
    def draw(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and tokens of samples ``indices``; see :class:`Sampler`."""
        training = self.generator.training
        self.generator.eval()
        indices = indices.to(self.device)
        labels = indices % self.generator.choice.classes
        noise = noise_of_samples(self.settings.seed, indices)
        decoded = decode(self.generator, self.tokenizer.quantizer, labels, self.settings, noise)
        self.generator.train(training)
        tokens = torch.cat(decoded.ids, dim=1)
        # From the tokens rather than from the maps that decoding accumulated: stored tokens give the same bits later.
        return self.decoder(tokens), labels.cpu(), tokens.cpu()
