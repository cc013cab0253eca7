"""The whole trainer on STMoE-VAR: right metrics under pipelines and experts, runs that move between layouts, GANs."""

import functools
import json
import os
import signal

import pytest
import torch

from megavar.config.logging import LoggingConfig
from megavar.config.optimizer import ConstantSchedule, OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.train import TrainConfig
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.training.run import Run
from megavar.training.run_directory import RunDirectory
from megavar.training.trainer import Trainer
from tests.distributed import curves
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks
from tests.training.tiny import read_metrics

pytestmark = pytest.mark.distributed
STEPS = 6


def run_of(setup, directory, stop_after=None):
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())

    def loader(first_step, micro_batch_size):
        step = first_step
        while True:
            if step == stop_after and mesh.rank == 0:
                os.kill(os.getpid(), signal.SIGUSR2)
            yield list(curves.batches(step, mesh.data_rank, mesh.data, micro_batch_size))
            step += 1

    train = TrainConfig(
        steps=STEPS, global_batch_size=curves.BATCH, micro_batch_size=setup.micro_batch_size, ema={"decay": 0.9}
    )
    logging = LoggingConfig.model_validate({"interval": 1, "progress": "none", "wandb": {"mode": "disabled"}})
    optimizer = OptimizerConfig(
        lr=curves.LEARNING_RATE, weight_decay=curves.WEIGHT_DECAY, gradient_clipping=curves.CLIPPING,
        schedule=ConstantSchedule(),
    )  # fmt: skip
    return Trainer(
        Run(
            name="layouts", train=train, optimizer=optimizer, logging=logging,
            deepspeed={"zero_optimization": {"stage": setup.stage}}, deepspeed_origin="test",
            config={"parallel": setup.parallel}, directory=RunDirectory(directory), recipe=curves.build(setup, mesh),
            samples=100, loader=loader, topology=mesh,
        )
    ).run()  # fmt: skip


@functools.cache
def reference():
    return run_ranks(1, curves.bare_curve, Setup())[0]


def assert_metrics(directory):
    lines, expected = read_metrics(directory), reference()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, loss, norm in zip(lines, expected.loss, expected.gradient_norm):
        assert line["loss"] == pytest.approx(loss, abs=1e-5)
        assert line["gradient_norm"] == pytest.approx(norm, abs=1e-5)
        shares = [line[f"expert_share/{number}"] for number in range(4)]
        assert sum(shares) == pytest.approx(1.0) and line["balance"] > 0
    return lines


LAYOUTS = [
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(4, 2, parallel={"tensor": 2, "expert": 2, "sequence": True}),
]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_metrics_are_those_of_one_process(tmp_path, setup):
    assert set(run_ranks(setup.world_size, run_of, setup, tmp_path)) == {ExitCode.FINISHED}
    lines = assert_metrics(tmp_path)
    (plain,) = run_ranks(1, run_of, Setup(), tmp_path / "plain")
    assert plain == ExitCode.FINISHED
    for line, other in zip(lines, read_metrics(tmp_path / "plain"), strict=True):
        for name, value in other.items():
            if name.startswith(("loss", "accuracy", "expert_share", "balance")):
                assert line[name] == pytest.approx(value, abs=1e-5), name


def test_a_run_stops_under_one_layout_and_continues_under_others(tmp_path):
    stops = {2: LAYOUTS[0], 4: LAYOUTS[2], None: Setup(2, 3)}
    for stop_after, setup in stops.items():
        codes = set(run_ranks(setup.world_size, run_of, setup, tmp_path, stop_after))
        assert codes == {ExitCode.FINISHED if stop_after is None else ExitCode.PREEMPTED}
    assert_metrics(tmp_path)


def _adversarial(stage, directory):
    """Two modules that are stepped in turn, the second from step 2 on."""
    from megavar.config.recipes.tokenizer import AdversarialConfig, TokenizerTrainingConfig
    from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
    from megavar.data.batch import Batch
    from megavar.recipes.tokenizer.recipe import TokenizerTraining

    mesh = topology.initialize(ParallelConfig(), environment())
    tokenizer = MultiScaleVQConfig(
        scales=(1, 2, 4), vocabulary_size=16, code_dimension=4, base_channels=8, channel_multipliers=(1, 1, 1),
        residual_blocks=1, norm_groups=4,
    )  # fmt: skip
    adversarial = AdversarialConfig(start_step=2, base_channels=8, layers=2, norm_groups=4, adaptive=False)
    recipe = TokenizerTraining(TokenizerTrainingConfig(adversarial=adversarial), tokenizer, 3, torch.device("cpu"))

    def loader(first_step, micro_batch_size):
        step = first_step
        while True:
            share = 4 // mesh.data
            ids = torch.arange(step * 4 + mesh.data_rank * share, step * 4 + (mesh.data_rank + 1) * share)
            images = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(int(i))) for i in ids])
            yield [Batch(images.clamp(-1, 1), ids % 10, ids, torch.zeros_like(ids))]
            step += 1

    ema = {"decay": 0.9, "modules": ["autoencoder"]}
    return Trainer(
        Run(
            name="tokenizer", train=TrainConfig(steps=5, global_batch_size=4, ema=ema),
            optimizer=OptimizerConfig(lr=1e-3, schedule=ConstantSchedule(), modules={"discriminator": {"lr": 2e-3}}),
            logging=LoggingConfig.model_validate({"interval": 1, "progress": "none", "wandb": {"mode": "disabled"}}),
            deepspeed={"zero_optimization": {"stage": stage}}, deepspeed_origin="test", config={},
            directory=RunDirectory(directory), recipe=recipe, samples=100, loader=loader, topology=mesh,
        )
    ).run()  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_modules_are_trained_in_turn_at_every_stage(tmp_path, stage):
    run_ranks(1, _adversarial, 0, tmp_path / "expected")
    assert set(run_ranks(2, _adversarial, stage, tmp_path / "got")) == {ExitCode.FINISHED}
    lines, expected = read_metrics(tmp_path / "got"), read_metrics(tmp_path / "expected")
    manifest = json.loads((tmp_path / "got/checkpoints/step-00000005/manifest.json").read_text())
    averaged = {name: entry["has_average"] for name, entry in manifest["modules"].items()}
    assert averaged == {"autoencoder": True, "discriminator": False}
    assert ["discriminator" in line for line in lines] == [False, False, True, True, True]
    assert lines[-1]["learning_rate/discriminator"] == 2e-3 and lines[-1]["learning_rate/autoencoder"] == 1e-3
    for line, other in zip(lines, expected, strict=True):
        for name in ("loss", "discriminator", "realism", "gradient_norm/autoencoder", "gradient_norm/discriminator"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=2e-4), name
