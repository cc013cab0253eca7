"""Real runs read shards: killed on two ranks, continued on one and on four; and over a shard that breaks off."""

import json
import multiprocessing
import os
import shutil
import signal
from collections import defaultdict
from pathlib import Path

import pytest

from megavar.commands.train import train
from megavar.config.loading import decode
from megavar.config.root import Config
from megavar.data.order import Order
from megavar.data.shards.index import build_index
from megavar.data.shards.verification import verify_shards
from megavar.errors import DataError, ExitCode
from megavar.parallel.environment import environment
from megavar.training.trainer import Trainer
from tests.distributed.harness import RankFailure, run_ranks

pytestmark = pytest.mark.distributed
STEPS, BATCH, SEED = 13, 12, 3


def configure(shards, directory, interval=2, source=None, **data) -> Config:
    tree = {
        "run": {"name": "shards", "directory": str(directory)},
        "recipe": {"name": "tokenizer"},
        "tokenizer": {
            "name": "multiscale_vq", "scales": [1, 2, 4], "vocabulary_size": 32, "code_dimension": 4,
            "base_channels": 4, "channel_multipliers": [1, 1, 2], "residual_blocks": 1, "norm_groups": 2,
            "lowest_level_attention": False, "middle_attention": False,
        },
        "data": {
            "source": {"name": "webdataset", "path": str(shards), "test_path": str(shards), **(source or {})},
            "transform": {"name": "var"}, "image_size": 16, **data,
        },
        "train": {
            "steps": STEPS, "global_batch_size": BATCH, "seed": SEED, "checkpoint": {"interval": interval},
        },
        "logging": {"interval": 1, "samples_interval": None, "wandb": {"mode": "disabled"}},
        "evaluation": {"after_training": False},
    }  # fmt: skip
    return decode(tree, Config, "test")


def train_until(config: Config, log, kill_at: int | None) -> ExitCode:
    """Train, note the samples of every step, and die by kill -9 when step ``kill_at`` has got its samples."""
    multiprocessing.current_process()._config["daemon"] = False  # which may not start the worker processes of a loader
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
    assert verify_shards(shards, full=True) == []
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


def train_and_note(config: Config, log) -> tuple[int, str]:
    """Exit code and message of this rank."""
    try:
        return train_until(config, log, None), ""
    except DataError as error:
        return error.exit_code, str(error)


def cut_in_half(folder: Path) -> None:
    path = folder / "shard-000002.tar"
    records = build_index(path)[0]
    path.write_bytes(path.read_bytes()[: int(records["image_offset"][6]) + 10])


CASES = [({}, 1), ({"order": "stream", "lanes": 4}, 0)]


@pytest.mark.parametrize(("source", "workers"), CASES)
def test_a_cut_shard_ends_all_ranks_saved_or_is_counted(shards, tmp_path, source, workers):
    """Neither the rank that meets it nor the others hang; repaired, the run goes on where it was."""
    copy = shutil.copytree(shards, tmp_path / "shards")
    cut_in_half(copy)
    logs = {name: tmp_path / name for name in ("fail", "repaired", "skip")}
    for log in logs.values():
        log.mkdir()
    config = configure(copy, tmp_path / "strict", interval=100, source=source, workers=workers)
    outcomes = run_ranks(2, train_and_note, config, logs["fail"])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == ExitCode.CONFIGURATION
    assert "shard-000002.tar" in outcomes[0][1] and "skip-and-count" in outcomes[0][1]

    repaired = configure(shards, tmp_path / "strict", interval=100, source=source, workers=workers)
    assert run_ranks(2, train_until, repaired, logs["repaired"], None) == [ExitCode.FINISHED] * 2
    before, after = noted(logs["fail"]), noted(logs["repaired"])
    assert sorted(before) + sorted(after) == list(range(STEPS)) and before and after  # nothing is lost

    config = configure(copy, tmp_path / "tolerant", source=source, workers=workers, damaged_samples="skip-and-count")
    assert run_ranks(2, train_until, config, logs["skip"], None) == [ExitCode.FINISHED] * 2
    expected, seen = before | after, noted(logs["skip"])
    assert {len(ids) for ids in seen.values()} == {BATCH}
    replaced = [(e, s) for step in range(STEPS) for e, s in zip(expected[step], seen[step], strict=True) if e != s]
    assert {sample for sample, _ in replaced} == set(range(24 + 6, 36))
    metrics = [json.loads(line) for line in (tmp_path / "tolerant/metrics.jsonl").read_text().splitlines()]
    assert sum(values.get("replaced_samples", 0) for values in metrics) == len(replaced)
    text = "".join(path.read_text() for path in (tmp_path / "tolerant/logs").rglob("rank-*.log"))
    preview = f"step={STEPS} "  # reads damaged images, too, after the last step
    named = sum("stands in for it" in line and preview not in line for line in text.splitlines())
    assert named == len(replaced) or (workers and named > len(replaced))  # workers have read ahead
