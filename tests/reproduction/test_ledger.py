"""The ledger: what a finished run gave, once, with what identifies it."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from megavar import storage
from megavar.chunks import ChunkStore
from megavar.config.table import TableConfig
from megavar.reproduction import ledger
from megavar.training.run_directory import RunDirectory, identity_of

ROOT = Path(__file__).parents[2]
TABLE = TableConfig.model_validate(
    {"name": "t", "source": "s", "title": "t", "protocol": "p",
     "metrics": {"fd": {"heading": "FD", "key": "fd64", "better": "lower"},
                 "loss": {"heading": "loss", "key": "log/loss"},
                 "variance": {"heading": "variance", "key": "expert_load/variance"},
                 "is": {"heading": "IS", "key": "isc"}},
     "rows": [{"name": "a", "config": "configs/quickstart.yaml", "run": "a"},
              {"name": "b", "config": "configs/quickstart.yaml", "run": "b", "overrides": ["train.seed=1"]}]},
    strict=False,
)  # fmt: skip
STEP = "step-00000800"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of row ``a``: 20 steps of 64 images at 128 images/s on one rank, then 20 at 256 on two."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "vae.pth").write_bytes(b"weights")
    extra = (f"run.directory={tmp_path / 'run'}", f"recipe.tokenizer_weights={tmp_path / 'vae.pth'}")
    config = TABLE.config_of(TABLE.row("a"), extra)
    directory = RunDirectory.of(config)
    lines = []
    for ranks, speed, first in ((1, 128.0, 10), (2, 256.0, 30)):
        devices = [{"host": "n1", "name": "a GPU", "count": ranks}]
        directory.open(json.loads(config.model_dump_json()), {"world_size": ranks}, {}, devices=devices)
        for step in (first, first + 10):
            lines.append({"time": time.time(), "step": step, "loss": 10 - step / 10, "images_per_second": speed})
        time.sleep(1.1)  # starts are known to the second
    lines.append({"time": 0, "step": 40, "event": "spike"})
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampler = config.sampling.model_dump(mode="json", exclude={"keep_images", "cuda_graph"})
    scores = {"suite": "digits", "metrics": {"fd64": 38.5, "other": 1.0}, "count": 5, "sampler": sampler,
              "checkpoint": {"checkpoint": STEP}}  # fmt: skip
    samples = directory.path / "generated" / f"{STEP}-abcd1234"
    store = ChunkStore.open(samples, count=5, size=3, identity={})
    for chunk, rows in enumerate((3, 2)):
        tokens = np.full((rows, 4), chunk)
        store.write(chunk, {"tokens": tokens, "images": np.zeros((rows, 1))})
    for name, changed in ((STEP, {}), ("untrained", {"checkpoint": {"checkpoint": "initial weights"}}),
                          ("step-00000900", {"sampler": sampler | {"guidance": 9.0}})):  # fmt: skip
        path = directory.path / f"scores-digits-{name}-abcd1234.json"
        storage.write_json_atomic(path, scores | changed | ({} if name == STEP else {"metrics": {"fd64": 1.0}}))
    (directory.path / "analysis").mkdir()
    storage.write_json_atomic(directory.path / "analysis/expert_load.json", {"metrics": {"variance": 2.41}})
    directory.finish({})
    return extra


def test_a_finished_run_is_collected_once(run, tmp_path):
    path = tmp_path / "ledger.jsonl"
    only_a = TABLE.model_copy(update={"rows": TABLE.rows[:1]})
    (entry,) = ledger.collect(only_a, run, path)
    assert entry.metrics == {"fd": 38.5, "loss": 6.0, "variance": 2.41}
    # 20 steps x 64 images / 128 per second on one rank, and as many at 256 on two
    assert entry.gpu_hours == pytest.approx((20 * 64 / 128 * 1 + 20 * 64 / 256 * 2) / 3600, abs=1e-4)
    assert (entry.steps, entry.ranks, entry.device, entry.count, entry.suite) == (40, 2, "a GPU", 5, "digits")
    config = TABLE.config_of(TABLE.row("a"), run)
    assert entry.config == identity_of(config) and len(entry.samples) == 64
    assert ledger.collect(only_a, run, path) == []
    assert ledger.read(path) == [entry]


def test_entries_are_found_by_row_and_by_what_was_trained(run, tmp_path):
    path = tmp_path / "ledger.jsonl"
    (entry,) = ledger.collect(TABLE.model_copy(update={"rows": TABLE.rows[:1]}), run, path)
    other = TABLE.model_copy(update={"name": "u"})
    assert ledger.entry_of([entry], other, other.row("a"), other.config_of(other.row("a"), run)) == entry
    assert ledger.entry_of([entry], other, other.row("b"), other.config_of(other.row("b"), run)) is None
    moved = TABLE.config_of(TABLE.row("a"), (*run, "optimizer.lr=1e-9"))
    assert ledger.entry_of([entry], TABLE, TABLE.row("a"), moved) == entry


def test_other_samples_have_another_hash(run, tmp_path):
    directory = ChunkStore.open(tmp_path / "s", count=2, size=1, identity={})
    for chunk in (0, 1):
        directory.write(chunk, {"tokens": np.array([[chunk]])})
    first = ledger.samples_hash(tmp_path / "s")
    directory.write(1, {"tokens": np.array([[7]])})
    assert ledger.samples_hash(tmp_path / "s") != first


def test_places_of_data_and_weights_are_no_part_of_what_is_trained(monkeypatch):
    monkeypatch.chdir(ROOT)
    row = TABLE.row("a")
    moved = "recipe.tokenizer_weights=elsewhere/quickstart-tokenizer"
    same = (moved, "run.directory=elsewhere", "sampling.guidance=2.0")
    assert identity_of(TABLE.config_of(row, same)) == identity_of(TABLE.config_of(row))
    assert identity_of(TABLE.config_of(row, ("train.seed=1",))) == identity_of(TABLE.config_of(TABLE.row("b")))
    for other in ("train.seed=1", "recipe.tokenizer_weights=runs/another-tokenizer"):
        assert identity_of(TABLE.config_of(row, (other,))) != identity_of(TABLE.config_of(row))
