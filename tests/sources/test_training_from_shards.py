"""A real run reads shards, is killed on two ranks, continues on one, is killed again, and ends on four."""

import json
import os
import signal
from collections import defaultdict

import pytest

from megavar.commands.train import train
from megavar.config.loading import decode
from megavar.config.root import Config
from megavar.data.order import Order
from megavar.errors import ExitCode
from megavar.parallel.environment import environment
from megavar.training.trainer import Trainer
from tests.distributed.harness import RankFailure, run_ranks

pytestmark = pytest.mark.distributed
STEPS, BATCH, SEED = 13, 12, 3


def configure(shards, directory) -> Config:
    tree = {
        "run": {"name": "shards", "directory": str(directory)},
        "recipe": {"name": "tokenizer"},
        "tokenizer": {
            "name": "multiscale_vq", "scales": [1, 2, 4], "vocabulary_size": 32, "code_dimension": 4,
            "base_channels": 4, "channel_multipliers": [1, 1, 2], "residual_blocks": 1, "norm_groups": 2,
            "lowest_level_attention": False, "middle_attention": False,
        },
        "data": {
            "source": {"name": "webdataset", "path": str(shards), "test_path": str(shards)},
            "transform": {"name": "var"}, "image_size": 16,
        },
        "train": {
            "steps": STEPS, "global_batch_size": BATCH, "seed": SEED, "checkpoint": {"interval": 2},
        },
        "logging": {"interval": 1, "samples_interval": None, "wandb": {"mode": "disabled"}},
        "evaluation": {"after_training": False},
    }  # fmt: skip
    return decode(tree, Config, "test")


def train_until(config: Config, log, kill_at: int | None) -> ExitCode:
    """Train, note the samples of every step, and die by kill -9 when step ``kill_at`` has got its samples."""
    take_step = Trainer._train_step

    def noting(trainer, micro_batches):
        ids = [index for batch in micro_batches for index in batch.sample_ids.tolist()]
        with (log / f"rank-{trainer.topology.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.step, "ids": ids}) + "\n")
        if trainer.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(trainer, micro_batches)

    Trainer._train_step = noting  # in this forked process only
    return train(config, environment())


def noted(log) -> dict[int, list[int]]:
    """Sample ids of each step's global batch."""
    steps = defaultdict(list)
    for path in sorted(log.glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps[entry["step"]] += entry["ids"]
    return dict(steps)



def test_the_sequence_of_samples_is_the_uninterrupted_one(shards, tmp_path):
    """60 images in steps of 12: step 7 lies in the second epoch, step 10 begins the third."""
    config = configure(shards, tmp_path / "run")
    expected = {s: Order(60, SEED).locate(s * BATCH, (s + 1) * BATCH)[1].tolist() for s in range(STEPS)}
    for number, (ranks, kill_at) in enumerate([(2, 7), (1, 10), (4, None)]):
        log = tmp_path / f"part-{number}"
        log.mkdir()
        if kill_at is None:
            assert run_ranks(ranks, train_until, config, log, None) == [ExitCode.FINISHED] * ranks
        else:
            with pytest.raises(RankFailure):
                run_ranks(ranks, train_until, config, log, kill_at)
        seen = noted(log)
        assert {step: seen[step] for step in sorted(seen) if step != kill_at} == {
            step: expected[step] for step in sorted(seen) if step != kill_at
        }
        first = {0: 0, 1: 6, 2: 10}[number]  # after the last checkpoint
        assert sorted(seen) == list(range(first, STEPS if kill_at is None else kill_at + 1))
