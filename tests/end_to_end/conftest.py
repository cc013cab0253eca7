"""A tiny digits run through the real command line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY_TOKENIZER = (
    "train.steps=6", "train.checkpoint.interval=6", "logging.samples_interval=6", "optimizer.schedule.warmup_steps=2",
)  # fmt: skip
TINY = (
    "run.requires=[]", "generator.depth=2", "generator.width=32", "train.steps=20", "train.global_batch_size=16",
    "train.checkpoint.interval=5", "logging.interval=1", "logging.samples_interval=20",
    "evaluation.after_training=false", "logging.wandb.mode=disabled", "validation=null",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a finished command printed."""

    code: int
    output: str


def megavar(*arguments: str, ranks: int = 1, timeout: float = 240) -> Outcome:
    """Run ``python -m megavar`` (under torchrun for several ranks)."""
    process = start(arguments, ranks)
    output, _ = process.communicate(timeout=timeout)
    return Outcome(process.returncode, output)


def start(arguments: Sequence[str], ranks: int = 1) -> "subprocess.Popen[str]":
    """Start ``python -m megavar`` and return at once."""
    launcher = ["-m", "megavar"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "megavar"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def metrics(directory: Path) -> dict[int, dict[str, float]]:
    """Logged values by step."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained for a few steps: not good, but real."""
    directory = tmp_path_factory.mktemp("tokenizer") / "run"
    outcome = megavar("train", "configs/quickstart/tokenizer.yaml", f"run.directory={directory}", *TINY_TOKENIZER)
    assert outcome.code == 0, outcome.output
    return directory


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_run: Path) -> Path:
    """An uninterrupted single-process run of 20 steps, the reference of the others."""
    directory = tmp_path_factory.mktemp("generator") / "run"
    outcome = megavar("train", "configs/quickstart.yaml", *overrides(directory, tokenizer_run))
    assert outcome.code == 0, outcome.output
    return directory


def overrides(directory: Path, tokenizer: Path, *more: str) -> tuple[str, ...]:
    """Command-line overrides of the tiny run in ``directory``."""
    return (*TINY, f"run.directory={directory}", f"recipe.tokenizer_weights={tokenizer}", *more)
