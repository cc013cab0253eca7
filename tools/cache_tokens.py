"""Run a frozen network once over the training images: keep the tokenizer's tokens or latents, or a teacher's features.

    python -m tools.cache_tokens CONFIG [key=value ...]             make the cache that data.source of CONFIG names
    torchrun --nproc-per-node 8 -m tools.cache_tokens CONFIG        the same on eight GPUs
    python -m tools.cache_tokens CONFIG --verify [--rows 1000]      hashes, and random rows encoded again
    python -m tools.cache_tokens CONFIG --repair                    make damaged parts again
    python -m tools.cache_tokens CONFIG --teacher                   the features of its term's teacher, of the same
                                                                    views, into data.source.features (float16)

CONFIG is the run that will be trained, with for example::

    data:
      source: {name: cache, path: caches/imagenet-256, views: 10, images: {name: webdataset, path: shards/train}}
      transform: {name: ten_crop}        # or var, with as many random views as you like

Interrupt it whenever you like: the same command continues, on any number of ranks, and the bytes are the same.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megavar.assembly import load_teacher, load_tokenizer, require_generator_recipe, teacher_sha256
from megavar.config.data import CacheSource
from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.config.token_space import TokenSpace
from megavar.data.build import build_source, build_transform, of_images
from megavar.data.caches import CachePlan, Content, read_cache_file, weights_sha256
from megavar.data.caching import (
    ViewReader,
    check_plan,
    damaged_parts,
    encode_batches,
    forget_parts,
    verify_cache,
    write_cache,
)
from megavar.errors import ConfigError, ExitCode
from megavar.frozen import TOKENIZER
from megavar.parallel.environment import Environment, environment
from megavar.paths import as_path
from megavar.tokenizers.base import Tokenizer
from tools.outcome import outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    options = _parse(arguments)
    return outcome("cache_tokens", lambda: _run(options, environment()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cache_tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=as_path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--tokenizer-weights", metavar="PATH", help="default: recipe.tokenizer_weights of CONFIG")
    parser.add_argument("--teacher", action="store_true", help="cache the features of the teacher of recipe.terms")
    parser.add_argument("--rows-per-part", type=int, default=4096, metavar="N", help="default: 4096")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images encoded together (default: 64)")
    parser.add_argument("--verify", action="store_true", help="verify a finished cache")
    parser.add_argument("--rows", type=int, default=1000, metavar="N", help="rows that --verify encodes again")
    parser.add_argument("--repair", action="store_true", help="make parts again whose hash is wrong")
    options = parser.parse_intermixed_args(arguments)
    if min(options.rows_per_part, options.batch, options.rows + 1) < 1:
        parser.error("--rows-per-part and --batch must be at least 1, --rows at least 0")
    return options


def _run(options: argparse.Namespace, place: Environment) -> int:
    config = load_config(options.config, options.overrides)
    source = config.data.source
    if not isinstance(source, CacheSource):
        raise ConfigError(
            f"data.source.name is {source.name!r}. Name the cache to be made, with the images under it, for example "
            f"data.source={{name: cache, path: caches/{config.run.name}, images: {{name: {source.name}}}}}."
        )
    network = _teacher(config, source, place) if options.teacher else _tokenizer(options, config, source, place)
    folder, encode = network.folder, network.encode
    images = build_source(of_images(config.data))
    transform = build_transform(config.data)
    reader = ViewReader(images, transform, seed=config.train.seed, views=source.views,
                        damaged=config.data.damaged_samples)  # fmt: skip
    sizes = options.rows_per_part, max(1, options.batch // source.views)
    if options.verify or options.repair:
        if place.world_size > 1:
            raise ConfigError("--verify and --repair run in one process. Start them without torchrun.")
        existing = read_cache_file(folder).plan
        sizes = existing.rows_per_part, existing.batch_rows
    plan = CachePlan(
        content=network.content,
        views=source.views,
        shape=_shape_of_view(reader, encode, place),
        rows=len(images),
        rows_per_part=sizes[0],
        batch_rows=sizes[1],
        image_size=config.data.image_size,
        transform=repr(transform),
        seed=config.train.seed,
        source=images.fingerprint,
        tokenizer_sha256=network.sha256,
        class_names=images.class_names,
        wide=network.content == "tokens" and config.tokenizer.space.stored_type == "int32",
    )
    if options.verify or options.repair:
        check_plan(folder, existing, plan)
    if options.verify:
        return _verify(folder, plan, reader, encode, options.rows, config.data.workers, place)
    if options.repair:
        damaged = damaged_parts(folder)
        if not damaged:
            print(f"{folder}: all {plan.parts} parts are as they were written")
            return ExitCode.FINISHED
        forget_parts(folder, damaged)
    return _write(folder, plan, reader, encode, config.data.workers, place)


@dataclass(frozen=True)
class Network:
    """What makes the content of a cache, and where that goes."""

    folder: Path
    content: Content
    encode: Callable[[Tensor], Tensor]
    sha256: str


def _tokenizer(options: argparse.Namespace, config: Config, source: CacheSource, place: Environment) -> Network:
    weights = options.tokenizer_weights or config.recipe.frozen_weights().get(TOKENIZER)
    if weights is None:
        raise ConfigError(f"The recipe {config.recipe.name!r} names no tokenizer weights. Give --tokenizer-weights.")
    tokenizer = load_tokenizer(config.tokenizer, weights, place.device)
    encode = encoder(tokenizer, source.content, config.tokenizer.space)
    return Network(Path(source.path), source.content, encode, weights_sha256(tokenizer))


def _teacher(config: Config, source: CacheSource, place: Environment) -> Network:
    """The one whose features the terms of the run compare with.

    Raises:
        ConfigError: there is none, or several, or no folder for its features.
    """
    choices = [teacher for term in require_generator_recipe(config).terms for teacher in term.teachers]
    if len(choices) != 1:
        raise ConfigError(
            f"--teacher caches the features of one teacher, but the terms of run {config.run.name} (recipe.terms) have "
            f"{len(choices)}. Give a configuration whose terms have one."
        )
    if source.features is None:
        raise ConfigError(
            f"Nothing says where the features go. Set data.source.features, for example to {source.path}-features."
        )
    teacher = load_teacher(choices[0], place.device)
    return Network(Path(source.features), "features", teacher.features, teacher_sha256(choices[0], teacher))


def encoder(tokenizer: Tokenizer, content: Content, space: TokenSpace) -> Callable[[Tensor], Tensor]:
    """What turns images into the content of a cache.

    Raises:
        ConfigError: tokens are wanted, but those of this tokenizer are vectors.
    """
    if content == "tokens" and space.vocabulary is None:
        raise ConfigError(
            "data.source.content=tokens, but the tokens of this tokenizer are vectors. Set data.source.content=latents."
        )
    if content == "latents":
        return tokenizer.encode
    return lambda images: tokenizer.tokens(tokenizer.encode(images))


def _shape_of_view(reader: ViewReader, encode: Callable[[Tensor], Tensor], place: Environment) -> tuple[int, ...]:
    views, _ = next(encode_batches(reader, [[0]], encode, workers=0, device=place.device))
    return views.shape[2:]


def _write(
    folder: Path,
    plan: CachePlan,
    reader: ViewReader,
    encode: Callable[[Tensor], Tensor],
    workers: int,
    place: Environment,
) -> int:
    own = sum(len(plan.rows_of(part)) for part in range(place.rank, plan.parts, place.world_size))
    with tqdm(total=own, unit=" images", desc="caching", smoothing=0.05, disable=place.rank > 0) as bar:
        cache = write_cache(
            folder,
            plan,
            reader,
            encode,
            rank=place.rank,
            world_size=place.world_size,
            workers=workers,
            device=place.device,
            progress=bar.update,
        )
    if cache is not None:
        print(f"{folder}: {plan.rows} samples x {plan.views} views of {plan.content} {list(plan.shape)}")
    return ExitCode.FINISHED


def _verify(
    folder: Path,
    plan: CachePlan,
    reader: ViewReader,
    encode: Callable[[Tensor], Tensor],
    rows: int,
    workers: int,
    place: Environment,
) -> int:
    with tqdm(total=plan.rows, unit=" images", desc="verifying") as bar:
        report = verify_cache(
            folder, reader, encode, rows=rows, workers=workers, device=place.device, progress=bar.update
        )
    for problem in report.problems:
        print(problem)
    print(f"{plan.parts} parts hashed, {report.rows} samples encoded again: {report.agreement:.3%} the same")
    return ExitCode.CONFIGURATION if report.problems else ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
