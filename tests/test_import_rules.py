"""Rooms know only what they may know (README, "Rooms"): an allow-list."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYWHERE = {"errors", "logs", "notify", "paths", "storage", "wording"}
"""Words for people, paths as they write them, and files that are written whole or not at all."""
ALLOWED: dict[str, set[str]] = {
    # Foundations. `config` reads DeepSpeed's own schema through `parallel`, and layouts are sections of `config`.
    "errors": set(),
    "logs": set(),
    "paths": set(),
    "storage": set(),
    "notify": set(),
    "wording": set(),
    "pictures": set(),
    "diffusion": set(),
    "flow_matching": set(),
    "config": {"parallel"},
    "parallel": {"config"},
    "state_dicts": set(),
    "weight_layout": set(),
    "weight_file": {"state_dicts", "weight_folder", "weight_layout"},
    "weight_folder": set(),
    # Model mathematics.
    "transformer": {"config", "parallel"},
    "tokenizers": {"config", "parallel", "weight_file", "weight_folder", "weight_layout"},
    "generators": {"config", "parallel", "transformer", "weight_layout"},
    "teachers": {"config", "weight_layout"},
    "recipes": {
        "config", "parallel", "data", "diffusion", "flow_matching", "generators", "sampling", "teachers", "tokenizers",
    },
    # Scale: tensors, ranks and bytes.
    "data": {"config", "parallel"},
    "chunks": {"parallel"},
    "conditions": {"data"},
    "frozen": {"training", "weight_file", "weight_folder", "weight_layout"},
    "training": {
        "config", "parallel", "data", "recipes", "records", "frozen", "weight_file", "weight_folder", "weight_layout",
    },
    "sampling": {
        "config", "parallel", "data", "chunks", "conditions", "diffusion", "flow_matching", "generators",
        "tokenizers", "transformer",
    },
    "evaluation": {"config", "parallel", "data", "chunks", "conditions", "tokenizers", "weight_file"},
    "planning": {
        "config", "parallel", "data", "conditions", "generators", "sampling", "tokenizers", "training", "transformer",
    },
    # What puts them together.
    "assembly": {
        "config", "parallel", "data", "conditions", "frozen", "generators", "recipes", "sampling", "tokenizers",
        "transformer", "weight_folder", "weight_layout",
    },
    "beginning": {"assembly", "config", "frozen", "training", "weight_file", "weight_layout"},
    "previews": {"assembly", "config", "data", "pictures", "recipes", "run_samples"},
    "run_samples": {
        "assembly", "beginning", "chunks", "conditions", "config", "data", "frozen", "parallel", "pictures",
        "sampling", "tokenizers", "training",
    },
    "library": {
        "assembly", "conditions", "config", "frozen", "parallel", "tokenizers", "training", "weight_file",
    },
    "scoring": {
        "assembly", "config", "evaluation", "frozen", "parallel", "run_samples", "sampling", "tokenizers", "training",
    },
    "retention": {"assembly", "config", "evaluation", "frozen", "parallel", "scoring", "training"},
    "records": set(),
    "reporting": {"pictures", "records"},
    "forking": {"config", "data", "generators", "library", "training", "weight_file"},
    "starting": {"data"},
    "watchers": {"config", "data", "parallel", "planning", "recipes", "training"},
    "reproduction": {"chunks", "config", "planning", "records", "training"},
    "analysis": {
        "assembly", "conditions", "config", "data", "evaluation", "parallel", "records", "run_samples", "sampling",
        "tokenizers", "training", "transformer",
    },
    "commands": {
        "analysis", "assembly", "beginning", "conditions", "config", "data", "forking", "parallel", "pictures",
        "planning", "previews", "records", "reporting", "reproduction", "retention", "run_samples", "sampling",
        "scoring", "starting", "training", "watchers",
    },
    "__main__": set(),
}  # fmt: skip
KNOWN_CIRCLES = {frozenset({"config", "parallel"}), frozenset({"frozen", "training"})}
"""The second: checkpoints carry identities of frozen weights, and frozen weights may lie in a checkpoint."""
TORCH_FREE = ("megavar", "megavar.config.loading", "megavar.config.cluster", "megavar.config.table", "megavar.frozen",
              "megavar.records.run", "megavar.commands.status", "megavar.commands.report", "megavar.commands.compare",
              "megavar.reporting.report")  # fmt: skip
"""Login nodes read configurations and compare identities of weights."""


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} is empty: update the rules"
    return found


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms() -> dict[str, list[Path]]:
    """Folders and single files of the library."""
    found: dict[str, list[Path]] = {}
    for path in files("megavar"):
        room = path.relative_to(ROOT / "megavar").parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, []).append(path)
    return found


def known_by(room: str) -> dict[str, list[str]]:
    """Other rooms that a room imports, and the files that do."""
    known: dict[str, list[str]] = {}
    for path in rooms()[room]:
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "megavar" and len(parts) > 1 and parts[1] != room and parts[1] in rooms():
                known.setdefault(parts[1], []).append(str(path.relative_to(ROOT)))
    return known


@pytest.mark.parametrize("room", sorted(rooms()))
def test_rooms_know_only_what_they_may(room: str) -> None:
    assert room in ALLOWED, f"megavar/{room} is new: say in ALLOWED what it may know"
    for other, importers in known_by(room).items():
        assert other in ALLOWED[room] | EVERYWHERE, f"{importers[0]} imports megavar.{other}, which it may not know"


def test_no_rule_is_idle() -> None:
    """What is allowed and not used is forbidden again."""
    idle = {room: allowed - known_by(room).keys() for room, allowed in ALLOWED.items()}
    assert {room: names for room, names in idle.items() if names} == {}


def test_rooms_do_not_know_each_other_in_circles() -> None:
    reached = {room: set(allowed) for room, allowed in ALLOWED.items()}
    for middle in ALLOWED:
        for room in ALLOWED:
            if middle in reached[room]:
                reached[room] |= reached[middle]
    circles = {frozenset({a, b}) for a in ALLOWED for b in reached[a] if a != b and a in reached[b]}
    assert circles == KNOWN_CIRCLES


def test_the_library_never_imports_operations() -> None:
    for path in files("megavar"):
        for name in imports_of(path):
            assert name.split(".")[0] not in ("launchers", "tools", "tests"), f"{path} imports {name}"


def test_files_are_short() -> None:
    for path in [*files("megavar"), *files("launchers"), *files("tools")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.relative_to(ROOT)} has {len(lines)} lines: split it by idea"


def test_login_nodes_need_no_torch() -> None:
    import subprocess
    import sys

    script = f"import sys, {', '.join(TORCH_FREE)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
