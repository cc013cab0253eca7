"""What generators and tokenizers cost, as :mod:`megavar.planning.measure` finds it. Free of torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from megavar.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the images of a micro-batch."""

    fixed: float = 0.0
    per_image: float = 0.0

    def at(self, images: float) -> float:
        """For a micro-batch of ``images``, or the like of a pass that is larger or smaller."""
        return self.fixed + self.per_image * images

    @staticmethod
    def through(points: Iterable[tuple[int, float]]) -> "Line":
        """The line through two points (images, bytes)."""
        (first, low), (second, high) = points
        slope = (high - low) / (second - first)
        return Line(low - slope * first, slope)


@dataclass(frozen=True)
class Part:
    """Embedding, one block, or head (with the loss), on one rank."""

    replicated: int = 0
    """Scalars outside experts."""
    experts: int = 0
    """Scalars of experts, all of those that the expert-parallel ranks share."""
    forward_flops: float = 0.0
    """One image forward, as the mathematics needs it."""
    model_flops: float = 0.0
    """One image forward and backward, as the mathematics needs it: visible pairs only, nothing computed twice."""
    hardware_flops: float = 0.0
    """The same as the kernels do it: masked pairs too, and scores that attention computes again."""
    repeated_flops: float = 0.0
    """One image: what recomputation adds to the backward pass."""
    saved: Line = Line()
    """What autograd keeps from the forward to the backward pass, apart from ``routed``."""
    routed: Line = Line()
    """What it keeps of tokens on their way through experts, if the experts' loads are equal."""
    peak: Line = Line()
    """Most memory in use while the part is at work, beyond what blocks keep; the head's includes what it saves."""


@dataclass(frozen=True)
class RankParameters:
    """Scalars that one rank holds."""

    replicated: int
    """Everything but experts: equal on all data-parallel ranks of the stage."""
    experts: int
    """Experts: equal on the expert-data-parallel ranks of the stage."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.replicated + self.experts


@dataclass(frozen=True)
class Cost:
    """One rank under a tensor-parallel size and a way of recomputation, without pipeline stages."""

    embedding: Part
    kinds: tuple[Part, ...]
    """Blocks that differ from each other."""
    kind_of_block: tuple[int, ...]
    """Index into ``kinds`` of every block."""
    head: Part
    hidden: Line
    """Hidden states of all tokens, [L, B, C]."""
    packed: Line
    """What a pipeline stage sends to the next one."""
    exchanged: Line
    """Copies of tokens that go to experts; 0 without experts."""
    weights_per_token: int
    """Weights that are multiplied with every token: attention, activated feed-forward networks, router, head."""
    weights_per_image: int
    """Weights that are multiplied once per image: modulation networks."""

    @property
    def blocks(self) -> tuple[Part, ...]:
        """Every block."""
        return tuple(self.kinds[kind] for kind in self.kind_of_block)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The whole model."""
        return (self.embedding, *self.blocks, self.head)

    @property
    def forward_flops(self) -> float:
        """One image forward."""
        return sum(part.forward_flops for part in self.parts)

    @property
    def model_flops(self) -> float:
        """One image forward and backward."""
        return sum(part.model_flops for part in self.parts)

    @property
    def hardware_flops(self) -> float:
        """One image forward and backward, as the kernels do it, recomputation included."""
        return sum(part.hardware_flops + part.repeated_flops for part in self.parts)

    @property
    def repetition(self) -> float:
        """Operations with recomputation over those without."""
        return self.hardware_flops / sum(part.hardware_flops for part in self.parts)

    def stage(self, parallel: ParallelConfig, rank: int) -> tuple[Part, ...]:
        """Parts that pipeline rank ``rank`` holds, all its chunks together."""
        chunks = parallel.pipeline * parallel.virtual_pipeline
        size = len(self.kind_of_block) // chunks
        blocks = self.blocks
        held = [
            block
            for chunk in range(rank, chunks, parallel.pipeline)
            for block in blocks[chunk * size : (chunk + 1) * size]
        ]
        first = (self.embedding,) if rank == 0 else ()
        last = (self.head,) if rank == parallel.pipeline - 1 else ()
        return (*first, *held, *last)

    def parameters(self, parallel: ParallelConfig, rank: int) -> RankParameters:
        """What a rank of pipeline stage ``rank`` holds; the same for all its tensor and expert coordinates."""
        parts = self.stage(parallel, rank)
        return RankParameters(
            sum(part.replicated for part in parts), sum(part.experts for part in parts) // parallel.expert
        )


@dataclass(frozen=True)
class TokenizerCost:
    """Costs per image in float32, apart from the parameters."""

    parameters: int
    encode_flops: float
    """Image to tokens and what a generator reads of them, forward only."""
    decode_flops: float
    """Tokens to image."""
    encode_bytes: float
    """Peak of the memory that encoding takes without gradient."""
    training_bytes: float | None
    """What autograd keeps of a training forward pass; None for one that cannot be trained (calling it does nothing)."""
