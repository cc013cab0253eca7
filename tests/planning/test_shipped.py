"""Every shipped configuration of a run has a plan that fits, on the GPUs that its commands are shown with."""

from pathlib import Path

import pytest

from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.config.yaml_text import parse_yaml
from megavar.planning.hardware import accelerator
from megavar.planning.plan import configured_layout, plan, predict
from tests.docs.commands import PAGES, ROOT, Shown, shown

H200 = {"mepa": (8, 32), "sar": (8,), "rear": (8,), "vgt": (8,)}
"""Of full-size runs, by folder; all others are demos, for one device."""


def shipped() -> list[Path]:
    """All that can be trained: what only others inherit from has no recipe, no tokenizer or no length."""
    files = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "tables" not in path.parts]
    return [path for path in files if not path.name.startswith("base") and "base" not in path.stem.split("_")]


def of_a_demo(path: Path) -> bool:
    return path.parent.name not in H200 or "demo" in path.stem or "digits" in path.stem


def devices(path: Path) -> tuple[int, ...]:
    return (1,) if of_a_demo(path) else H200[path.parent.name]


@pytest.fixture(scope="module")
def configs() -> dict[Path, Config]:
    return {path: load_config(path) for path in shipped()}


def test_the_rest_is_inherited_from(configs: dict[Path, Config]) -> None:
    files = {path for path in (ROOT / "configs").rglob("*.yaml") if "tables" not in path.parts}
    named = {path: parse_yaml(path.read_text(), path.name).get("base", "-") for path in files}
    others = files - set(configs)
    assert others and others <= {(path.parent / base).resolve() for path, base in named.items()}


def test_every_layout_is_allowed(configs: dict[Path, Config]) -> None:
    for path, config in configs.items():
        for number in {1, *devices(path)}:
            layout, _ = configured_layout(config, number)
            assert layout.micro_batch * layout.micro_batches * number == config.train.global_batch_size, path


def kind(config: Config) -> tuple[str, ...]:
    """Runs of one kind differ in sizes: the largest of them is measured."""
    network = config.generator or config.tokenizer
    experts = getattr(network, "experts", None)
    trained = "teacher" if config.recipe.trains == "teacher" else network.name
    return trained, "" if experts is None else experts.router, config.tokenizer.name


def size(config: Config) -> int:
    network = config.generator or config.tokenizer
    return getattr(network, "depth", 1) * getattr(network, "hidden_size", getattr(network, "width", 1) or 1)


def test_the_largest_of_every_kind_fits(configs: dict[Path, Config]) -> None:
    """Without what drawing costs, and other layouts. VGT's are planned in test_vgt_parameters.py."""
    chosen: dict[tuple[object, ...], Path] = {}
    for path, config in sorted(configs.items(), key=lambda item: size(item[1])):
        if path.parent.name != "vgt" and (not of_a_demo(path) or config.recipe.trains == "teacher"):
            chosen[kind(config)] = path
    assert len(chosen) > 9
    for path in chosen.values():
        for number in devices(path):
            predicted, _ = predict(configs[path], number, "h200", ranks_per_node=8)
            need = f"{predicted.memory.total / 2**30:.0f} GiB on each of {number}"
            assert predicted.fits(accelerator("h200").memory), f"{path.relative_to(ROOT)} needs {need}"


def full_size(command: Shown) -> bool:
    first = command.arguments[0] if command.arguments else ""
    return command.program in ("megavar train", "launchers.slurm submit") and first.startswith("configs/mepa/")


@pytest.mark.parametrize("command", [
    command for page in PAGES for command in shown(page) if full_size(command)], ids=str)  # fmt: skip
def test_commands_of_the_pages_fit(command: Shown) -> None:
    """On H200s: as many as torchrun starts, or eight of each machine."""
    words = list(command.arguments)
    nodes = int(words[words.index("--nodes") + 1]) if "--nodes" in words else 0
    overrides = [word for word in words[1:] if "=" in word and not word.endswith("=...")]
    predicted = plan(load_config(words[0], overrides), 8 * nodes or command.ranks, "h200", suggestions=0)
    assert predicted.fits, command
