"""The samples of a run: what draws them, what they show, what decodes them again, and where they are."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from megavar.assembly import (
    build_generator,
    build_sampler,
    load_tokenizer,
    require_generator,
    require_generator_recipe,
)
from megavar.beginning import fill_initial
from megavar.chunks import ChunkStore
from megavar.conditions import ClassConditions, Conditions, GivenClasses, SourceCaptions, Unconditional
from megavar.config.loading import decode, import_stored_plugins
from megavar.config.recipes.base import GENERATOR_MODULE
from megavar.config.root import TEXT_TOKENIZER, Config
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.data.build import build_source
from megavar.errors import ConfigError, DataError
from megavar.frozen import TOKENIZER, check_same, identify, identities
from megavar.parallel.environment import Environment, choose_kernels, limit_threads
from megavar.pictures import labelled_grid, overview
from megavar.sampling.sampler import TokenDecoder
from megavar.sampling.samples import Decoder, Samples
from megavar.storage import atomic_file, write_json_atomic
from megavar.tokenizers.base import Tokenizer
from megavar.training.checkpoint.ranks import once_per_node
from megavar.training.checkpoint.weights import find_checkpoint, load_weights

DECODER = "decoder.json"
"""Beside the chunks of samples: what decodes their tokens."""
GRID_COLUMNS = 10
GRID_IMAGES = 100
GRID_CAPTIONED = 40
"""Images with words below."""
SEARCHED = 1000
"""First samples among which the overview looks for those of each class, or for different captions."""
NAMED = ("guidance", "seed", "weights", "temperature", "top_k", "top_p", "number")
"""Keys of ``sampling`` that name a directory where they differ from the run's."""


def open_samples(
    config: Config,
    place: Environment,
    *,
    conditions: Conditions | None = None,
    untrained: bool = False,
    checkpoint: Path | None = None,
) -> Samples:
    """The ``sampling.number`` samples that ``config`` describes.

    Those that were drawn before are kept, the others are drawn when they are read, or all at once by ``fill``. The
    directory is named after everything that decides the images.

    Args:
        conditions: what they show; None: what the generator is asked for by default, see :func:`default_conditions`.
        untrained: take the weights with which the run begins (random ones, or ``train.initial_weights``) instead of its
            latest checkpoint.
        checkpoint: of the run, instead of its latest.

    Raises:
        ConfigError: the run trains no generator, or its generator cannot be asked for ``conditions``.
    """
    require_generator_recipe(config)
    conditions = conditions or default_conditions(config)
    check_conditions(config, conditions, "sampling")
    limit_threads(config.train.cpu_threads)
    choose_kernels(config.train.precision, config.train.tf32, config.train.deterministic)
    sampling = config.sampling
    generator, tokenizer, model = _load(config, place.device, untrained, checkpoint)
    settings = sampling.model_dump(mode="json", exclude=set(sampling.changes_no_sample))
    identity = {
        "sampling": {key: value for key, value in settings.items() if key not in ("number", "chunk_size")},
        "model": model,
        "conditions": conditions.identity,
        "space": asdict(tokenizer.space),
    }
    if config.data.text is not None:
        identity["text"] = config.data.text.model_dump(mode="json", exclude={"tokenizer"})
    named = [identity, sampling.number, sampling.chunk_size]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    directory = _directory(config, "untrained" if untrained else model["checkpoint"], conditions, digest)
    store = ChunkStore.open(directory, count=sampling.number, size=sampling.chunk_size, identity=identity)
    describe_decoder(directory, config)
    sampler = build_sampler(config, generator, tokenizer, conditions, place.device)
    keep = sampling.number if sampling.keep_images is None else sampling.keep_images
    return Samples(store, sampler.decoder, sampler=sampler, keep_images=keep)


def _directory(config: Config, weights: str, conditions: Conditions, digest: str) -> Path:
    """``generated/WEIGHTS[-WHAT DIFFERS]-DIGEST``: in words, what the run's own settings do not say."""
    parent = Path(config.run.path) / "generated"
    if drawn_before := sorted(parent.glob(f"{weights}*-{digest}")):
        return drawn_before[0]
    try:
        usual = yaml.safe_load((Path(config.run.path) / "config.yaml").read_text())["sampling"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        usual = {}
    here = config.sampling.model_dump(mode="json")
    differing = [f"{key}_{here[key]}" for key in NAMED if key in here and key in usual and here[key] != usual[key]]
    if isinstance(conditions, GivenClasses):
        differing.append("classes_" + "_".join(map(str, dict.fromkeys(conditions.labels))))
    words = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(differing))[:80]
    return parent / "-".join(part for part in (weights, words, digest) if part)


