"""Rooms know only what they may know (README, "Rooms")."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATIONS = ("launchers", "tools")
FORBIDDEN = {
    "megavar/transformer": ("megavar.training", "megavar.data", "megavar.recipes", "megavar.sampling",
                            "megavar.evaluation", "megavar.commands", "megavar.tokenizers", "megavar.generators"),
    "megavar/tokenizers": ("megavar.training", "megavar.data", "megavar.recipes", "megavar.sampling",
                           "megavar.evaluation", "megavar.commands", "megavar.generators"),
    "megavar/generators": ("megavar.training", "megavar.data", "megavar.recipes", "megavar.sampling",
                           "megavar.evaluation", "megavar.commands", "megavar.tokenizers"),
    "megavar/recipes": ("megavar.training", "megavar.sampling", "megavar.evaluation", "megavar.commands", "deepspeed"),
    "megavar/parallel": ("megavar.training", "megavar.data", "megavar.recipes", "megavar.sampling",
                         "megavar.evaluation", "megavar.commands", "megavar.tokenizers", "megavar.generators",
                         "megavar.transformer"),
    "megavar/data": ("megavar.training", "megavar.recipes", "megavar.sampling", "megavar.commands",
                     "megavar.generators", "megavar.transformer"),
    "megavar/training": ("megavar.generators", "megavar.tokenizers", "megavar.sampling", "megavar.evaluation",
                         "megavar.commands", "megavar.recipes.next_scale", "megavar.recipes.tokenizer"),
    "megavar/sampling": ("megavar.training", "megavar.recipes", "megavar.evaluation", "megavar.commands", "deepspeed"),
    "megavar/evaluation": ("megavar.training", "megavar.recipes", "megavar.sampling", "megavar.commands", "deepspeed"),
    "megavar/config": ("megavar.training", "megavar.recipes", "megavar.sampling", "megavar.evaluation",
                       "megavar.commands", "megavar.generators", "megavar.transformer", "megavar.tokenizers"),
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"{room} is empty: update the rules"
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_do_not_reach_into_others(room: str) -> None:
    for path in files(room):
        for name in imports_of(path):
            for forbidden in (*FORBIDDEN[room], *OPERATIONS):
                assert name != forbidden and not name.startswith(f"{forbidden}."), (
                    f"{path.relative_to(ROOT)} imports {name}, which {room} may not know"
                )


def test_the_library_never_imports_operations() -> None:
    for path in files("megavar"):
        for name in imports_of(path):
            assert name.split(".")[0] not in OPERATIONS, f"{path.relative_to(ROOT)} imports {name}"


def test_files_are_short() -> None:
    for path in [*files("megavar"), *(ROOT / "launchers").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.relative_to(ROOT)} has {len(lines)} lines: split it by idea"
