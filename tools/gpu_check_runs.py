"""Sections of ``tools/gpu_check.py`` that start other commands: whole runs under torchrun, and tests of the suite."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megavar.training.checkpoint import read_weights
from megavar.training.checkpoint.store import checkpoint_name
from tools.gpu_check_worker import Check

STEPS, HALF = 8, 4


def _command(check: Check, arguments: list[str]) -> str:
    """Run a command to its end; returns what it printed.

    Raises:
        RuntimeError: it failed, or there is no time left; with the end of its output.
    """
    more = {"CUDA_VISIBLE_DEVICES": ""} if check.device.type == "cpu" else {}
    environment = os.environ | {"WANDB_MODE": "disabled", **more}
    try:
        result = subprocess.run(
            [sys.executable, "-m", *arguments], env=environment, text=True, timeout=max(1.0, check.seconds_left - 2),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(arguments[:4])} ... did not end in time") from error
    print(result.stdout, flush=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments[:4])} ... ended with {result.returncode}: {result.stdout[-800:]}")
    return result.stdout


def _train(check: Check, config: str, directory: Path, *overrides: str, torchrun: bool = False) -> str:
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"] if torchrun else []
    settings = (f"run.directory={directory}", "logging.wandb.mode=disabled", "logging.progress=none")
    return _command(check, [*start, "megavar", "train", config, *settings, *overrides])


def runs(check: Check) -> None:
    """The quickstart's two stages, a few steps each: under torchrun, then once more from the middle of the run."""
    precision = "fp32" if check.device.type == "cpu" else "bf16"
    with tempfile.TemporaryDirectory(prefix="gpu-check-runs-") as folder:
        tokenizer, run = Path(folder) / "tokenizer", Path(folder) / "run"
        _train(check, "configs/quickstart/tokenizer.yaml", tokenizer, f"train.steps={HALF}",
               "optimizer.schedule.warmup_steps=1", "logging.samples_interval=null")  # fmt: skip
        check.passed("a tokenizer trains", (tokenizer / "DONE").exists())
        settings = (
            "run.requires=[]", f"recipe.tokenizer_weights={tokenizer}", f"train.steps={STEPS}",
            f"train.checkpoint={{interval: {HALF}, keep_last: 2}}", "evaluation.after_training=false",
            "logging.samples_interval=null", "logging.interval=1", "deepspeed=configs/deepspeed/zero1.json",
            "generator.width=128", f"train.precision={precision}",
        )  # fmt: skip
        _train(check, "configs/quickstart.yaml", run, *settings, torchrun=True)
        backend = "gloo" if check.device.type == "cpu" else "NCCL"
        check.passed(f"a run of one {backend} rank under torchrun finishes", (run / "DONE").exists())
        whole = read_weights(run)
        (run / "checkpoints" / checkpoint_name(STEPS)).rename(Path(folder) / "whole")
        (run / "DONE").unlink()
        (run / "checkpoints" / "latest").unlink(missing_ok=True)
        output = _train(check, "configs/quickstart.yaml", run, *settings)
        resumed = read_weights(run)
        different = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
        check.passed(
            f"a run of {STEPS} steps that continues after step {HALF} ends with the same bits",
            f"Continuing after step {HALF}" in output and not different,
            different_tensors=different[:20], of=len(whole),
        )  # fmt: skip


def gradient_tests(check: Check) -> None:
    """The suite's comparison of FlexAttention's gradients with ``dense``: all rules, paddings, groups of heads."""
    try:
        tests = ["tests/transformer/test_kernels.py", "-k", "flex and gradient"]
        output = _command(check, ["pytest", "-n", "0", "-v", *tests])
    except RuntimeError as error:
        check.passed("tests/transformer/test_kernels.py -k gradient", False, reason=str(error))
        return
    if check.device.type == "cpu":
        check.record(check="tests/transformer/test_kernels.py -k gradient", skipped="it needs a GPU")
        return
    counted = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", output)}
    check.passed("tests/transformer/test_kernels.py -k gradient", bool(counted.get("passed")), **counted)
