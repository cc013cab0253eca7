"""Next-scale flow matching: FlowAR (arXiv:2412.15205; ``flowar.py``, ``flowloss.py``) and SAR's Table 1.

z        = posterior of tokenizer(image)               frozen KL-VAE, drawn by (seed, epoch, sample)
x_k      = z reduced to scale k                        latent supervision
         | z of the image reduced to scale k           image supervision
input    = x_{k-1}, enlarged to the full side and reduced to scale k        (or through images)
t_k      ~ U(0, 1) per sample and scale,  e_k ~ N(0, 1)
v        = generator(label, inputs, (1 - t) x + t e, t)
loss     = sum over scales of s_k^2 / s_K^2 mean (v - (e - x))^2        every token weighs the same
           + balance loss of experts, + terms
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavar import flow_matching
from megavar.config.recipes.flowar import FlowARRecipeConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import FlowScaleInputs
from megavar.parallel import seeds
from megavar.recipes.base import Losses, Pass, chunks_of
from megavar.recipes.one_generator import OneGenerator
from megavar.recipes.terms.base import add_terms, prepare_terms
from megavar.tokenizers.base import LatentMap
from megavar.tokenizers.latent_scales import next_input, reduced


@dataclass
class FlowInputs:
    """A prepared micro-batch."""

    model: FlowScaleInputs
    data: Tensor
    """float32 [B, L, C]: the true tokens of all scales."""
    noise: Tensor
    """float32 [B, L, C]: what they are mixed with."""
    terms: dict[str, Any] = field(default_factory=dict)
    """What each term compares with."""


class NextScaleFlow(OneGenerator):
    """Velocity of every scale, given the coarser ones."""

    config: FlowARRecipeConfig
    tokenizer: LatentMap

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides in tokens, coarse to fine: the generator's."""
        scales: tuple[int, ...] = self._choice.scales
        return scales

    @property
    def _choice(self) -> Any:
        return chunks_of(self.generator)[0].choice

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> FlowInputs:
        """Images (or cached latents) to the true tokens of all scales, inputs, noise, times and labels."""
        truths = self.truths(batch)
        features, data = self.features(truths), torch.cat(truths, 1)
        who = batch.epochs[:, None], batch.sample_ids[:, None]
        times = seeds.uniform(self.seed, "times", *who, torch.arange(len(truths), device=data.device)).float()
        noise = self._normal("noise", batch, data.shape[1])
        by_token = torch.cat([times[:, [k], None].expand(-1, truth.shape[1], 1) for k, truth in enumerate(truths)], 1)
        noisy = flow_matching.interpolate(data, noise, by_token)
        keys = seeds.random_bits(self.seed, "dropout", batch.epochs, batch.sample_ids)
        inputs = FlowInputs(FlowScaleInputs(self.labels(batch), features, noisy, times, keys), data, noise)
        inputs.terms = prepare_terms(self.terms, batch, inputs)
        return inputs

    def truths(self, batch: Batch) -> list[Tensor]:
        """The true tokens of each scale, float32 [B, L_k, C], coarse to fine."""
        latents = batch.latents
        if latents is None:
            latents = self.tokenizer.encode(batch.require_images())
        whole = self._tokens(latents, batch, "posterior")
        if self.config.supervision == "latent":
            return [reduced(self.tokenizer, whole, side) for side in self.scales]
        images, truths = batch.require_images(), []
        for number, side in enumerate(self.scales[:-1]):
            size = side * self.tokenizer.stride
            smaller = self.tokenizer.encode(F.interpolate(images, (size, size), mode="area"))
            truths.append(self._tokens(smaller, batch, f"posterior/{number}"))
        return [*truths, whole]

    def features(self, truths: Sequence[Tensor]) -> Tensor:
        """What the scales after the first read, float32 [B, L - L_0, C]."""
        through = self._choice.scale_inputs
        nothing = truths[0][:, :0]
        read = [
            next_input(self.tokenizer, tokens, self.scales[-1], side, through)
            for tokens, side in zip(truths, self.scales[1:])
        ]
        return torch.cat([nothing, *read], 1)

    def _tokens(self, latents: Tensor, batch: Batch, stream: str) -> Tensor:
        means = self.tokenizer.tokens(latents)
        if self.config.posterior == "mean":
            return means
        return self.tokenizer.sample(latents, self._normal(stream, batch, means.shape[1]))

    def _normal(self, stream: str, batch: Batch, tokens: int) -> Tensor:
        """Standard normal [B, tokens, C]."""
        channels = self.tokenizer.space.channels
        return seeds.normal_tokens(self.seed, stream, batch.epochs, batch.sample_ids, tokens, channels)

    def valid(self, batch: Batch, step: int) -> int:
        """Tokens of the last scale: the weights of all scales add up to more than one, as released."""
        return len(batch) * self.scales[-1] ** 2

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Teacher forcing."""
        return [Pass(lambda model, inputs: model(inputs.model), self.loss)]

    def loss(self, output: GeneratorOutput, inputs: FlowInputs) -> Losses:
        """Squared error of the velocity, and that of each scale beside it."""
        errors = flow_matching.velocity_error(output.prediction, inputs.data, inputs.noise)
        total = errors.sum()
        of_scales = errors.detach().split([side * side for side in self.scales], 1)
        means = {f"loss/scale_{side:02d}": (one.sum(), one.numel()) for side, one in zip(self.scales, of_scales)}
        losses = Losses(total, {"loss": total.detach()}, means=dict(means))
        return add_terms(losses, self.terms, output, inputs.terms, len(inputs.data))
