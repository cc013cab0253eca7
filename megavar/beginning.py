"""With which weights a run begins: from its configuration to tensors.

``training/checkpoint/initial.py`` puts them into a run in training, under any layout; here also into a whole model that
is sampled without training.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megavar.assembly import trained_choice, weight_layouts
from megavar.config.loading import parse_yaml
from megavar.config.root import Config
from megavar.frozen import identify
from megavar.training.checkpoint.initial import InitialWeights, read_whole
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.weight_file import read_metadata, read_weights_file
from megavar.weight_layout import NamedLayout, Shape

_log = logging.getLogger(__name__)


def initial_weights(config: Config) -> InitialWeights | None:
    """The weights with which the run begins; None: random ones."""
    given = config.train.initial_weights
    if given is None:
        return None
    layouts = weight_layouts(trained_choice(config), config.tokenizer.space)

    def read(path: Path, expected: Mapping[str, Shape], fresh: tuple[str, ...]) -> dict[str, Tensor]:
        return read_weights_file(path, expected, layouts, given.layout, fresh, "The file of initial weights")

    return InitialWeights(Path(given.path), read, given.fresh, ema=given.weights == "ema")


def fill_initial(model: nn.Module, config: Config) -> dict[str, Any]:
    """Give a whole model on one device the weights with which the run of ``config`` begins.

    Returns:
        What they are, for the identity of what is made with them: nothing where all are random.
    """
    initial = initial_weights(config)
    if initial is None:
        return {}
    fill(model, read_whole(initial, shapes_of(model)))
    return {"initial": identify(initial.path).to_json(), "fresh": list(initial.fresh)}


def warn_of_differences(config: Config) -> None:
    """Name keys of the model in which its initial weights were made otherwise: their shapes may be the same.

    Some keys may well differ (dropout); others should not (the number of heads).
    """
    given, section = config.train.initial_weights, config.recipe.trains
    before = None if given is None else _made_with(Path(given.path), section)
    if given is not None and before is None:
        layouts = weight_layouts(trained_choice(config), config.tokenizer.space).values()
        said = (layout.made_with(Path(given.path)) for layout in layouts if isinstance(layout, NamedLayout))
        before = next(filter(None, said), None)
    if before is not None and given is not None:
        changed = _differences(before, trained_choice(config).model_dump(mode="json"), f"{section}.")
        if changed:
            _log.warning("The weights in %s were made with other settings: %s.", given.path, "; ".join(changed))


def _made_with(path: Path, section: str) -> dict[str, Any] | None:
    """The section of the configuration of which the weights in ``path`` were made; None where nothing says so."""
    if path.is_dir():
        for directory in (path, path.parent, path.parent.parent):
            if (directory / "config.yaml").exists():
                return parse_yaml((directory / "config.yaml").read_text(), str(directory / "config.yaml")).get(section)
        return None
    return json.loads(read_metadata(path).get("choice", "null")) if path.exists() else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[str]:
    texts: list[str] = []
    for key in sorted(before.keys() & now.keys()):
        one, other = before[key], now[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            texts += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            texts.append(f"{prefix}{key} was {one!r} and is {other!r} here")
    return texts
