"""``megavar evaluate``: draw images if they are not there yet, and score them with baselines beside."""

import argparse
from pathlib import Path

from megavar.commands.sample import Samples, draw_samples, read_images
from megavar.config.evaluation import DigitsSuite
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.data.build import build_source
from megavar.errors import ConfigError, ExitCode
from megavar.evaluation import digits
from megavar.evaluation.results import Result, class_histogram, write_result
from megavar.evaluation.table import format_table, thresholds_missed
from megavar.parallel import topology
from megavar.parallel.environment import Environment, environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument("--untrained", action="store_true", help="score freshly initialized weights only")


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    config = load_config(options.config, options.overrides)
    place = environment()
    topology.initialize(ParallelConfig(), place)
    score(config, place, untrained=options.untrained)
    topology.shutdown()
    return ExitCode.FINISHED


def score(config: Config, place: Environment, *, untrained: bool = False) -> dict[str, float]:
    """Sample ``evaluation.samples`` images and score them. Collective; the scores are returned on rank 0 only.

    Beside the model stand the untrained model and the suite's baselines.
    """
    config = config.model_copy(
        update={"sampling": config.sampling.model_copy(update={"number": config.evaluation.samples})}
    )
    if not isinstance(config.evaluation.suite, DigitsSuite) or config.data.source.name != "digits":
        raise ConfigError(
            f"evaluation.suite={config.evaluation.suite.name!r} scores digits, but data.source.name is "
            f"{config.data.source.name!r}. Choose a suite that fits the data."
        )
    samples = draw_samples(config, place, untrained=untrained)
    initial = samples if untrained else draw_samples(config, place, untrained=True)
    if place.rank != 0:
        return {}
    suite = config.evaluation.suite
    cache = Path(suite.extractor_cache) if suite.extractor_cache else None
    name = "untrained model" if untrained else config.run.name
    rows = {name: digits.evaluate_digits(*read_images(samples.store), directory=cache)}
    if not untrained:
        rows["untrained model"] = digits.evaluate_digits(*read_images(initial.store), directory=cache)
    if suite.baselines:
        rows |= digits.baselines(config.evaluation.samples, directory=cache)
    result = _result(config, samples, rows[name])
    path = Path(config.run.path) / f"scores-{samples.store.directory.name}.json"
    write_result(path, result)
    print(format_table(rows, digits.METRICS))
    missed = thresholds_missed(rows[name], digits.METRICS)
    print(f"\n{name}: " + (f"misses {', '.join(missed)}" if missed else "meets every threshold (✓ = met, ✗ = missed)"))
    print(f"scores: {path}\nsamples: {samples.grid}", flush=True)
    return rows[name]


def _result(config: Config, samples: Samples, scores: dict[str, float]) -> Result:
    _, labels = read_images(samples.store)
    source = build_source(config.data)
    return Result(
        suite="digits",
        metrics=scores,
        count=samples.store.count,
        class_histogram=class_histogram(labels),
        rounding="round",
        order="index i has class i modulo the number of classes",
        extractor={"name": digits.EXTRACTOR_NAME},
        reference={"name": "digits/train", "count": len(source), "fingerprint": source.fingerprint},
        sampler=config.sampling.model_dump(mode="json"),
        checkpoint=samples.checkpoint,
    )
