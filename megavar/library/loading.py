"""From a run, a checkpoint or an exported file to a model, strictly.

The model is built from the configuration that belongs to the weights, and names and shapes of all tensors must be those
of that model: nothing stays random, nothing is passed over. Heads of a recipe's terms are not part of a model.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar.assembly import build_generator, load_tokenizer, require_generator_recipe, trained_choice, weight_layouts
from megavar.config.choice import resolve
from megavar.config.loading import load_config, read_tree, stored_config
from megavar.config.root import Config
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.errors import CheckpointError, ConfigError
from megavar.frozen import TOKENIZER, Identity, check_same, check_usable, identify, identities
from megavar.library.model import Model
from megavar.parallel import topology
from megavar.paths import expanded
from megavar.tokenizers.base import Tokenizer
from megavar.training.checkpoint.weights import HEADS, fill, find_checkpoint, load_weights, shapes_of
from megavar.weight_file import embedded_tokenizer, read_metadata, read_weights_file, stored_value

TokenizerOf = Callable[[TokenizerChoice], Tokenizer]
_REMEDY = "Name it, load(..., tokenizer=...), or load an export, which holds it."
_EMA = {None: None, "model": False, "ema": True}


def load(
    path: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    weights: str | None = None,
    device: str | torch.device | None = None,
) -> Model:
    """Load a trained model.

    Args:
        path: a run directory (its newest checkpoint), a checkpoint, or a file: an export
            (``tools/convert_checkpoint.py``), or with ``config`` one in a public layout of the model.
        config: the configuration, where nothing beside or in the weights says it.
        tokenizer: weights of the generator's tokenizer, where they are not where they were.
        weights: ``model``, or ``ema`` for the moving average of a checkpoint; default: ``sampling.weights``.
        device: default: the GPU if there is one.

    Raises:
        CheckpointError: weights are missing, damaged, or not exactly those of the configured model.
        ConfigError: nothing says which model it is, or it asks for modules of others (``MEGAVAR_PLUGINS`` allows them).
    """
    try:
        place = Path(expanded(str(path)))
    except ValueError as error:
        raise CheckpointError(f"load(): {error}.") from None
    if weights not in _EMA:
        raise ConfigError(f"load(): weights={weights!r} is neither 'model' nor 'ema'.")
    if not place.exists():
        raise CheckpointError(f"{place} does not exist. Give a run, a checkpoint, or an exported file.")
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    topology.ensure_single(on)
    given = None if config is None else load_config(config)
    read = _from_directory if place.is_dir() else _from_file
    return read(place, given, None if tokenizer is None else Path(tokenizer), _EMA[weights], on)


def _from_directory(
    place: Path, given: Config | None, tokenizer: Path | None, ema: bool | None, device: torch.device
) -> Model:
    checkpoint, manifest = find_checkpoint(place, verify=False)  # loading verifies it
    run = _run_around(place)
    if given is None and run is None:
        raise ConfigError(f"No config.yaml lies beside {place}, so nothing says which model it is. Give config=....")
    config = given or stored_config(read_tree(run / "config.yaml"), str(run / "config.yaml"))  # type: ignore[operator]
    averaged = config.sampling.weights == "ema" if ema is None else ema

    def fill_whole(network: nn.Module) -> None:
        load_weights(network, checkpoint, ema=averaged, whole=True)

    if config.recipe.trains == "tokenizer":
        return _of_tokenizer(config, fill_whole, manifest.step, device)
    require_generator_recipe(config)
    before = identities({name: record for name, record in manifest.frozen.items() if name == TOKENIZER})
    its_weights = find_tokenizer(config, run or place, _REMEDY, tokenizer)
    tokenizer_of = _tokenizer_of(config, its_weights, before, checkpoint, device)
    return _of_generator(config, fill_whole, tokenizer_of, class_names(place), manifest.step, device)


def _from_file(
    place: Path, given: Config | None, tokenizer: Path | None, ema: bool | None, device: torch.device
) -> Model:
    metadata = read_metadata(place)
    stored = stored_value(metadata, "config", {}, place)
    if given is None and not stored:
        raise ConfigError(
            f"{place} does not say which model it holds (exports of this version do): give its configuration, "
            f"load(..., config=...)."
        )
    config = given or stored_config(stored, str(place))
    if ema is not None and "weights" in metadata and (metadata["weights"] == "ema") != ema:
        raise CheckpointError(f"{place} holds weights={metadata['weights']!r} only. Load the checkpoint instead.")

    def fill_whole(network: nn.Module) -> None:
        layouts = weight_layouts(trained_choice(config), config.tokenizer.space)
        _fill_whole(network, read_weights_file(place, shapes_of(network), layouts, fresh=(HEADS,)), place)

    step = int(metadata["step"]) if metadata.get("step", "").isdecimal() else 0
    if config.recipe.trains == "tokenizer":
        return _of_tokenizer(config, fill_whole, step, device)
    require_generator_recipe(config)
    embedded = embedded_tokenizer(place) if tokenizer is None else {}

    def from_export(choice: TokenizerChoice) -> Tokenizer:
        network = resolve(choice)(choice)
        _fill_whole(network, embedded, place)
        return _frozen(network, device)

    tokenizer_of: TokenizerOf = from_export
    if not embedded:
        record = stored_value(metadata, "tokenizer", {}, place)
        before = identities({TOKENIZER: record} if record else {})
        tokenizer_of = _tokenizer_of(config, find_tokenizer(config, place, _REMEDY, tokenizer), before, place, device)
    names = tuple(map(str, stored_value(metadata, "class_names", [], place)))
    return _of_generator(config, fill_whole, tokenizer_of, names, step, device)


def _of_generator(
    config: Config, fill_whole: Callable[[nn.Module], None], tokenizer_of: TokenizerOf, class_names: tuple[str, ...],
    step: int, device: torch.device,
) -> Model:  # fmt: skip
    generator = build_generator(config, None)
    fill_whole(generator)
    usual = tokenizer_of(config.tokenizer)
    return Model(
        config, generator.to(device).eval(), usual, class_names, step, device,
        lambda choice: usual if choice == config.tokenizer else tokenizer_of(choice),
    )  # fmt: skip


def _of_tokenizer(config: Config, fill_whole: Callable[[nn.Module], None], step: int, device: torch.device) -> Model:
    network = resolve(config.tokenizer)(config.tokenizer)
    fill_whole(network)
    tokenizer = _frozen(network, device)
    return Model(config, None, tokenizer, (), step, device, lambda choice: tokenizer)


def _tokenizer_of(
    config: Config, weights: Path, before: Mapping[str, Identity], where: Path, device: torch.device
) -> TokenizerOf:
    """Loads the tokenizer in ``weights``, which must be the one that the generator in ``where`` learned from."""
    if before:
        remedy = "name the tokenizer that it learned from: load(..., tokenizer=...)."
        check_same(before, {TOKENIZER: identify(weights)}, where, remedy)
    return lambda choice: load_tokenizer(choice, str(weights), device)


def find_tokenizer(config: Config, place: Path, remedy: str, given: Path | None = None) -> Path:
    """Where the weights of the tokenizer of the generator in ``place`` are.

    Args:
        given: what a person says of it; else the configuration's path, relative to some folder around the run.

    Raises:
        CheckpointError: not there; ``remedy`` says what to do: a sentence.
    """
    written = given or Path(require_generator_recipe(config).tokenizer_weights)
    around = [] if written.is_absolute() or given is not None else place.absolute().parents
    for candidate in (written, *(folder / written for folder in around)):
        if candidate.exists():
            return candidate
    raise CheckpointError(f"The tokenizer of the generator in {place}, {written}, is not there. {remedy}")


def _run_around(place: Path) -> Path | None:
    """The run directory that ``place`` is, or is a checkpoint of."""
    folders = (place, *place.absolute().parents[:2])
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _fill_whole(network: nn.Module, tensors: dict[str, Tensor], place: Path) -> None:
    """Fill a network of which nothing may stay as it is, except buffers that a public layout says it lacks.

    Raises:
        CheckpointError: a parameter would stay random.
    """
    parameters = shapes_of(network).keys() - {name for name, _ in network.named_buffers()}
    if absent := sorted(parameters - tensors.keys()):
        raise CheckpointError(f"{place} lacks {', '.join(absent[:4])}, which would stay random. Load a complete file.")
    fill(network, tensors)


def _frozen(network: Any, device: torch.device) -> Any:
    check_usable(network)
    return network.eval().requires_grad_(False).to(device)


def class_names(place: Path) -> tuple[str, ...]:
    """Of the run in or around ``place``, as ``data.json`` of a run says them; runs of earlier versions do not."""
    try:
        run = _run_around(place)
        described = json.loads((run / "data.json").read_text()) if run is not None else {}
        return tuple(map(str, described.get("class_names", ())))
    except (OSError, ValueError, AttributeError, TypeError):
        return ()
