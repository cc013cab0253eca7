"""Moving averages against values made by hand, on ranks that hold a part each; whose they are, and since when."""

import pytest
import torch

from megavar.config.train import EmaConfig
from megavar.errors import ConfigError
from megavar.training.checkpoint.master import master_tensors
from megavar.training.ema import MovingAverage, moving_averages
from tests.distributed.harness import run_ranks
from tests.loops import run_pass
from tests.training import tiny


def train(stage, precision, config, steps):
    """This rank's parts of the average, and of the weights before the first and after every step."""
    engine, mesh, size = tiny.build_engine(stage, precision=precision)
    average = MovingAverage(engine, config)

    def weights():
        return [tensor.detach().clone() for tensor in master_tensors(engine.deepspeed)]

    history, averages = [weights()], []
    for step in range(steps):
        dtype = next(engine.module.parameters()).dtype
        items = [(x.to(dtype), target) for x, target in tiny.local_micro_batches(step, mesh, size)]
        run_pass(engine, items, lambda model, x: model(x[0]), lambda output, x: tiny.loss_of(output, x[1]))
        engine.step(tiny.LEARNING_RATE, tiny.WEIGHT_DECAY)
        average.update(step)
        history.append(weights())
        averages.append([tensor.clone() for tensor in average.tensors])
    return history, averages


def mix(old, new, decay):
    return [decay * a + (1 - decay) * b for a, b in zip(old, new, strict=True)]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_three_steps_by_hand(stage, precision):
    for history, averages in run_ranks(2, train, stage, precision, EmaConfig(decay=0.15, warmup=True), 3):
        expected = history[0]
        for step, decay in enumerate((1 / 10, 0.15, 0.15)):  # (1 + 1) / (10 + 1) is more than 0.15
            expected = mix(expected, history[step + 1], decay)
            for got, wanted in zip(averages[step], expected, strict=True):
                assert got.dtype == torch.float32
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(a, b) for a, b in zip(averages[-1], history[-1], strict=True))


def test_before_its_start_the_average_is_the_weights():
    for history, averages in run_ranks(2, train, 1, "fp32", EmaConfig(decay=0.5, warmup=True, start_step=2), 4):
        for step in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(averages[step], history[step + 1], strict=True))
        expected = mix(history[2], history[3], 1 / 10)  # warm-up begins at the start step
        expected = mix(expected, history[4], 2 / 11)
        for got, wanted in zip(averages[3], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def _chosen():
    engine, _, _ = tiny.build_engine(1)
    engines = {"generator": engine, "discriminator": engine}
    assert moving_averages(engines, None) == {}
    assert list(moving_averages(engines, EmaConfig())) == ["generator", "discriminator"]
    assert list(moving_averages(engines, EmaConfig(modules=("generator",)))) == ["generator"]
    with pytest.raises(ConfigError) as caught:
        moving_averages(engines, EmaConfig(modules=("generater",)))
    return str(caught.value)


def test_modules_that_are_averaged_can_be_named():
    (message,) = run_ranks(1, _chosen)
    assert "train.ema.modules" in message and "'generater'" in message and "Did you mean 'generator'?" in message
