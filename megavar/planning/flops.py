"""Floating-point operations of a generator, counted as two per multiply-add.

Matrix products and attention count, elementwise work does not (as in PyTorch's ``FlopCounterMode``). Weights that meet
every token and weights that meet an image once (the modulation networks: a third of a VAR's parameters) are counted
apart; the usual 6 x parameters x tokens overstates VAR-d16 by 34 %.

*Model* FLOPs are what the mathematics needs: visible pairs only, nothing computed twice. Utilization is measured in
them. *Hardware* FLOPs are what the kernels do: masked pairs too, and whatever is computed again in the backward pass.
"""

from dataclasses import dataclass
from typing import Literal

from megavar.config.root import Config
from megavar.planning.shape import GeneratorShape

Recompute = Literal["none", "selective", "full"]

FLEX_BLOCK = 128
"""Rows and columns of the tiles that FlexAttention keeps or skips as a whole."""


@dataclass(frozen=True)
class ForwardFlops:
    """One image through the generator with teacher forcing."""

    projections: float
    """Attention's linear layers."""
    pairs: float
    """Scores and weighted sums of attention."""
    feed_forward: float
    """Feed-forward networks, or the ``top_k`` experts that a token uses."""
    router: float
    modulation: float
    """The blocks' modulation networks, once per image."""
    embedding: float
    head: float
    """Output projection and its modulation, in float32."""

    @property
    def blocks(self) -> float:
        """All blocks with their modulation."""
        return self.projections + self.pairs + self.feed_forward + self.router + self.modulation

    @property
    def total(self) -> float:
        """All of it."""
        return self.blocks + self.embedding + self.head


def attention_pairs(shape: GeneratorShape, kernel: str) -> int:
    """Pairs (query, key) of an image that an attention kernel computes.

    ``dense`` computes all, ``prefix`` (and ``visible``, the mathematics) the visible ones, ``flex`` (and ``auto``,
    which means it on GPUs) whole tiles with at least one visible pair.
    """
    if kernel == "dense":
        return shape.tokens**2
    if kernel in ("prefix", "visible"):
        return shape.visible_pairs
    ends, end = [], 0
    for side in shape.scales:
        end += side * side
        ends.append(end)
    pairs = 0
    for start in range(0, shape.tokens, FLEX_BLOCK):
        last_row = min(start + FLEX_BLOCK, shape.tokens) - 1
        seen = next(end for end in ends if end > last_row)
        pairs += FLEX_BLOCK * FLEX_BLOCK * -(-seen // FLEX_BLOCK)
    return pairs


def forward_flops(shape: GeneratorShape, kernel: str = "visible") -> ForwardFlops:
    """One image forward."""
    width, tokens, experts = shape.width, shape.tokens, shape.experts
    layers = 2.0 * shape.depth
    used = 1 if experts is None else experts.top_k
    return ForwardFlops(
        projections=layers * tokens * 4 * width * width,
        pairs=layers * 2 * attention_pairs(shape, kernel) * width,
        feed_forward=layers * tokens * used * 2 * width * shape.hidden,
        router=0.0 if experts is None else layers * tokens * width * experts.number,
        modulation=2.0 * max(shape.depth * shape.modulation, 6 * width * width),
        embedding=2.0 * (tokens - shape.first) * shape.code_dimension * width,
        head=2.0 * (tokens * width * shape.vocabulary + 2 * width * width),
    )


def model_flops(shape: GeneratorShape) -> float:
    """One image forward and backward, as the mathematics needs it.

    The backward pass computes two products for each of the forward pass; the embedding's input needs no gradient.
    """
    forward = forward_flops(shape)
    return 3 * forward.total - forward.embedding


def hardware_flops(shape: GeneratorShape, kernel: str, recompute: Recompute, *, fused: bool = True) -> float:
    """One image forward and backward, as the kernels do it.

    Args:
        kernel: attention kernel.
        recompute: activation checkpointing.
        fused: attention kernels compute the scores once more in their backward pass (flash, FlexAttention, efficient);
            false for PyTorch's plain matrix products.
    """
    forward = forward_flops(shape, kernel)
    total = 3 * forward.total - forward.embedding
    if fused:
        total += forward.pairs / 2  # five products backward instead of four
    outside = forward.modulation if shape.generator.shared_adaptive_norm else 0.0
    repeated = {"none": 0.0, "selective": forward.pairs, "full": forward.blocks - outside}
    return total + repeated[recompute]


def sampling_flops(shape: GeneratorShape, guidance: bool) -> float:
    """One image drawn scale by scale with cached keys and values; guidance doubles it.

    Every scale computes the modulation again: it is called once per scale.
    """
    forward = forward_flops(shape)
    repeated = forward.modulation + 2 * 2.0 * shape.width * shape.width
    return (forward.total + (len(shape.scales) - 1) * repeated) * (2 if guidance else 1)


def flops_per_image(config: Config) -> float:
    """Model FLOPs per trained image, forward and backward: what utilization in a run's log is measured in.

    The frozen tokenizer's encoder is not counted. While a tokenizer is trained, its autoencoder is counted but not the
    discriminator or the perceptual network.
    """
    if config.generator is None:
        from megavar.planning.tokenizer_cost import autoencoder_cost

        cost = autoencoder_cost(config.tokenizer)
        return 3 * (cost.encode_flops + cost.decode_flops)
    return model_flops(GeneratorShape.of(config))
