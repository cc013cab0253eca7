"""A folder with all that the pages say to have, in which their commands run at small size, each in a forked process."""

import argparse
import contextlib
import functools
import gc
import importlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import yaml

from megavar import __main__ as command_line
from megavar.commands.analyze import _choice
from megavar.config.loading import load_config
from megavar.config.table import load_table
from megavar.planning.plan import configured_layout
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.commands.test_init import photographs
from tests.distributed import harness
from tests.docs.commands import ROOT, Shown
from tests.launchers.stubs import Stubs
from tests.tokenizers.public_files import save_public

FULL_SIZE = {
    "tokenizer": {"scales": [1, 2, 4], "vocabulary_size": 64, "code_dimension": 8, "refinement_count": 3,
                  "base_channels": 8, "channel_multipliers": [1, 1, 2], "residual_blocks": 1, "norm_groups": 4,
                  "lowest_level_attention": False, "middle_attention": False},
    "generator": {"depth": 2, "width": 32, "heads": 2, "classes": 2},
    "data": {"image_size": 16, "transform": {"name": "var", "resize": 18}, "workers": 0},
    "train": {"epochs": None, "steps": 2, "global_batch_size": 64, "precision": "fp32", "ema": {"decay": 0.9},
              "checkpoint": {"interval": 2, "keep_every": 2, "asynchronous": False}},
    "logging": {"interval": 1, "samples_interval": None, "wandb": {"mode": "disabled"}},
    "sampling": {"number": 4, "chunk_size": 4},
}  # fmt: skip
SHORT = {"train": {"steps": 2, "global_batch_size": 8, "checkpoint": {"interval": 2}},
         "optimizer": {"schedule": {"warmup_steps": 1}},
         "logging": {"interval": 1, "samples_interval": 2, "wandb": {"mode": "disabled"}}}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "configs/mepa/stmoe_d16.yaml": FULL_SIZE,
    "configs/mepa/var_d16.yaml": FULL_SIZE,
    "configs/quickstart/tokenizer.yaml": SHORT,
    "configs/quickstart.yaml": SHORT | {
        "run": {"requires": ["small/configs/quickstart/tokenizer.yaml"]},
        "generator": {"depth": 2, "width": 32}, "sampling": {"number": 10}, "evaluation": {"after_training": False}},
}  # fmt: skip
"""Shipped configurations that commands of the pages run with, and what is put over them."""

STANDS_FOR = {
    "CONFIG": "photos.yaml", "RUN": "runs/photos", "OTHER_RUN": "runs/other", "NEW": "runs/new", "DIR": "other-photos",
    "KIND": "expert_load", "TABLE": "configs/tables/mepa/table4.yaml", "tableN.yaml": "table3.yaml", "N": "8",
    "NAME": "h200", "JOB": "4711", "OUT": "out", "FILE": "file.json", "mepa-d16": "stmoe-d16", "207": "1",
    "train.steps=2000": "train.steps=6", "analysis.images=256": "analysis.images=8",
}  # fmt: skip
"""Placeholders and lengths of the pages."""
_WORD = re.compile("|".join(rf"(?<![\w.-]){re.escape(word)}(?![\w-])" for word in STANDS_FOR))
_PLACE = re.compile(r"(?<![\w.])/(data|weights|var)/")
APPENDED = {
    "megavar sample": ("sampling.number=8",),
    "megavar evaluate": ("evaluation.samples=16",),
    "megavar fork": ("train.steps=6",),
    "megavar reproduce": ("--no-costs", "--ledger", "ledger.jsonl"),
    "megavar plan --write": ("run.directory=runs/by-layout",),
    "launchers.slurm submit": ("run.directory=runs/submitted-{number}",),
    "launchers.preflight": ("--bandwidth-mib", "1"),
    "tools.cache_tokens": ("--batch", "16"),
    "tools.shard_images": ("--processes", "1"),
    "tools.verify_shards": ("--processes", "1"),
}
"""What keeps a command short, or out of the way of the others, by its program (and an option)."""


