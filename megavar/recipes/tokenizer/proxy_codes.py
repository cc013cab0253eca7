"""TiTok's first stage (arXiv:2406.07550 section 3.3): predict the codes that a frozen VQGAN gives the image.

    codes  = proxy.tokens(image)                    frozen: MaskGIT's VQGAN, int64 [B, h w]
    ids, q = quantizer(encoder(image))              q: codebook + beta * commitment loss
    loss   = cross entropy(decoder(ids), codes) + lambda_Q * q

Nothing but the tokens is learned from images here, so no adversary and no perceptual network is needed. The second
stage decodes by the proxy's own decoder, which the tokenizer holds, frozen, from the start.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.recipes.proxy_codes import ProxyCodesConfig
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel.parameter_rule import ParameterRule
from megavar.parallel.seeds import generator, random_bits
from megavar.recipes.base import BaseRecipe, Losses, Parts, Pass, WriteRows
from megavar.recipes.tokenizer.codebook import CodebookUpkeep, usage_metrics
from megavar.tokenizers.trainable import Quantizer, QuantizerOutput

_ADOPTED = ("pixel_decoder.", "pixel_quantize.")


@runtime_checkable
class PredictsCodes(Protocol):
    """A tokenizer (an ``nn.Module``) whose decoder predicts the codes of another one, its proxy."""

    @property
    def proxy(self) -> TokenizerChoice | None:
        """The proxy; None where the decoder makes images."""
        ...

    @property
    def quantizer(self) -> Quantizer:
        """Its own codebook."""
        ...

    def adopt(self, proxy: Any) -> None:
        """Take over the proxy's decoder and codes."""
        ...

    def rule(self, name: str) -> ParameterRule:
        """How the tensor ``name`` is trained."""
        ...


class ProxyInputs(NamedTuple):
    """A prepared micro-batch."""

    images: Tensor
    """float32 [B, 3, H, W] in [-1, 1]."""
    codes: Tensor
    """int64 [B, h w]: the proxy's."""
    keys: Tensor
    """int64 [B]: different for every sample and epoch."""


class Prediction(Protocol):
    """What the tokenizer makes of images."""

    logits: Tensor
    """[B, V, h, w]."""
    quantized: QuantizerOutput


class ProxyCodes(BaseRecipe):
    """Trains a :class:`PredictsCodes`."""

    def __init__(
        self,
        config: ProxyCodesConfig,
        tokenizer: Any,
        proxy: Any,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        fresh: bool = True,
    ) -> None:
        """``tokenizer``, on the CPU, is initialized here (same values everywhere) and moved to ``device``, where
        ``proxy`` is; ``fresh``: and trained from these weights."""
        tokenizer.initialize(generator(seed, "initial_autoencoder"))
        self.config, self.tokenizer, self.proxy, self.seed = config, tokenizer.to(device), proxy, seed
        tokenizer.adopt(proxy)
        self.codebook = CodebookUpkeep(config.codebook, tokenizer.quantizer, seed, fresh=fresh)

    @classmethod
    def build(cls, parts: Parts) -> "ProxyCodes":
        """See :meth:`Recipe.build`.

        Raises:
            ConfigError: the tokenizer predicts no codes.
        """
        config, tokenizer = parts.config, parts.fresh_tokenizer()
        assert isinstance(config.recipe, ProxyCodesConfig)
        if not isinstance(tokenizer, PredictsCodes) or tokenizer.proxy is None:
            raise ConfigError(
                f"recipe.name=proxy_codes trains tokenizers that predict another one's codes, and "
                f"tokenizer.name={config.tokenizer.name} as configured does not. Choose tokenizer.name=titok with "
                f"legacy=true, or recipe.name=tokenizer."
            )
        proxy = parts.frozen_tokenizer(tokenizer.proxy, config.recipe.proxy_weights, "recipe.proxy_weights")
        assert isinstance(tokenizer, nn.Module)
        fresh = config.train.initial_weights is None
        return cls(config.recipe, tokenizer, proxy, config.train.seed, device=parts.device, fresh=fresh)

    def modules(self) -> dict[str, nn.Module]:
        """The one module."""
        return {"autoencoder": self.tokenizer}

    def rule(self, module: str, parameter: str) -> ParameterRule:
        """The tokenizer's; what is the proxy's is not trained."""
        if parameter.startswith(_ADOPTED):
            return ParameterRule(frozen=True)
        rule: ParameterRule = self.tokenizer.rule(parameter)
        return rule

    @torch.no_grad()
    def prepare(self, batch: Batch, step: int) -> ProxyInputs:
        """Images and what the proxy calls them."""
        images = batch.require_images()
        keys = random_bits(self.seed, "tokenizer_sample", batch.epochs, batch.sample_ids)
        return ProxyInputs(images, self.proxy.tokens(self.proxy.encode(images)), keys)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """Predict."""
        self.codebook.begin()

        def loss(output: Prediction, inputs: ProxyInputs) -> Losses:
            return self.loss(output, inputs, step)

        return [Pass(lambda model, inputs: model(inputs.images, inputs.keys, codes=True), loss)]

    def loss(self, output: Prediction, inputs: ProxyInputs, step: int) -> Losses:
        """Cross entropy per position and quantizer loss, as sums over images."""
        logits, quantized, images = output.logits.float().flatten(2), output.quantized, len(inputs.images)
        error = F.cross_entropy(logits, inputs.codes)
        total = error + self.config.quantizer_weight * quantized.loss
        if torch.is_grad_enabled():
            self.codebook.observe(step, quantized, inputs.keys)
        hits = (logits.argmax(1) == inputs.codes).float().mean()
        named = {"loss": total, "cross_entropy": error, "quantizer": quantized.loss, "accuracy": hits}
        sums = {name: value.detach() * images for name, value in named.items()}
        return Losses(total * images, sums, statistics={"codebook_usage": quantized.usage})

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """Perplexity and share of used codes."""
        return usage_metrics(statistics["codebook_usage"], self.tokenizer.quantizer.parts)

    def after_step(self, step: int, write_rows: WriteRows) -> None:
        """Revive dead codes, if that is asked for."""
        replacement = self.codebook.after_step(step)
        if replacement is not None:
            write_rows(self.tokenizer.quantizer.embedding.weight, *replacement)