def _load(
    config: Config, device: torch.device, untrained: bool, named: Path | None
) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """The generator, the tokenizer that it learned from, and what identifies both."""
    weights = require_generator_recipe(config).tokenizer_weights
    drawn = config.sampling.tokenizer_of(config.tokenizer)
    tokenizer = load_tokenizer(drawn, weights, device, together=True)
    texts = {name: path for name, path in config.frozen_weights.items() if name == TEXT_TOKENIZER}
    used = {TOKENIZER: weights, **texts}
    found = once_per_node(lambda: {name: identify(path) for name, path in used.items()})
    generator = build_generator(config, None)
    model: dict[str, Any] = {"checkpoint": "initial weights", "seed": config.train.seed}
    if untrained:
        model |= fill_initial(generator, config)
    else:
        checkpoint, manifest = find_checkpoint(named or Path(config.run.path), verify=False)  # loading verifies it
        check_same(identities(manifest.frozen), found, checkpoint, "train a generator with these.")
        average = config.sampling.weights == "ema"
        load_weights(generator, checkpoint, GENERATOR_MODULE, ema=average, whole=True, together=True)
        model = identify(checkpoint).to_json()
    model |= {
        "weights": config.sampling.weights,
        "precision": config.train.precision,
        "generator": require_generator(config).model_dump(mode="json"),
        **{name: identity.to_json() for name, identity in found.items()},
    }
    return generator.to(device), tokenizer, model


def default_conditions(config: Config) -> Conditions:
    """What the generator is asked for where nobody asks for anything else: classes in turn, captions of the test data,
    or nothing.
    """
    generator = require_generator(config)
    if generator.condition == "class":
        assert generator.class_count is not None
        return ClassConditions(generator.class_count)
    if generator.condition == "text":
        return SourceCaptions(build_source(config.data, "test"))
    return Unconditional()


def check_conditions(config: Config, conditions: Conditions, asked_by: str) -> None:
    """Refuse what the generator cannot be asked for.

    Args:
        asked_by: who asks, with its key: the beginning of a sentence.

    Raises:
        ConfigError: the generator draws by another kind of condition.
    """
    generator = require_generator(config)
    if conditions.kind != generator.condition:
        words = {"class": "classes", "text": "prompts", "none": "images without a condition"}
        asked, drawn = words[conditions.kind], words[generator.condition]
        raise ConfigError(
            f"{asked_by} asks for {asked}, but generator.name={generator.name} draws {drawn}. Choose a suite "
            f"(evaluation.suite.name) that asks for {drawn}, or a generator that draws {asked}."
        )
    if conditions.classes != generator.class_count:
        raise ConfigError(
            f"{asked_by} asks for {conditions.classes} classes, but generator.name={generator.name} has "
            f"{generator.class_count}. Evaluate a generator of the data's classes."
        )
    if conditions.count is not None and conditions.count < config.sampling.number:
        raise ConfigError(
            f"sampling.number={config.sampling.number}, but there are conditions for {conditions.count} samples only. "
            f"Lower it."
        )


def describe_decoder(directory: Path, config: Config) -> None:
    """Write down what decodes the tokens of the samples in ``directory``; :func:`stored_decoder` reads it."""
    weights = Path(require_generator_recipe(config).tokenizer_weights)
    tokenizer = config.sampling.tokenizer_of(config.tokenizer)
    described = {
        "tokenizer": tokenizer.model_dump(mode="json"),
        "space": asdict(tokenizer.space),
        "weights": str(weights.resolve()),
        "identity": identify(weights).to_json(),
        "rounding": config.sampling.rounding,
        "plugins": list(config.plugins),
    }
    write_json_atomic(directory / DECODER, described)


def stored_samples(directory: Path, device: torch.device) -> Samples:
    """Finished samples that ``megavar sample`` or ``megavar evaluate`` left in ``directory``, read only.

    Raises:
        DataError: there are none, or only a part of them; later, see :func:`stored_decoder`.
    """
    return Samples.stored(directory, stored_decoder(directory, device))


