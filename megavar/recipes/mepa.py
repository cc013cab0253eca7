"""MEPA: a VAR whose feed-forward networks are experts, trained by next-scale prediction.

    tokens, features = tokenizer(image)                    frozen multi-scale VQ: Eq. 1 to 3
    label            = "no class" for 10 % of the samples
    logits           = VAR(label, features)                experts routed by Eq. 6 to 9 inside the blocks
    loss             = mean cross entropy over all tokens  Eq. 5
                       + balance loss                      Eq. 10, injected by the routers where they score tokens

Without experts this is VAR's own recipe. Semantic guidance (Eq. 11 to 13) reads hidden states through ``taps``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megavar.config.recipes.mepa import MEPAConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import seeds
from megavar.parallel.vocabulary import vocabulary_cross_entropy, vocabulary_hits
from megavar.recipes.base import Losses
from megavar.tokenizers.multiscale_vq import MultiScaleVQ


@dataclass
class MEPAInputs:
    """A prepared micro-batch."""

    model: ScaleInputs
    targets: Tensor
    """int64 [B, L]: the true token at every position."""


class MEPA:
    """Next-scale cross entropy with balanced experts."""

    def __init__(self, config: MEPAConfig, generator: nn.Module, tokenizer: MultiScaleVQ, seed: int) -> None:
        """Train ``generator``, a VAR or a ``ModuleList`` of its chunks, on the tokens of a frozen tokenizer."""
        self.config = config
        self.generator = generator
        self.chunks: list[Any] = list(generator) if isinstance(generator, nn.ModuleList) else [generator]
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.seed = seed
        self.scales = self.chunks[0].space.sides
        self.classes = self.chunks[0].choice.classes
        self.label_drop = self.chunks[0].choice.label_drop

    def modules(self) -> dict[str, nn.Module]:
        """The one trained module."""
        return {"generator": self.generator}

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> MEPAInputs:
        """Images (or cached tokens or latents) to tokens, teacher-forcing features and labels."""
        if batch.tokens is not None:
            ids, features = batch.tokens, self.tokenizer.inputs(batch.tokens)
        else:
            latents = batch.latents if batch.latents is not None else self.tokenizer.encode(batch.require_images())
            ids, features = self.tokenizer.at(latents)
        dropped = seeds.uniform(self.seed, "label_drop", batch.epochs, batch.sample_ids) < self.label_drop
        labels = torch.where(dropped, self.classes, batch.labels)
        keys = seeds.random_bits(self.seed, "drop_path", batch.epochs, batch.sample_ids)
        return MEPAInputs(ScaleInputs(labels, features, keys), ids)

    def forward(self, name: str, model: nn.Module, inputs: MEPAInputs) -> GeneratorOutput | Tensor:
        """Teacher forcing."""
        return model(inputs.model)

    def loss(self, name: str, output: GeneratorOutput, inputs: MEPAInputs, step: int) -> Losses:
        """Cross entropy in nats, averaged over all tokens (Eq. 5); loss and accuracy of each scale beside it."""
        per_token = vocabulary_cross_entropy(output.prediction, inputs.targets, self.config.label_smoothing)
        total = per_token.mean()
        with torch.no_grad():
            hits = vocabulary_hits(output.prediction, inputs.targets).float()
            named = {"loss": total.detach(), "accuracy": hits.mean()}
            sizes = [side * side for side in self.scales]
            for side, loss, hit in zip(self.scales, per_token.detach().split(sizes, 1), hits.split(sizes, 1)):
                named[f"loss/scale_{side:02d}"] = loss.mean()
                named[f"accuracy/scale_{side:02d}"] = hit.mean()
        return Losses(total, named)

    def collect(self) -> dict[str, Tensor]:
        """Routing statistics of this rank since the last call; sums, zero for blocks of other stages."""
        collected: dict[str, Tensor] = {}
        for chunk in self.chunks:
            for key, value in chunk.collect_routing().items():
                collected[key] = collected[key] + value if key in collected else value
        return collected

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Balance loss and share of tokens of each expert, from statistics summed over all ranks."""
        if "load" not in statistics:
            return {}
        load = statistics["load"]
        share = load.sum((0, 1)) / load.sum().clamp(min=1)
        by_layer = load.sum(1) / load.sum((1, 2), keepdim=False).clamp(min=1)[:, None]
        metrics = {"balance": float((statistics["balance"] / statistics["passes"].clamp(min=1)).mean())}
        metrics |= {f"expert_share/{number}": float(value) for number, value in enumerate(share)}
        metrics["expert_share/largest_in_a_layer"] = float(by_layer.max())
        metrics["expert_share/smallest_in_a_layer"] = float(by_layer.min())
        return metrics

    def active(self, name: str, step: int) -> bool:
        """The generator is trained at every step."""
        return True

    def decays(self, name: str, parameter_name: str, parameter: nn.Parameter) -> bool:
        """The generator's rule, which knows logical names."""
        chunk, inner = self.chunks[0], parameter_name
        if isinstance(self.generator, nn.ModuleList):
            inner = parameter_name.split(".", 1)[1]
        return chunk.rule(inner).decays

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Any]:
        """Nothing beside the modules needs to be saved."""
        return {}