def module_of(shown: Shown) -> tuple[Any, list[str]]:
    """The module that a command runs, and the first of its arguments where that is its subcommand."""
    name, *subcommand = shown.program.split()
    return importlib.import_module("megavar.__main__" if name == "megavar" else name), subcommand


class Workshop:
    """Photographs, ImageNet's place, published weights, a cluster file: under the names that the pages use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        photographs(folder / "photos", {"cat": 40, "coffee": 40})
        (folder / "photos/coffee").rename(folder / "photos/dog")
        photographs(folder / "other-photos", {"cat": 8, "astronaut": 8})
        (folder / "data/imagenet").mkdir(parents=True)
        (folder / "data/imagenet/train").symlink_to(folder / "photos")
        for name, over in SMALL.items():
            file = folder / "small" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump({"base": str(ROOT / name)} | over))
        (folder / "weights").mkdir()
        torch.manual_seed(0)
        tokenizer = MultiScaleVQ(load_config(folder / "small/configs/mepa/var_d16.yaml").tokenizer)
        save_public(tokenizer, folder / "weights/vae_ch160v4096z32.pth")
        (folder / "var/lib/node_exporter/textfile").mkdir(parents=True)
        (folder / "cached.yaml").write_text(yaml.safe_dump({
            "base": "photos.yaml",
            "data": {"source": {"name": "cache", "path": "caches/photos", "images": {
                "name": "image_folder", "path": "photos", "test_share": 0.1}}},
        }))  # fmt: skip
        (folder / "cluster.yaml").write_text("partition: main\ngpus_per_node: 8\nnode_local_directory: /local\n")
        self.slurm = Stubs(folder / "bin", sbatch="4711", squeue="")

    def words(self, shown: Shown) -> list[str]:
        """Arguments with stand-ins for placeholders, sizes and places."""
        text = "\n".join(shown.arguments).replace("--step\n400", "--step\n2").replace("=...", "=data/imagenet/train")
        text = _WORD.sub(lambda match: STANDS_FOR[match[0]], text)
        if shown.program == "tools.cache_tokens":
            text = text.replace("photos.yaml", "cached.yaml")
        if "DIRECTORY" in text:
            text = text.replace("DIRECTORY", next((self.folder / "runs/photos/generated").iterdir()).name)
        return _PLACE.sub(rf"{self.folder}/\1/", text).split("\n") if text else []

    def run(self, shown: Shown) -> str:
        """What the command printed.

        Raises:
            AssertionError: it failed.
        """
        module, subcommand = module_of(shown)
        words = [f"small/{word}" if word in SMALL else word for word in self.words(shown)]
        self._make(shown.program, words)
        self.number += 1
        for key, more in APPENDED.items():
            program, _, option = key.partition(" --")
            if shown.program == program and (not option or f"--{option}" in words):
                place = {"megavar fork": 2}.get(program, 1 if program.startswith("megavar") else len(words))
                words[place:place] = [word.format(number=self.number) for word in more]
        run = functools.partial(_as_a_person, module, [*subcommand, *words])
        # One process measures for all plans of this process; each fork would start its own.
        code, output = self._here(run) if shown.program == "megavar plan" else self._in_a_fork(run)
        assert code == 0, f"{shown}\nran as {words} and left with {code}:\n{output[-3000:]}"
        if shown.program == "megavar init":
            for file in self.folder.glob("*photos*.yaml"):
                shrink(file)
        return output

    def _make(self, program: str, words: list[str]) -> None:
        """Runs that a page takes for granted; and none where a fork goes."""
        if program == "megavar fork":
            shutil.rmtree(self.folder / words[1], ignore_errors=True)
        if "runs/var-d16" in words and not (self.folder / "runs/var-d16").exists():
            self._in_a_fork(lambda: command_line.main(["train", "small/configs/mepa/var_d16.yaml"]))
        if "runs/other" in " ".join(words) and not (self.folder / "runs/other").exists():
            shutil.copytree(self.folder / "runs/photos", self.folder / "runs/other")

    def execute(self, code: str) -> None:
        """Run Python as the pages show it."""
        code = _WORD.sub(lambda match: STANDS_FOR[match[0]], code)
        status, output = self._in_a_fork(lambda: exec(code, {}))
        assert status == 0, f"{code}\n{output}"

    def _here(self, run: Callable[[], Any]) -> tuple[int, str]:
        """The same in this process."""
        said = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return run(), said.getvalue()

    def _in_a_fork(self, run: Callable[[], Any], timeout: float = 200.0) -> tuple[int | None, str]:
        """Exit status and what was printed."""
        harness._import_heavy_libraries()
        said = self.folder / "said.txt"
        process = multiprocessing.get_context("fork").Process(target=self._child, args=(run, said))
        gc.freeze()
        process.start()
        gc.unfreeze()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, said.read_text()

    def _child(self, run: Callable[[], Any], said: Path) -> None:
        sys.stdout = sys.stderr = file = said.open("w")
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        os.chdir(self.folder)
        os.environ.update(MEGAVAR_CLUSTER="cluster.yaml", PATH=f"{self.slurm.folder}:{os.environ['PATH']}")
        code: Any = 1
        try:
            code = run() or 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
        file.flush()
        os._exit(int(code))

    def resolve(self, shown: Shown) -> None:
        """Parse the arguments and decode the configurations that they name; run nothing.

        Raises:
            SystemExit: the parser refuses them.
            ConfigError: a configuration does not take its overrides.
        """
        module, subcommand = module_of(shown)
        words = self.words(shown)
        if "--help" in words:
            return
        given = [*subcommand, *words]
        options = command_line.parse(given) if module is command_line else _parsed(module, given)
        overrides = [word for word in words if re.match(r"[\w.]+=", word) and not word.startswith("analysis.")]
        for word in words:
            if word.startswith("configs/tables/"):
                table = load_table(ROOT / word)
                for row in table.trained:
                    table.config_of(row, overrides)
                for row_name in table.require_demo().rows if "--demo" in words else ():
                    table.demo_config(row_name, 0, overrides)
            elif word.startswith("configs/"):
                config = load_config(ROOT / word, overrides)
                if config.recipe.trains != "teacher":
                    configured_layout(config, shown.ranks)
        if shown.program == "megavar analyze":
            _choice(options.kind, [word.removeprefix("analysis.") for word in words if word.startswith("analysis.")])


def shrink(file: Path) -> None:
    """Four steps, few samples; everything else as ``init`` wrote it."""
    text = re.sub(r"\bsteps: \d+", "steps: 4", file.read_text())
    text = re.sub(r"global_batch_size: \d+", "global_batch_size: 8", text)
    text = re.sub(r"\b(interval|samples_interval): \d+", r"\1: 2", text)
    text = re.sub(r"checkpoint: {interval: 2", "checkpoint: {interval: 2, keep_every: 2", text)
    text = re.sub(r"warmup_steps: \d+", "warmup_steps: 1", text)
    text = re.sub(r"\bnumber: 100\b", "number: 20", text)  # of samples
    file.write_text(text)


def _as_a_person(module: Any, words: list[str]) -> Any:
    """Who presses Ctrl-C after the first look of ``--watch``."""
    if "--watch" in words:
        time.sleep = _pressed_ctrl_c
    return module.main(words)


def _pressed_ctrl_c(seconds: float) -> NoReturn:
    raise KeyboardInterrupt


class _Parsed(BaseException):
    """Carries what the outermost parser has made of the arguments."""


@contextlib.contextmanager
def _stopped_after_parsing() -> Iterator[None]:
    depth = 0

    def stopping(original: Any) -> Any:
        def parse(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = original(*arguments, **options)
            finally:
                depth -= 1
            if depth == 0:
                raise _Parsed(result)
            return result

        return parse

    parser = argparse.ArgumentParser
    with contextlib.ExitStack() as stack:
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            stack.enter_context(mock.patch.object(parser, name, stopping(getattr(parser, name))))
        yield


def _parsed(module: Any, words: Sequence[str]) -> Any:
    """What ``main`` of a module would parse its arguments to."""
    with _stopped_after_parsing():
        try:
            module.main(list(words))
        except _Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{module.__name__} parses no arguments")
