"""Numbers of parameters of a VAR in closed form: in total, used per token, and held by one rank of a layout.

Each count is checked against the real modules (tests/planning/test_parameters.py).
"""

from dataclasses import dataclass

from megavar.config.parallel import ParallelConfig
from megavar.planning.shape import GeneratorShape


@dataclass(frozen=True)
class ParameterCount:
    """Scalars of a whole generator."""

    total: int
    activated: int
    """Those that take part in computing one token: of the experts only ``top_k`` (MEPA's "activated" parameters)."""
    per_token: int
    """Weights that are multiplied with every token: attention, activated feed-forward networks, router, head."""
    per_image: int
    """Weights that are multiplied once per image: the modulation networks."""


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


def feed_forward(shape: GeneratorShape, tensor: int = 1) -> int:
    """One feed-forward network or expert, with biases; ``tensor`` ranks share it."""
    sharded = 2 * shape.width * shape.hidden + shape.hidden
    return sharded // tensor + shape.width


def _attention(shape: GeneratorShape, tensor: int) -> int:
    width = shape.width
    sharded = 4 * width * width + 2 * width + (shape.heads if shape.generator.qk_l2_norm else 0)
    return sharded // tensor + width  # the bias of the output projection is replicated


def _modulation(shape: GeneratorShape, vectors: int, tensor: int) -> int:
    return (shape.width + 1) * vectors * shape.width // tensor


def router(shape: GeneratorShape) -> int:
    """The router of one block, with its scale embedding if it has one."""
    experts = shape.experts
    if experts is None:
        return 0
    embedded = experts.router == "scale" or experts.scale_embedding_in_router
    return (experts.number + (len(shape.scales) if embedded else 0)) * shape.width


def _block(shape: GeneratorShape, tensor: int) -> int:
    """A block without its experts."""
    shared = shape.generator.shared_adaptive_norm
    modulation = 6 * shape.width if shared else _modulation(shape, 6, tensor)
    dense = feed_forward(shape, tensor) if shape.experts is None else router(shape)
    return _attention(shape, tensor) + modulation + dense


def _embedding(shape: GeneratorShape, tensor: int) -> int:
    rows = shape.generator.classes + 1 + shape.code_dimension + 1 + shape.first + shape.tokens + len(shape.scales)
    shared = _modulation(shape, 6, tensor) if shape.generator.shared_adaptive_norm else 0
    return rows * shape.width + shared


def _head(shape: GeneratorShape, tensor: int) -> int:
    return _modulation(shape, 2, tensor) + (shape.width + 1) * shape.vocabulary // tensor


def count_parameters(shape: GeneratorShape) -> ParameterCount:
    """Scalars of the whole generator."""
    width, experts = shape.width, shape.experts
    whole = rank_parameters(shape, ParallelConfig(), 0)
    modulation = max(shape.depth * shape.modulation, 6 * width * width) + 2 * width * width
    used = 1 if experts is None else experts.top_k
    unused = 0 if experts is None else shape.depth * (experts.number - experts.top_k) * feed_forward(shape)
    routing = 0 if experts is None else experts.number * width
    per_token = shape.depth * (4 * width * width + used * 2 * width * shape.hidden + routing)
    return ParameterCount(
        total=whole.total,
        activated=whole.total - unused,
        per_token=per_token + width * shape.vocabulary,
        per_image=modulation,
    )


def rank_parameters(shape: GeneratorShape, parallel: ParallelConfig, pipeline_rank: int) -> RankParameters:
    """What a rank of pipeline stage ``pipeline_rank`` holds; the same for all its tensor and expert coordinates."""
    tensor, experts = parallel.tensor, shape.experts
    blocks = shape.depth // parallel.pipeline
    replicated = blocks * _block(shape, tensor)
    if pipeline_rank == 0:
        replicated += _embedding(shape, tensor)
    if pipeline_rank == parallel.pipeline - 1:
        replicated += _head(shape, tensor)
    held = 0 if experts is None else blocks * (experts.number // parallel.expert) * feed_forward(shape)
    return RankParameters(replicated, held)