def stored_decoder(directory: Path, device: torch.device) -> Decoder:
    """From the tokens of samples that ``megavar sample`` left in ``directory`` to their images.

    The tokenizer is loaded when the first tokens are decoded: not at all where all images are stored.

    Raises:
        DataError: (then) nothing says which tokenizer it is, or its weights are gone.
        ConfigError: (then) it needs modules that nobody but the file asks for.
        CheckpointError: (then) its weights are others now.
    """

    @functools.cache
    def load() -> TokenDecoder:
        path = Path(directory) / DECODER
        try:
            described: dict[str, Any] = json.loads(path.read_text())
            weights, rounding, section = Path(described["weights"]), described["rounding"], described["tokenizer"]
            before = identities({TOKENIZER: described["identity"]})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} cannot be read ({type(error).__name__}: {error}), so nothing says what decodes these tokens. "
                f"Restore it, or sample again."
            ) from error
        if not weights.exists():
            raise DataError(
                f"The tokens in {directory} are decoded by the tokenizer weights {weights}, which do not exist: "
                f"restore them, correct their path in {path}, or sample again."
            )
        import_stored_plugins(described, str(path))
        tokenizer = load_tokenizer(decode(section, TokenizerChoice, str(path)), str(weights), device)
        check_same(before, {TOKENIZER: identify(weights)}, directory, "sample again.")
        return TokenDecoder(tokenizer, device, rounding)

    return lambda tokens: load()(tokens)


def describe(samples: Samples) -> str:
    """``1003 images (10 classes, 100 or 101 of each)``."""
    if samples.labels is None:
        return f"{len(samples)} images"
    counts = samples.labels.unique(return_counts=True)[1].tolist()
    each = " or ".join(map(str, sorted(set(counts))))
    return f"{len(samples)} images ({len(counts)} classes, {each} of each)"


def write_grid(samples: Samples, names: Sequence[str] = ()) -> Path:
    """Write an overview beside the chunks: the first samples of each class, a column per class, ten at most; or samples
    of captions from first to last, each caption below its image.

    Args:
        names: of the classes, by label.
    """
    path = samples.directory / "grid.png"
    identity, labels, captions = samples.identity, samples.labels, samples.captions(SEARCHED)
    caption = f"{identity['model'].get('checkpoint', '')}, {settings_in_words(identity['sampling'])}"
    if labels is None:
        places = list(range(min(GRID_IMAGES, len(samples))))
        if captions is not None:  # a prompt may be asked for several times in a row, a kind of prompts before the next
            count = min(GRID_CAPTIONED, len(captions))
            places = [number * len(captions) // count for number in range(count)]
        images = [samples.read(place, place + 1)[0].permute(1, 2, 0).numpy() for place in places]
        words = [""] * len(images) if captions is None else [captions[place] for place in places]
        picture = overview(images, words, GRID_COLUMNS if captions is None else GRID_COLUMNS // 2, caption)
    else:
        first = labels[:SEARCHED].tolist()
        columns = list(dict.fromkeys(first))[:GRID_COLUMNS]
        below = [[index for index, label in enumerate(first) if label == wanted] for wanted in columns]
        rows = [[places[row] for places in below] for row in range(min(GRID_COLUMNS, *map(len, below)))]
        grid = [[samples.read(index, index + 1)[0].permute(1, 2, 0).numpy() for index in row] for row in rows]
        picture = labelled_grid(grid, columns=[_named(label, names) for label in columns], caption=caption)
    with atomic_file(path) as file:
        picture.save(file, "PNG")
    return path


def settings_in_words(sampling: Mapping[str, Any]) -> str:
    """What a person asks first of a picture: ``guidance 1.5, seed 0``."""
    asked = [(key, sampling[key]) for key in ("guidance", "seed") if sampling.get(key) is not None]
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in asked)


def shown(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """What each drawn sample shows: the caption, or the name of the class; empty where it was asked for nothing."""
    if "captions" in arrays:
        return [str(caption) for caption in arrays["captions"]]
    if "labels" in arrays:
        return [_named(int(label), names) for label in arrays["labels"]]
    return [""] * len(arrays["tokens"])


def _named(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


def class_names(config: Config) -> tuple[str, ...]:
    """Of the run's data, as it wrote them down; empty where it did not."""
    try:
        described = json.loads((Path(config.run.path) / "data.json").read_text())
        return tuple(map(str, described.get("class_names", ())))
    except (OSError, ValueError, AttributeError, TypeError):
        return ()
