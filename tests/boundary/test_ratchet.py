"""No product file but a family's own knows a family: adding one touches nothing that exists."""

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavar.config.choice import Choice
from megavar.config.root import Config

ROOT = Path(__file__).parents[2]
PRODUCT = ("megavar", "launchers", "tools")
DEFAULTS = {
    "megavar/config/root.py": {"megavar.config.procedures.next_scale"},
    "megavar/config/evaluation.py": {"megavar.config.suites.digits"},
}
"""Sections that a run need not give have a default alternative: the only names of families outside their files."""


@functools.cache
def alternatives() -> dict[str, type[Choice]]:
    """All that the library brings, by the name of their class."""
    assert Config.model_fields  # with it, all kinds are imported
    kinds = [kind for kind in Choice.__subclasses__() if kind.package.startswith("megavar.")]
    found = [alternative for kind in kinds for alternative in kind.alternatives().values()]
    return {one.__name__: one for one in found if one.__module__.startswith("megavar.")}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def family_modules() -> frozenset[str]:
    """The modules that belong to an alternative: its section, its implementation, and what lies beside the latter."""
    own: set[str] = set()
    for one in alternatives().values():
        own.add(one.__module__)
        for place in (one.implementation, *one.weight_layouts.values()):
            own.add(module := place.partition(":")[0])
            if hasattr(importlib.import_module(module), "__path__"):
                continue
            package = module.rpartition(".")[0]
            if package not in SHARED_ROOMS:  # a folder of its own
                own.add(package)
    return frozenset(own)


SHARED_ROOMS = {
    "megavar.generators", "megavar.tokenizers", "megavar.recipes", "megavar.recipes.terms",
    "megavar.sampling.procedures", "megavar.evaluation.suites", "megavar.transformer.moe",
    "megavar.transformer.moe.routers", "megavar.teachers", "megavar.analysis.kinds",
    "megavar.evaluation.understanding",
}  # fmt: skip
"""Rooms in which several families have a file each."""


def is_own(module: str) -> bool:
    """Whether a module belongs to a family."""
    packages = [name for name in family_modules() if name not in SHARED_ROOMS]
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def product_files() -> Iterator[Path]:
    for folder in PRODUCT:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports_of(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_families_are_found() -> None:
    """The rules below would hold of nothing."""
    some = {"VARConfig", "MultiScaleVQConfig", "MEPAConfig", "DigitsSuite", "NextScaleSampling", "ScaleTokenExperts"}
    assert some <= alternatives().keys()
    assert is_own("megavar.tokenizers.multiscale_vq.quantizer") and is_own("megavar.recipes.next_scale")
    assert not is_own("megavar.assembly") and not is_own("megavar.recipes.base")


@pytest.mark.parametrize("folder", PRODUCT)
def test_nobody_imports_a_family_but_families(folder: str) -> None:
    broken = []
    for path in product_files():
        name = str(path.relative_to(ROOT))
        if name.startswith(f"{folder}/") and not is_own(module_of(path)):
            known = {module for module in imports_of(ast.parse(path.read_text())) if is_own(module)}
            broken += [f"{name} imports {module}" for module in sorted(known) if not _is_default(name, module)]
    assert broken == []


def _is_default(name: str, module: str) -> bool:
    return any(module == known or module.startswith(f"{known}.") for known in DEFAULTS.get(name, ()))


def test_nobody_asks_which_family_it_is() -> None:
    """No isinstance on alternatives, no comparison with their tags."""
    tags = {one.tag() for one in alternatives().values()}
    broken = []
    for path in product_files():
        if is_own(module_of(path)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                broken += [f"{place} asks for {name}" for name in asked & alternatives().keys()]
            elif isinstance(node, ast.Compare) and _reads_a_tag(node.left):
                compared = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                broken += [f"{place} compares with {tag!r}" for tag in compared & tags]
    assert broken == []


def _reads_a_tag(node: ast.expr) -> bool:
    """``config.generator.name``, ``experts.router`` and the like; a data source's name is no family's."""
    discriminators = {one.discriminator for one in alternatives().values()}
    return isinstance(node, ast.Attribute) and node.attr in discriminators and "source" not in ast.unparse(node)


def test_the_foreign_family_touched_nothing() -> None:
    """Seven kinds of parts entered; what in the product had to know of them: nothing."""
    toy = importlib.import_module("tests.boundary.toy.choices")
    names = [name for name, value in vars(toy).items() if isinstance(value, type) and value.__module__ == toy.__name__]
    assert len(names) == 7
    words = (*names, "toy_", "boundary.toy")
    touched = [path for path in product_files() if any(word in path.read_text() for word in words)]
    assert touched == []
