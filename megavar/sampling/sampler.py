"""From sample indices to tokens and images, for any generator, tokenizer and procedure."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megavar.conditions import Condition, Conditions
from megavar.config.procedures.base import SamplingChoice
from megavar.data.pixels import Rounding, quantize
from megavar.data.text import TextEncoder
from megavar.errors import CheckpointError
from megavar.sampling.base import Procedure
from megavar.sampling.graph import RepeatedDrawing, record_on_cuda
from megavar.sampling.noise import Noise
from megavar.tokenizers.base import Tokenizer

PIXELS_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Pixels of images that a tokenizer decodes together on a device: a decoder of VAR's size keeps 250 MB for an image of
256 x 256 (2^16) pixels, more than the caches of a CPU hold even of one."""


class TokenDecoder:
    """Images of stored tokens, decoded in pieces: memory does not grow with the number of samples drawn together."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device, rounding: Rounding = "round") -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.rounding: Rounding = rounding

    @torch.no_grad()
    def __call__(self, tokens: np.ndarray) -> Tensor:
        """Tokens [B, L] (or vectors [B, L, C]) as a chunk holds them to uint8 [B, 3, H, W] on the CPU.

        Raises:
            CheckpointError: an image is not finite, which bytes would hide.
        """
        wide = tokens.astype(np.int64 if tokens.dtype.kind in "iu" else np.float32)
        pieces = torch.from_numpy(wide).to(self.device).split(self._images_at_once)
        images = torch.cat([self.tokenizer.decode(piece) for piece in pieces])
        if not bool(images.isfinite().all()):
            raise CheckpointError(
                "The tokenizer decodes tokens to values that are not finite. Its weights are damaged or belong to "
                "another model: name other tokenizer weights."
            )
        return quantize(images, self.rounding).cpu()

    @property
    def _images_at_once(self) -> int:
        pixels = PIXELS_AT_ONCE.get(self.device.type, PIXELS_AT_ONCE["cuda"])
        return max(1, pixels // self.tokenizer.space.image_side**2)


@dataclass(frozen=True)
class Drawn:
    """B samples."""

    images: Tensor
    """uint8 [B, 3, H, W] on the CPU, decoded from ``arrays["tokens"]``."""
    arrays: dict[str, np.ndarray]
    """What a chunk stores: ``tokens`` in the type that their space asks for, and the conditions (``labels`` or
    ``captions``)."""


class Sampler:
    """Samples of a generator: sample i is a function of (weights, settings, its condition, i)."""

    def __init__(
        self,
        generator: nn.Module,
        tokenizer: Tokenizer,
        procedure: Procedure,
        conditions: Conditions,
        settings: SamplingChoice,
        device: torch.device,
        text: TextEncoder | None = None,
    ) -> None:
        """Draw with ``procedure``; of ``settings``, only seed, rounding and ``cuda_graph`` matter here.

        Args:
            text: encodes captions.

        Raises:
            ConfigError: ``cuda_graph`` with experts of which no graph can be recorded.
        """
        self.generator = generator
        self.tokenizer = tokenizer
        self.procedure = procedure
        self.conditions = conditions
        self.text = text
        self.seed = settings.seed
        self.device = device
        self.decoder = TokenDecoder(tokenizer, device, settings.rounding)
        self._tokens: Callable[[Condition, Noise], Tensor] = functools.partial(procedure.draw, generator, tokenizer)
        if settings.cuda_graph and device.type == "cuda":
            self._tokens = RepeatedDrawing(generator, self._tokens, record_on_cuda)

    @torch.no_grad()
    def draw(self, indices: Tensor) -> Drawn:
        """Samples ``indices`` (int64 [B])."""
        training = self.generator.training
        self.generator.eval()
        indices = indices.to(self.device)
        condition = self.conditions.at(indices)
        condition = condition if self.text is None else condition.encoded(self.text)
        drawn = self._tokens(condition, Noise(self.seed, indices))
        self.generator.train(training)
        tokens = drawn.cpu().numpy().astype(self.tokenizer.space.stored_type)
        # From what is stored, not from what decoding accumulated: chunks give the same bits later.
        return Drawn(self.decoder(tokens), {"tokens": tokens, **condition.arrays()})
