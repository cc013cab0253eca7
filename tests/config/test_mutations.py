"""Slips of the pen in the shipped YAMLs, with a fixed seed: each is refused in a sentence, or changes the run."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from megavar.config.loading import dump, load_config
from megavar.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = [
    ROOT / "configs" / name
    for name in ("quickstart.yaml", "quickstart/tokenizer.yaml", "mepa/stmoe_d20.yaml", "mepa/var_d16.yaml")
]
KINDS = ("misspelled", "doubled", "text", "truth", "object", "list", "negative", "nan", "infinite", "huge", "missing")
SAMPLED = 200


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def paths_of(section: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in section.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += paths_of(value, (*path, key))
    return found


def mutate(tree: dict[str, Any], path: tuple[str, ...], kind: str, chance: random.Random) -> str:
    """The text of a file with one slip at ``path``."""
    tree = copy.deepcopy(tree)
    section = tree
    for key in path[:-1]:
        section = section[key]
    key, old = path[-1], section[path[-1]]
    if kind == "misspelled":
        place = chance.randrange(len(key))
        slip = chance.choice((key[:place] + key[place + 1 :], key[:place] + "q" + key[place:]))
        section[slip or "q"] = section.pop(key)
    elif kind == "missing":
        del section[key]
    elif kind == "doubled":
        marked = f"{key}-twice"
        section[marked] = old
        return yaml.safe_dump(tree, sort_keys=False).replace(f"{marked}:", f"{key}:")
    else:
        section[key] = {
            "text": "many", "truth": not old, "object": {"value": old}, "list": [old, old], "negative": -7,
            "nan": float("nan"), "infinite": float("inf"), "huge": 10**30,
        }[kind]  # fmt: skip
    return yaml.safe_dump(tree, sort_keys=False)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_every_slip_is_refused_in_a_sentence_or_changes_the_run(shipped: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(dump(load_config(shipped)))
    chance = random.Random(shipped.stem)
    slips = [(path, kind) for path in paths_of(tree) for kind in KINDS]
    refused = changed = 0
    for path, kind in chance.sample(slips, SAMPLED):
        file = tmp_path / "slip.yaml"
        file.write_text(mutate(tree, path, kind, chance))
        try:
            after = json.loads(load_config(file).model_dump_json())
        except ConfigError as error:
            message = str(error)
            assert "slip.yaml" in message and "\n" not in message and len(message) < 4000, (path, kind, message)
            words = [*path, *path[-1].split("_")]
            assert any(word in message for word in words if len(word) > 1), (path, kind, message)
            refused += 1
            continue
        if kind == "missing":
            continue  # a default takes its place
        assert after != tree, (path, kind, "was passed over")
        changed += 1
    assert refused > 100 and changed > 0, (refused, changed)
