"""Tokenizer training under the real engine: the same numbers for any ZeRO stage, ranks and micro-batches."""

import functools

import pytest
import torch
import torch.distributed as dist

from megavar.config.deepspeed import complete_deepspeed
from megavar.config.optimizer import OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.tokenizer import AdversarialConfig, CodebookConfig, TokenizerTrainingConfig
from megavar.data.batch import Batch
from megavar.parallel.environment import environment
from megavar.parallel.topology import initialize
from megavar.recipes.tokenizer import TokenizerTraining
from megavar.training.engine import Engine
from megavar.training.parameter_rows import write_rows
from tests.distributed.harness import run_ranks
from tests.recipes.digit_images import TOKENIZER, digit_batch

GLOBAL_BATCH, STEPS, RATE = 8, 6, 1e-3
CONFIG = TokenizerTrainingConfig(
    codebook=CodebookConfig(revive_every=2, usage_decay=0.5, dead_below=0.3),
    adversarial=AdversarialConfig(layers=2, base_channels=8, norm_groups=4, start_step=3, lecam_weight=0.1),
)


def part(batch: Batch, start: int, count: int) -> Batch:
    chosen = slice(start, start + count)
    return Batch(batch.images[chosen], batch.labels[chosen], batch.sample_ids[chosen], batch.epochs[chosen])


def train(
    stage: int, micro_batches: int, adversarial: bool, precision: str = "fp32"
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Metrics of every step, averaged over micro-batches and ranks, and the final codebook."""
    topology = initialize(ParallelConfig(), environment())
    config = CONFIG if adversarial else CONFIG.model_copy(update={"adversarial": None})
    recipe = TokenizerTraining(config, TOKENIZER, 0, torch.device("cpu"))
    share = GLOBAL_BATCH // topology.data
    size = share // micro_batches
    plan = complete_deepspeed(
        {"zero_optimization": {"stage": stage}}, where="test.json", parallel=topology.config,
        data_parallel_size=topology.data, global_batch_size=GLOBAL_BATCH, micro_batch_size=size, precision=precision,
        gradient_clipping=1.0,
    )  # fmt: skip
    engines = {
        name: Engine(name, module, decays=functools.partial(recipe.decays, name), optimizer=OptimizerConfig(lr=RATE),
                     plan=plan, topology=topology)
        for name, module in recipe.modules().items()
    }  # fmt: skip
    recipe.write_rows = functools.partial(write_rows, list(engines.values()))
    curve = []
    for step in range(STEPS):
        batch = digit_batch(GLOBAL_BATCH * step, GLOBAL_BATCH)
        start = topology.data_rank * share
        inputs = [recipe.prepare(part(batch, start + i * size, size), step) for i in range(micro_batches)]
        metrics: dict[str, list[torch.Tensor]] = {}
        for name, engine in engines.items():
            if not recipe.active(name, step):
                continue

            def loss(output, item, name=name, step=step, metrics=metrics):
                losses = recipe.loss(name, output, item, step)
                for key, value in losses.named.items():
                    metrics.setdefault(f"{name}/{key}", []).append(value)
                return losses.total

            engine.forward_backward(inputs, functools.partial(recipe.forward, name), loss)
            metrics[f"{name}/norm"] = [torch.as_tensor(float(engine.step(RATE, 0.0).gradient_norm))]
        recipe.after_step(step)
        curve.append({})
        for key, values in metrics.items():
            mean = torch.stack(values).mean()
            dist.all_reduce(mean)
            curve[-1][key] = mean.item() / topology.world_size
    return curve, recipe.tokenizer.quantizer.embedding.weight.detach().clone()


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
@pytest.mark.parametrize(("ranks", "stage", "micro_batches"), [(1, 1, 1), (1, 2, 4), (2, 0, 1), (2, 1, 2), (2, 2, 1)])
def test_reconstruction_and_revival(alone, ranks, stage, micro_batches):
    assert "discriminator/norm" not in alone[False][0][-1]
    for result in run_ranks(ranks, train, stage, micro_batches, False):
        assert_same(result, alone[False], 1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 2)])
def test_adversarial_training(alone, ranks, stage):
    """Not with micro-batches: each has its own adaptive weight."""
    assert {"autoencoder/realism", "discriminator/norm"} <= alone[True][0][-1].keys()
    for result in run_ranks(ranks, train, stage, 1, True):
        assert_same(result, alone[True], 1e-3)


@pytest.mark.distributed
def test_bfloat16_parameters(alone):
    """Rounded to 8 bits the first step's losses are near, and training works."""
    curve, codes = run_ranks(2, train, 1, 1, True, "bf16")[0]
    for name in ("squared_error", "absolute_error"):
        assert curve[0][f"autoencoder/{name}"] == pytest.approx(alone[True][0][0][f"autoencoder/{name}"], rel=0.05)
    assert curve[-1]["autoencoder/squared_error"] < curve[0]["autoencoder/squared_error"]
    assert codes.dtype == torch.bfloat16
    assert codes.isfinite().all()
