"""What watches a run of ``megavar train``: banner, ledger, routing, alerts, validation, comparison with the plan."""

import functools
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from megavar.config.root import Config
from megavar.config.validation import ValidationConfig
from megavar.data.batch import Batch
from megavar.data.build import build_loader, build_source, of_images
from megavar.data.source import Source
from megavar.errors import ConfigError
from megavar.parallel.environment import Environment, device_name
from megavar.parallel.topology import Topology
from megavar.planning.calibration import Calibration
from megavar.planning.hardware import name_of_device
from megavar.planning.measure import UnmeasurableError, release
from megavar.planning.plan import predict
from megavar.recipes.base import Recipe
from megavar.training.alerts import AlertsObserver
from megavar.training.banner import BannerObserver
from megavar.training.expectation import Expectation, ExpectationObserver
from megavar.training.ledger import LedgerObserver
from megavar.training.observers import Observer
from megavar.training.routing import RoutingObserver
from megavar.training.run import on_first_rank
from megavar.training.validation import HeldOut, ValidationObserver

_NAMED = 6
"""Classes that the banner names."""


def watchers(config: Config, source: Source, recipe: Recipe, place: Environment, mesh: Topology) -> list[Observer]:
    """All of them, on every rank alike.

    Args:
        source: the training data.

    Raises:
        ConfigError: there are not as many held-out samples as ``validation`` asks for.
    """
    space = config.tokenizer.space
    guess = math.log(space.vocabulary) if config.recipe.trains == "generator" and space.vocabulary else None
    found: list[Observer] = [
        LedgerObserver(),
        BannerObserver(*banner(config, source, recipe, place, mesh)),
        AlertsObserver(config.logging.alerts, guess),
        RoutingObserver(),
    ]
    expected = on_first_rank(functools.partial(_expected, config, place))
    if expected is not None:
        found.append(ExpectationObserver(expected, config.logging.interval))
    if config.validation is not None:
        found.append(ValidationObserver(
            config.validation.interval, config.logging.interval, held_out(config, config.validation, place, mesh)
        ))  # fmt: skip
    return found


def held_out(config: Config, validation: ValidationConfig, place: Environment, mesh: Topology) -> HeldOut:
    """The first samples of the test split, in the order of the run's seed.

    Raises:
        ConfigError: there are none, or not so many.
    """
    source = build_source(of_images(config.data), "test")
    samples = validated(validation, config.train.global_batch_size)
    if samples > len(source):
        raise ConfigError(
            f"validation takes {samples} held-out samples (validation.samples={validation.samples} in whole batches of "
            f"train.global_batch_size={config.train.global_batch_size}), but there are {len(source)}. Lower them, or "
            f"set validation=null."
        )

    def batches(micro_batch_size: int) -> Iterable[list[Batch]]:
        return build_loader(
            of_images(config.data),
            source,
            seed=config.train.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=mesh.data_rank,
            data_parallel_size=mesh.data,
            stop_step=samples // config.train.global_batch_size,
            device=place.device,
        )

    return batches


def validated(validation: ValidationConfig, batch: int) -> int:
    """Held-out samples that are taken: whole batches, one at least."""
    return max(1, validation.samples // batch) * batch


def banner(
    config: Config, source: Source, recipe: Recipe, place: Environment, mesh: Topology
) -> tuple[str, list[tuple[str, str]]]:
    """Title and rows of what begins."""
    space, train, path = config.tokenizer.space, config.train, Path(config.run.path)
    steps = train.total_steps(len(source))
    classes = [str(name) for name in source.class_names]
    named = ", ".join(classes[:_NAMED]) + (", ..." if len(classes) > _NAMED else "")
    side = config.data.image_size
    sides = " ".join(map(str, space.sides))
    shape = "in a line" if not sides else f"sides {sides}" if len(space.sides) > 1 else f"{sides} x {sides}"
    vocabulary = f"{space.vocabulary} different" if space.vocabulary else f"vectors of {space.channels}"
    precision = f"{train.precision}, {place.world_size} process" + ("es" if place.world_size > 1 else "")
    rows = [
        ("data", f"{config.data.source.name}: {len(source):,} images, "
                 + (f"{len(classes)} classes ({named}), " if classes else "")
                 + ("with captions, " if config.data.text is not None else "") + f"{side} x {side} pixels"),
        ("model", _model(config, recipe, mesh)),
        ("tokens", f"{space.length} per image ({shape}), {vocabulary}"),
        ("length", f"{steps:,} steps of {train.global_batch_size} images = "
                   f"{steps * train.global_batch_size / len(source):.3g} epochs"),
        ("device", f"{device_name()}, {precision}"),
    ]  # fmt: skip
    if config.validation is not None:
        samples = validated(config.validation, train.global_batch_size)
        rows.append(("validation", f"every {config.validation.interval} steps, on {samples} held-out images"))
    every = config.logging.samples_interval
    if config.recipe.trains != "teacher" and config.parallel.pipeline == 1:
        rows.append(("pictures", f"{path / 'samples'}, " + (f"every {every} steps" if every else "at the end")))
    rows.append(("watch", f"python -m megavar status {path} --watch"))
    return f"{config.run.name}: trains a {config.recipe.trains}, recipe {config.recipe.name}", rows


def _model(config: Config, recipe: Recipe, mesh: Topology) -> str:
    choice = config.generator if config.recipe.trains == "generator" else config.tokenizer
    assert choice is not None
    parts = [choice.name]
    layout = mesh.config
    if layout.tensor == layout.pipeline == layout.expert == 1:
        count = sum(parameter.numel() for module in recipe.modules().values() for parameter in module.parameters())
        parts.append(f"{count / 1e6:.3g} M parameters")
    limits = config.limits
    if config.recipe.trains == "generator" and limits is not None:
        parts.append(f"{limits.depth} blocks" + (f" with {limits.experts.number} experts" if limits.experts else ""))
    return ", ".join(parts)


def _expected(config: Config, place: Environment) -> Expectation | None:
    """What a plan says of this run on this device; None where it says nothing of it."""
    file = config.logging.calibration
    if config.recipe.trains == "teacher":
        return None
    calibration = None if file is None or config.generator is None else Calibration.load(Path(file))
    gpu = name_of_device(device_name()) if calibration is None else None
    if calibration is None and gpu is None:
        return None
    ranks = min(place.world_size, torch.cuda.device_count() or place.world_size)
    try:
        predicted, source = predict(config, place.world_size, gpu, calibration=calibration, ranks_per_node=ranks)
    except UnmeasurableError:
        return None  # flops_per_image says so
    finally:
        release()
    return Expectation(predicted.time.total, predicted.memory.total - predicted.memory.reserved, source)


