"""What autograd keeps between forward and backward, part by part, as our modules save it.

One *unit* is a tensor [L, B, C] in the run's precision. The lists below follow ``transformer/block.py``,
``attention.py``, ``moe/`` and ``generators/var.py`` line by line; tests/planning/test_activations.py holds them against
what ``saved_tensors_hooks`` reports.
"""

from dataclasses import dataclass

from megavar.config.parallel import ParallelConfig
from megavar.planning.flops import Recompute
from megavar.planning.shape import GeneratorShape

FLOAT32 = 4


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at a time."""

    shape: GeneratorShape
    parallel: ParallelConfig
    images: int
    """Images of the micro-batch, B."""
    element: int
    """Bytes of an activation: 2 for bf16, 4 for fp32."""
    kernel: str
    """Attention kernel."""
    imbalance: float = 1.25
    """Tokens of the busiest rank's experts over the mean, under expert parallelism. An assumption; a working balance
    loss keeps it near 1."""

    @property
    def rows(self) -> int:
        """Rows of hidden states of the whole sequence."""
        tensor = self.parallel.tensor
        padded = self.parallel.sequence or self.shape.experts is not None
        tokens = -(-self.shape.tokens // tensor) * tensor if padded else self.shape.tokens
        return tokens * self.images

    @property
    def unit(self) -> float:
        """Bytes of a tensor [L, B, C]."""
        return self.rows * self.shape.width * self.element

    @property
    def between(self) -> int:
        """Ranks over which hidden states between the tensor-parallel layers are sharded."""
        return self.parallel.tensor if self.parallel.sequence else 1


def attention_bytes(batch: MicroBatch, *, recomputed: bool) -> float:
    """The attention branch of one block; ``recomputed``: its core is computed again."""
    shape, unit, tensor = batch.shape, batch.unit, batch.parallel.tensor
    mixed = batch.element < FLOAT32
    heads = batch.rows * shape.heads * FLOAT32  # one float32 per head and row
    between = 4 * unit  # input and output of the norm, the projection's input, the branch before its gate
    inside = 3 * unit  # queries, keys and values
    if shape.generator.qk_l2_norm:
        # Normalized queries before and after the temperature, normalized keys; under bf16 the first and what both
        # were computed from are float32 copies.
        inside += 2 * unit + (3 * batch.rows * shape.width * FLOAT32 if mixed else unit)
        inside += 4 * heads  # lengths
    inside += unit  # input of the output projection
    if not recomputed:
        inside += heads + (0 if batch.kernel == "dense" else unit)  # log-sum-exp; result before it is put in order
    statistics = 2 * batch.rows * FLOAT32
    return (between + statistics) / batch.between + inside / tensor


def feed_forward_bytes(batch: MicroBatch) -> float:
    """The feed-forward branch of one block."""
    shape, unit, tensor = batch.shape, batch.unit, batch.parallel.tensor
    ratio = shape.hidden / shape.width
    statistics = 2 * batch.rows * FLOAT32
    # Input and output of the norm, the branch before its gate; without experts the first layer's input.
    between = 3 * unit + statistics + (unit if shape.experts is None else 0)
    if shape.experts is None:
        return between / batch.between + 2 * ratio * unit / tensor  # before and after the activation
    routed = expert_tokens(batch)
    # The experts' input; their hidden layer before and after the activation and after the gate.
    computed = routed * shape.width * batch.element * (1 + 3 * ratio)
    # Router: float32 input, scores and their parts; permutation: indices and masks.
    rows = batch.rows / tensor
    router = rows * (shape.width + 2 * shape.experts.number) * FLOAT32 + routed * 16
    return between / batch.between + router + computed


def expert_tokens(batch: MicroBatch) -> float:
    """Copies of tokens that this rank's experts compute."""
    assert batch.shape.experts is not None
    spread = batch.imbalance if batch.parallel.expert > 1 else 1.0
    return batch.rows / batch.parallel.tensor * batch.shape.experts.top_k * spread


def block_bytes(batch: MicroBatch, recompute: Recompute) -> float:
    """What one block keeps."""
    per_image = batch.images * batch.shape.width * batch.element
    if recompute == "full":
        return batch.unit / batch.between
    modulation = 6 * per_image + (0 if batch.shape.generator.shared_adaptive_norm else per_image)
    return attention_bytes(batch, recomputed=recompute == "selective") + feed_forward_bytes(batch) + modulation


def head_bytes(batch: MicroBatch) -> float:
    """Input and output of the last norm and the projection's input, all float32, and float32 copies of weights."""
    shape = batch.shape
    copies = (2 * shape.width + shape.vocabulary) * shape.width / batch.parallel.tensor
    return FLOAT32 * (3 * batch.rows * shape.width + (copies if batch.element < FLOAT32 else 0))


def logits_bytes(batch: MicroBatch) -> float:
    """One float32 tensor of logits [B, L, V]."""
    return FLOAT32 * batch.rows * batch.shape.vocabulary / batch.parallel.tensor


def working_bytes(batch: MicroBatch, recompute: Recompute) -> float:
    """Gradients inside the block whose backward pass runs, and what full recomputation restores for it."""
    shape, ratio = batch.shape, batch.shape.hidden / batch.shape.width
    if shape.experts is None:
        gradients = (2 * ratio / batch.parallel.tensor + 2) * batch.unit
    else:
        gradients = 2 * batch.unit + expert_tokens(batch) * 2 * ratio * shape.width * batch.element
    return gradients + (block_bytes(batch, "none") if recompute == "full" else 0.0)


def chunks_in_flight(parallel: ParallelConfig, pipeline_rank: int, micro_batches: int) -> int:
    """Forward passes of a model chunk whose backward pass is still to come, at most (Megatron-core's schedules)."""
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks == 1:
        return min(micro_batches, stages - pipeline_rank)
    warmup = (stages - pipeline_rank - 1) * 2 + (chunks - 1) * stages
    return min(micro_batches * chunks, warmup + 1)


def activation_bytes(
    batch: MicroBatch, recompute: Recompute, pipeline_rank: int = 0, micro_batches: int = 1
) -> dict[str, float]:
    """What a rank keeps at its fullest moment: ``blocks`` and, on the last stage, ``head`` and ``logits``.

    ``logits`` holds three copies: while the loss is computed or differentiated, logits, log-probabilities and a
    gradient exist together.
    """
    parallel = batch.parallel
    blocks = batch.shape.depth // (parallel.pipeline * parallel.virtual_pipeline)
    kept = blocks * block_bytes(batch, recompute)
    if parallel.pipeline > 1:
        kept += batch.unit / batch.between  # the packed tensor that goes to the next stage
    parts = {"blocks": kept * chunks_in_flight(parallel, pipeline_rank, micro_batches), "head": 0.0, "logits": 0.0}
    if pipeline_rank == parallel.pipeline - 1:
        parts["head"] = head_bytes(batch)
        parts["logits"] = 3 * logits_bytes(batch)
    return parts
