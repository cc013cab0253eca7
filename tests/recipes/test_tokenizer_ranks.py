"""Tokenizer training under the real engine: the same numbers for any ZeRO stage, ranks and micro-batches."""

import pytest
import torch

from megavar.config.optimizer import OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.tokenizer import AdversarialConfig, CodebookConfig, TokenizerTrainingConfig
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.data.batch import Batch
from megavar.parallel.environment import environment
from megavar.parallel.topology import initialize
from megavar.recipes.tokenizer.recipe import TokenizerTraining
from tests.distributed.harness import run_ranks
from tests.loops import EngineLoop
from tests.recipes.digit_images import TOKENIZER, digit_batch

GLOBAL_BATCH, STEPS, RATE = 8, 6, 1e-3
CONFIG = TokenizerTrainingConfig(
    codebook=CodebookConfig(revive_every=2, usage_decay=0.5, dead_below=0.3),
    adversarial=AdversarialConfig(layers=2, base_channels=8, norm_groups=4, start_step=3, lecam_weight=0.1),
)

PARTITIONED = {"stage3_param_persistence_threshold": 0}
"""Else a codebook as small as this one would be kept whole on every rank, unlike the published one."""


def train(
    stage: int,
    micro_batches: int,
    adversarial: bool,
    precision: str = "fp32",
    tokenizer: MultiScaleVQConfig = TOKENIZER,
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Metrics of every step, averaged over micro-batches and ranks, and the final codebook."""
    topology = initialize(ParallelConfig(), environment())
    config = CONFIG if adversarial else CONFIG.model_copy(update={"adversarial": None})
    recipe = TokenizerTraining(config, tokenizer, 0, torch.device("cpu"))
    share = GLOBAL_BATCH // topology.data
    size = share // micro_batches

    def batches(step: int) -> list[Batch]:
        whole = digit_batch(GLOBAL_BATCH * step, GLOBAL_BATCH)
        return whole.split(size)[topology.data_rank * micro_batches :][:micro_batches]

    loop = EngineLoop(
        recipe, topology, batches, optimizer=OptimizerConfig(lr=RATE, weight_decay=0.0, gradient_clipping=1.0),
        zero={"stage": stage} | (PARTITIONED if stage == 3 else {}), global_batch_size=GLOBAL_BATCH,
        micro_batch_size=size, precision=precision,
    )  # fmt: skip
    curve = [
        {name: value for name, value in loop.step(step).items() if isinstance(value, float)} for step in range(STEPS)
    ]
    codes = recipe.tokenizer.quantizer.embedding()
    return curve, codes.to(next(recipe.tokenizer.parameters()).dtype)


@pytest.fixture(scope="module")
def alone():
    return {adversarial: run_ranks(1, train, 0, 1, adversarial)[0] for adversarial in (False, True)}


def assert_same(result, expected, tolerance):
    for step, (ours, theirs) in enumerate(zip(result[0], expected[0], strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-6), f"{name} at step {step}"
    assert torch.allclose(result[1], expected[1], atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "stage", "micro_batches"), [(1, 1, 1), (1, 2, 4), (2, 0, 1), (2, 1, 2), (2, 2, 1), (2, 3, 2)]
)
def test_reconstruction_and_revival(alone, ranks, stage, micro_batches):
    assert "gradient_norm/discriminator" not in alone[False][0][-1]
    for result in run_ranks(ranks, train, stage, micro_batches, False):
        assert_same(result, alone[False], 1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_adversarial_training(alone, ranks, stage):
    """Not with micro-batches: each has its own adaptive weight."""
    assert {"realism", "gradient_norm/discriminator"} <= alone[True][0][-1].keys()
    for result in run_ranks(ranks, train, stage, 1, True):
        assert_same(result, alone[True], 1e-3)


@pytest.mark.distributed
def test_bfloat16_parameters(alone):
    """Rounded to 8 bits the first step's losses are near, and training works."""
    curve, codes = run_ranks(2, train, 1, 1, True, "bf16")[0]
    for name in ("squared_error", "absolute_error"):
        assert curve[0][name] == pytest.approx(alone[True][0][0][name], rel=0.05)
    assert curve[-1]["squared_error"] < curve[0]["squared_error"]
    assert codes.dtype == torch.bfloat16
    assert codes.isfinite().all()


DROPPING = TOKENIZER.model_copy(update={"dropout": 0.3})


@pytest.mark.distributed
def test_dropout_belongs_to_samples():
    """The same elements of a sample are dropped on whatever rank and in whatever micro-batch it is."""
    (expected,) = run_ranks(1, train, 1, 1, True, "fp32", DROPPING)
    undropped = run_ranks(1, train, 1, 1, True)[0]
    assert abs(expected[0][0]["loss"] - undropped[0][0]["loss"]) > 1e-3, "nothing is dropped"
    for ranks, stage in ((2, 1), (2, 2)):
        for result in run_ranks(ranks, train, stage, 1, True, "fp32", DROPPING):
            assert_same(result, expected, 1e-3)
    for result in run_ranks(2, train, 1, 2, False, "fp32", DROPPING):
        assert_same(result, run_ranks(1, train, 1, 4, False, "fp32", DROPPING)[0], 1e-4)
