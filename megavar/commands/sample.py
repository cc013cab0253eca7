"""``megavar sample``: draw images from a trained generator, on any number of ranks, or a few for people.

``megavar sample RUN`` draws the run's ``sampling.number`` images. With ``--guidance``, ``--classes`` or ``--png`` it
draws a few for people, and one labelled picture of all of them.
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from megavar import storage
from megavar.conditions import Conditions, GivenClasses
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.errors import ConfigError, ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import Environment, environment
from megavar.paths import as_path
from megavar.pictures import labelled_grid
from megavar.run_samples import class_names, describe, open_samples, write_grid
from megavar.sampling.samples import Samples

FEW = 8
"""Images of each guidance where nobody says how many."""
ACROSS = 10
"""Images in a row of the picture; half as many with prompts below."""
LONGEST = 60
"""Letters of a class or prompt in a file's name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument(
        "--untrained", action="store_true", help="use the weights that the run begins with (random, or given ones)"
    )
    parser.add_argument("--guidance", type=float, nargs="+", metavar="G", help="one or more, beside each other")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers, drawn in turn (default: all)")
    parser.add_argument("--number", type=int, metavar="N", help="images of each guidance (sampling.number)")
    parser.add_argument("--png", type=as_path, metavar="DIR", help="write single images and the picture there, too")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    config = load_config(options.config, options.overrides)
    place = environment()
    topology.initialize(ParallelConfig(), place)
    few = options.guidance or options.classes or options.png
    (_few if few else _all)(config, options, place)
    topology.shutdown()
    return ExitCode.FINISHED


def _all(config: Config, options: argparse.Namespace, place: Environment) -> None:
    config = _with(config, number=options.number)
    samples = open_samples(config, place, untrained=options.untrained)
    samples.fill(place)
    if place.rank == 0:
        grid = write_grid(samples, class_names(config))
        print(f"{describe(samples)} in {samples.directory}, overview in {grid}", flush=True)


def _few(config: Config, options: argparse.Namespace, place: Environment) -> None:
    """One set of images per guidance, all of the same classes and noise, and a picture of them."""
    labels = None if options.classes is None else labels_of(options.classes, config)
    number = options.number or max(FEW, len(labels or ()))
    if options.guidance and not hasattr(config.sampling, "guidance"):
        raise ConfigError(f"sampling.procedure={config.sampling.tag()} knows no guidance. Leave --guidance out.")
    conditions: Conditions | None = None
    if labels is not None:
        assert config.generator is not None
        chosen = tuple(labels[index % len(labels)] for index in range(number))
        conditions = GivenClasses(config.generator.class_count or 0, chosen)
    drawn: dict[str, Samples] = {}
    swept: list[float | None] = options.guidance or [None]
    for guidance in swept:
        settings = _with(config, number=number, guidance=guidance)
        samples = open_samples(settings, place, conditions=conditions, untrained=options.untrained)
        samples.fill(place)
        drawn["" if guidance is None else f"guidance {guidance:g}"] = samples
    if place.rank != 0:
        return
    names = class_names(config)
    picture = _picture(drawn, names, config)
    paths = [samples.directory / "sweep.png" for samples in list(drawn.values())[-1:]]
    if options.png:
        _write_images(drawn, names, options.png)
        paths.append(options.png / "sweep.png")
    for path in paths:
        with storage.atomic_file(path) as file:
            picture.save(file, "PNG")
    for name, samples in drawn.items():
        print(f"{name}{': ' if name else ''}{describe(samples)} in {samples.directory}")
    print(f"picture: {paths[-1]}", flush=True)


def _with(config: Config, **given: float | int | None) -> Config:
    """``config`` with these keys of ``sampling``; None leaves one as it is."""
    changed = {key: value for key, value in given.items() if value is not None}
    sampling = type(config.sampling).model_validate(config.sampling.model_dump() | changed)
    return config.model_copy(update={"sampling": sampling})


def labels_of(classes: Sequence[str], config: Config) -> list[int]:
    """Labels of names or numbers.

    Raises:
        ConfigError: there is no such class, or the generator is not asked by class.
    """
    count = None if config.generator is None else config.generator.class_count
    if count is None:
        raise ConfigError(f"--classes: {config.run.name} trains no generator of classes. Leave it out.")
    names = class_names(config)
    labels = []
    for name in classes:
        if name in names:
            labels.append(names.index(name))
        elif name.isdecimal() and int(name) < count:
            labels.append(int(name))
        else:
            near = difflib.get_close_matches(name, names, 1)
            known = f"Names are {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}; " if names else ""
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--classes: there is no class {name!r}.{hint} {known}numbers are 0 to {count - 1}.")
    return labels


def _shown(samples: Samples, names: Sequence[str]) -> list[str]:
    """What each sample shows."""
    if samples.labels is None:
        return samples.captions(len(samples)) or [""] * len(samples)
    return [names[label] if label < len(names) else str(label) for label in samples.labels.tolist()]


def _picture(drawn: dict[str, Samples], names: Sequence[str], config: Config) -> Image.Image:
    """Rows by guidance; columns are samples of the same noise, named after their classes."""
    rows, left, words = [], [], []
    first = next(iter(drawn.values()))
    shown = _shown(first, names)
    prompted = first.labels is None and any(shown)
    across = ACROSS // 2 if prompted else ACROSS
    for guidance, samples in drawn.items():
        images = [image.permute(1, 2, 0).numpy() for image in samples.read(0, min(len(samples), 10 * ACROSS))]
        for start in range(0, len(images), across):
            rows.append(images[start : start + across])
            words.append(shown[start : start + across])
            left.append(guidance if start == 0 else "")
    repeats = not prompted and (
        len(shown) <= across or all(name == shown[i % across] for i, name in enumerate(shown))
    )
    caption = f"{config.run.name}, {first.identity['model'].get('checkpoint')}, seed {config.sampling.seed}"
    above, below = (shown[:across], ()) if repeats else ((), words)
    return labelled_grid(rows, columns=above, names=left, below=below, caption=caption)


def _write_images(drawn: dict[str, Samples], names: Sequence[str], directory: Path) -> None:
    """Every image as ``DIR[/GUIDANCE]/NUMBER-CLASS.png``."""
    for guidance, samples in drawn.items():
        folder = directory / guidance.replace(" ", "-") if guidance else directory
        for index, (image, name) in enumerate(zip(samples.read(0, len(samples)), _shown(samples, names))):
            safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:LONGEST]
            with storage.atomic_file(folder / f"{index:04d}{'-' if safe else ''}{safe}.png") as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
