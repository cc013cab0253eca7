"""Alternatives are found because they exist; what shipped configurations resolve to has not changed."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from megavar.config.base import Section
from megavar.config.choice import Choice
from megavar.config.experts.base import ExpertsChoice
from megavar.config.loading import decode, dump, load_config
from megavar.errors import ConfigError

ROOT = Path(__file__).parents[2]
RESOLVED = json.loads((Path(__file__).parent / "data" / "resolved_9f0263a.json").read_text())
NEW_KEYS = {
    "data.source.one_class", "data.source.test_share", "data.text", "evaluation.understanding",
    "generator.head_chunks", "logging.alerts", "logging.calibration", "plugins",
    "recipe.clustering", "recipe.clustering_decay", "recipe.convnext",
    "recipe.cross_entropy_weight", "recipe.noise", "recipe.scale_lists", "recipe.smaller_images", "recipe.terms",
    "recipe.trained", "sampling.cuda_graph", "sampling.procedure", "train.compile", "train.compile_backend",
    "train.deterministic", "train.initial_weights", "train.recovery.divergence_factor", "train.tf32", "validation",
}  # fmt: skip
"""Keys that did not exist at commit 9f0263a."""
RENAMED = {"evaluation.samples", "recipe.initial_weights"}
"""See megavar/config/earlier.py."""
CHANGED = ("train.micro_batch_size", "sampling.number")
"""Values that may have changed, because they do not change what is trained: plans showed what fits."""


class Fruit(Choice):
    package = "megavar.config.terms"  # has no fruit of its own: those below are found as a plugin's are
    name: str
    weight: int = 1


class Apple(Fruit):
    name: Literal["apple"] = "apple"
    sorts: tuple[str, ...] = ()


class Basket(Section):
    best: Fruit
    others: tuple[Fruit, ...] = ()
    maybe: Fruit | None = None


class Kitchen(Section):
    basket: Basket


def kitchen(**basket: Any) -> Kitchen:
    return decode({"basket": basket}, Kitchen, "kitchen.yaml")


def test_a_value_becomes_the_alternative_that_its_tag_names() -> None:
    decoded = kitchen(best={"name": "apple", "sorts": ["a", "b"]}, others=[{"name": "apple", "weight": 3}])
    assert decoded.basket.best == Apple(sorts=("a", "b"))
    assert decoded.basket.others == (Apple(weight=3),)
    assert decode(json.loads(decoded.model_dump_json()), Kitchen, "again") == decoded


def test_alternatives_may_be_born_after_the_section() -> None:
    with pytest.raises(ConfigError, match="'pear'; it must be one of 'apple'"):
        kitchen(best={"name": "pear"})

    class Pear(Fruit):
        name: Literal["pear"] = "pear"
        ripe: bool

    assert kitchen(best={"name": "pear", "ripe": True}).basket.best == Pear(ripe=True)
    del Pear
    import gc

    gc.collect()  # other tests know no pears


@pytest.mark.parametrize(
    ("basket", "expected"),
    [
        ({"best": {"name": "aple"}}, ["basket.best.name is 'aple'", "Did you mean 'apple'?"]),
        ({"best": {"wait": 1}}, ["basket.best.name is missing", "'apple'"]),
        ({"best": {"name": "apple", "wieght": 2}}, ["Unknown key basket.best.wieght", "'weight'"]),
        ({"best": {"name": "apple", "weight": "heavy"}}, ["basket.best.weight", "'heavy'"]),
        ({"best": {"name": "apple"}, "others": [{"name": "apple", "sort": []}]}, ["basket.others.0.sort", "'sorts'"]),
        ({"best": {"name": "apple"}, "maybe": {"name": "apple", "sort": []}}, ["basket.maybe.sort", "'sorts'"]),
        ({"best": "apple"}, ["basket.best", "keys and values"]),
        ({}, ["basket.best is missing"]),
    ],
)
def test_errors_name_the_place_and_the_nearest_key(basket: dict, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        kitchen(**basket)
    for part in expected:
        assert part in str(caught.value), caught.value


def test_another_discriminator_with_a_default() -> None:
    assert ExpertsChoice.make(number=4, top_k=1).router == "scale_token"
    assert ExpertsChoice.make(router="scale").implementation.endswith("Router")


def test_every_alternative_of_the_package_names_an_implementation() -> None:
    kinds = [kind for kind in Choice.__subclasses__() if kind.package.startswith("megavar.") and kind is not Fruit]
    assert len(kinds) >= 7
    for kind in kinds:
        for tag, alternative in kind.alternatives().items():
            if alternative.__module__.startswith("megavar."):
                assert alternative.implementation.count(":") == 1, tag


def test_plugins_bring_alternatives_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_routers.py").write_text(
        "from typing import Literal\n"
        "from megavar.config.experts.base import ExpertsChoice\n"
        "class MyExperts(ExpertsChoice):\n"
        "    implementation = 'my_routers:MyRouter'\n"
        "    router: Literal['mine'] = 'mine'\n"
        "    heat: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {ROOT / 'configs/quickstart.yaml'}\nplugins: [my_routers]\n"
                    "generator: {experts: {router: mine, heat: 2.0}}\n")  # fmt: skip
    config = load_config(path)
    assert config.generator is not None
    experts = config.generator.limits(config.tokenizer.space).experts
    assert experts is not None and experts.model_dump()["heat"] == 2.0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump(config))
    assert load_config(resolved) == config
    with pytest.raises(ConfigError, match=r"run\.yaml: Unknown key generator\.experts\.heet\. Did you mean 'heat'"):
        load_config(path, ["generator.experts.heet=1"])
    with pytest.raises(ConfigError, match="plugins: the module 'no_such_module' cannot be imported"):
        load_config(path, ["plugins=[no_such_module]"])
    del sys.modules["my_routers"]


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now or key in CHANGED else [f"{key}: {before!r} became {now!r}"]
    found = [f"{key}{name} is gone" for name in sorted(set(before) - set(now))
             if f"{key}{name}" not in RENAMED]
    found += [f"{key}{name} is new" for name in sorted(set(now) - set(before)) if f"{key}{name}" not in NEW_KEYS]
    for name in sorted(set(before) & set(now)):
        below = f"{key}{name}." if isinstance(now[name], dict) else f"{key}{name}"
        found += differences(before[name], now[name], below)
    return found


@pytest.mark.parametrize("path", sorted(RESOLVED))
def test_shipped_configurations_resolve_as_before(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert differences(RESOLVED[path], json.loads(load_config(path).model_dump_json())) == []


def test_every_shipped_configuration_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = [path for path in Path("configs").rglob("*.yaml") if path.parts[1] != "tables"]
    runs = {str(path) for path in found if not path.name.startswith("base")}
    assert runs >= RESOLVED.keys()
    for path in runs:
        load_config(path)
