"""Learning rates against values computed by hand from VAR's published formula (utils/lr_control.py)."""

import math

import pytest

from megavar.config.optimizer import (
    ConstantSchedule,
    CosineSchedule,
    Lin0Schedule,
    OptimizerConfig,
    OptimizerOverrides,
    VarCosineSchedule,
)
from megavar.config.train import TrainConfig
from megavar.errors import ConfigError
from megavar.training.schedules import (
    check_warmup,
    learning_rate,
    peak_learning_rate,
    warmup_steps,
    weight_decay,
)

PEAK = 3e-4


def lin0(step, steps=1000, **options):
    return learning_rate(Lin0Schedule(**options), PEAK, step, steps, steps_per_epoch=100.0)


def test_lin0_by_hand():
    # 1000 steps: warm-up round(1000/50) = 20 steps from 0.005, then 979 = 999 - 20 steps, of which 5 % stay flat.
    assert lin0(0) == pytest.approx(PEAK * 0.005)
    assert lin0(10) == pytest.approx(PEAK * (0.005 + 0.995 * 10 / 20))
    assert lin0(20) == PEAK
    assert lin0(68) == PEAK  # (68 - 20) / 979 = 0.0490 < 0.05
    share = (1 - 49 / 979) / 0.95  # step 69: 49 / 979 = 0.0501
    assert lin0(69) == pytest.approx(PEAK * (0.1 + 0.9 * share))
    assert lin0(500) == pytest.approx(PEAK * (0.1 + 0.9 * (1 - 480 / 979) / 0.95))
    assert lin0(999) == pytest.approx(PEAK * 0.1)


def test_lin0_for_var_d30():
    assert lin0(999, final_ratio=0.01) == pytest.approx(PEAK * 0.01)
    assert lin0(50, warmup_epochs=1.5) == pytest.approx(PEAK * (0.005 + 0.995 * 50 / 150))
    assert lin0(3, warmup_steps=3) == PEAK
    assert lin0(49, warmup_fraction=0.1) == pytest.approx(PEAK * (0.005 + 0.995 * 49 / 100))


def test_var_cosine_ends_exactly():
    schedule = VarCosineSchedule(final_ratio=0.1)
    assert learning_rate(schedule, PEAK, 999, 1000, 100.0) == pytest.approx(PEAK * 0.1)
    expected = PEAK * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (509 - 20) / 979)))
    assert learning_rate(schedule, PEAK, 509, 1000, 100.0) == pytest.approx(expected)
    assert expected == pytest.approx(PEAK * 0.55, rel=1e-2)  # half way between 1 and 0.1


def test_rar_warms_up_for_a_quarter_and_follows_a_cosine():
    schedule = CosineSchedule(warmup_steps=62_500, final_lr=1e-5)

    def rate(step):
        return learning_rate(schedule, 4e-4, step, 250_000, 625.0)

    assert rate(0) == 0.0
    assert rate(31_250) == pytest.approx(2e-4)
    assert rate(62_500) == pytest.approx(4e-4)
    assert rate(156_250) == pytest.approx((4e-4 + 1e-5) / 2)
    assert rate(250_000) == pytest.approx(1e-5)


def test_constant():
    assert learning_rate(ConstantSchedule(), PEAK, 7, 10, 1.0) == PEAK
    rates = [learning_rate(ConstantSchedule(warmup_steps=4), PEAK, step, 10, 1.0) for step in (0, 1, 4, 9)]
    assert rates == [0, PEAK / 4, PEAK, PEAK]


def test_one_step_runs_do_not_divide_by_zero():
    for schedule in (Lin0Schedule(), VarCosineSchedule(), CosineSchedule(), ConstantSchedule()):
        assert learning_rate(schedule, PEAK, 0, 1, 1.0) > 0
    assert weight_decay(OptimizerConfig(), 0, 1) == 0.05


def test_peak_follows_vars_rule_unless_given():
    assert peak_learning_rate(OptimizerConfig(), 768) == pytest.approx(3e-4)  # VAR: 1e-4 * 768 / 256
    assert peak_learning_rate(OptimizerConfig(base_lr=8e-5), 1024) == pytest.approx(3.2e-4)  # VAR-d30
    assert peak_learning_rate(OptimizerConfig(lr=1e-3), 768) == 1e-3
    with_override = OptimizerConfig(lr=1e-3, modules={"discriminator": OptimizerOverrides(lr=2e-4)})
    assert peak_learning_rate(with_override, 768, "discriminator") == 2e-4
    assert peak_learning_rate(with_override, 768, "autoencoder") == 1e-3
    with pytest.raises(ValueError, match="contradict"):
        OptimizerConfig(lr=1e-3, base_lr=1e-4)


def test_weight_decay_follows_half_a_cosine():
    config = OptimizerConfig(weight_decay=0.05, final_weight_decay=0.08)
    assert weight_decay(config, 0, 101) == pytest.approx(0.05)
    assert weight_decay(config, 50, 101) == pytest.approx(0.065)
    assert weight_decay(config, 25, 101) == pytest.approx(0.08 - 0.03 * (0.5 + 0.5 * math.cos(math.pi / 4)))
    assert weight_decay(config, 100, 101) == pytest.approx(0.08)
    assert weight_decay(OptimizerConfig(), 77, 101) == 0.05
    own = {"discriminator": OptimizerOverrides(weight_decay=0.2), "other": OptimizerOverrides(lr=1.0)}
    config = OptimizerConfig(weight_decay=0.05, final_weight_decay=0.08, modules=own)
    assert [weight_decay(config, 50, 101, name) for name in ("discriminator", "other", "autoencoder")] == [
        pytest.approx(0.14), pytest.approx(0.065), pytest.approx(0.065)
    ]  # fmt: skip


def test_lengths():
    assert TrainConfig(steps=10, global_batch_size=64).total_steps(1000) == 10
    assert TrainConfig(epochs=200.0, global_batch_size=768).total_steps(1_281_167) == round(200 * 1_281_167 / 768)
    short = [TrainConfig(epochs=epochs, global_batch_size=100).total_steps(1000) for epochs in (0.5, 0.56, 1e-9)]
    assert short == [5, 6, 1]
    assert warmup_steps(Lin0Schedule(), 333_637, 1668.2) == 6673  # ep / 50 of VAR-d16's 200 epochs
    with pytest.raises(ValueError, match="contradict"):
        Lin0Schedule(warmup_steps=1, warmup_epochs=1.0)


@pytest.mark.parametrize("schedule", [ConstantSchedule(warmup_epochs=3.0), CosineSchedule(warmup_steps=11)])
def test_a_warm_up_beyond_the_run_is_refused(schedule):
    """Also where the configuration cannot tell, because it mixes epochs and steps."""
    with pytest.raises(ConfigError, match=r"warms up for .* the run has 10 steps"):
        check_warmup(schedule, 10, 5.0)
    check_warmup(schedule, 15, 5.0)
    check_warmup(ConstantSchedule(warmup_epochs=2.0), 10, 5.0)
