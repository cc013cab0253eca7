"""Every rule about layouts: what it refuses, what it says, and that what it allows is allowed."""

import pytest

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.parallel.rules import check_layout

DENSE = VARConfig(depth=16)
EXPERTS = ExpertsChoice.make(number=8, top_k=3)
MEPA = VARConfig(depth=16, experts=EXPERTS)


def check(layout, generator=DENSE, *, zero_stage=1, world_size=8, micro_batches=4):
    limits = None if generator is None else generator.limits(TokenSpace.of_scales((1, 2, 4), 4096, 32, 64))
    check_layout(ParallelConfig(**layout), limits, zero_stage=zero_stage, world_size=world_size,
                 micro_batches=micro_batches)  # fmt: skip


@pytest.mark.parametrize(("layout", "options"), [
    ({}, {"zero_stage": 0}), ({}, {"zero_stage": 3}), ({"tensor": 8, "sequence": True}, {"zero_stage": 2}),
    ({"pipeline": 8}, {}), ({"pipeline": 2, "virtual_pipeline": 2, "tensor": 2}, {}),
    ({"expert": 8}, {"generator": MEPA, "zero_stage": 3}), ({"expert": 4, "pipeline": 2}, {"generator": MEPA}),
    ({"tensor": 2, "expert": 8}, {"generator": MEPA}), ({"tensor": 1}, {"generator": None, "zero_stage": 2}),
    # Experts lie whole on a rank: their hidden size need not be shared.
    ({"tensor": 2}, {"generator": VARConfig(depth=2, width=6, heads=2, feed_forward_ratio=1.5, experts=EXPERTS)}),
])  # fmt: skip
def test_allowed(layout, options):
    check(layout, **options)


REFUSED = [
    ({"tensor": 3}, {}, "does not divide the world size 8", "multiple of 3"),
    ({"expert": 3}, {"generator": MEPA}, "parallel.expert=3 does not divide the 8 ranks", "divisors of 8"),
    ({"tensor": 2}, {"generator": None}, "while a tokenizer is trained", "Set parallel.tensor=1"),
    ({"pipeline": 2}, {"generator": None}, "while a tokenizer is trained", "Set parallel.pipeline=1"),
    ({"expert": 2}, {"generator": None}, "while a tokenizer is trained", "Set parallel.expert=1"),
    ({"tensor": 8}, {"generator": VARConfig(depth=12)}, "12 attention heads", "divisors of 12"),
    ({"tensor": 4}, {"generator": VARConfig(depth=4, width=8, heads=4, feed_forward_ratio=1.3)},
     "10 rows of the feed-forward network", "divisors of 10"),
    ({"virtual_pipeline": 2}, {}, "needs pipeline stages", "parallel.virtual_pipeline=1"),
    ({"pipeline": 8}, {"generator": VARConfig(depth=20)}, "generator.depth=20", "product divides 20"),
    ({"pipeline": 2, "virtual_pipeline": 8}, {"generator": VARConfig(depth=24)}, "= 16 parts", "divides 24"),
    ({"pipeline": 4, "virtual_pipeline": 2}, {"micro_batches": 6}, "but it is 6", "train.micro_batch_size"),
    ({"pipeline": 2}, {"zero_stage": 2}, "ZeRO stage 2 does not work", "stage 1"),
    ({"pipeline": 2}, {"zero_stage": 3}, "ZeRO stage 3 does not work", "stage 1"),
    ({"expert": 2}, {}, "the generator has no experts", "Add generator.experts"),
    ({"expert": 8}, {"generator": VARConfig(depth=16, experts=ExpertsChoice.make(number=12))}, "number=12 is not a mul",
     "Change one of them"),
    ({"dispatcher": "allgather"}, {"generator": VARConfig(depth=16, experts=ExpertsChoice.make(backend="tutel"))},
     "own all-to-all", "parallel.dispatcher=alltoall"),
    ({"dispatcher": "allgather"}, {"generator": VARConfig(depth=16, experts=ExpertsChoice.make(backend="deepspeed"))},
     "own all-to-all", "parallel.dispatcher=alltoall"),
    ({"tensor": 2}, {"generator": VARConfig(depth=16, experts=ExpertsChoice.make(backend="deepspeed"))},
     "backend=deepspeed cannot run with parallel.tensor=2", "megatron, grouped or tutel"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "options", "reason", "remedy"), REFUSED)
def test_refused_with_reason_and_remedy(layout, options, reason, remedy):
    with pytest.raises(ConfigError) as error:
        check(layout, **options)
    assert reason in str(error.value)
    assert remedy in str(error.value)


def test_the_head_shares_the_vocabulary():
    with pytest.raises(ConfigError, match="130 codes"):
        check_layout(ParallelConfig(tensor=4), DENSE.limits(TokenSpace.of_scales((1,), 130, 8, 16)), zero_stage=1,
                     world_size=4, micro_batches=1)  # fmt: skip
