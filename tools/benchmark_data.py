"""Measure how many images per second each way of reading data delivers to one process.

    python -m tools.benchmark_data                                 real photographs as 500x375 JPEGs, VAR's transform
    python -m tools.benchmark_data --config configs/....yaml       the data section of a run instead
    python -m tools.benchmark_data --workers 4                     also with worker processes

``raw JPEG`` reads a class folder, ``index`` shards by random access, ``stream`` shards from first to last sample,
``tokens`` a cache of ten views of 680 ids. The first three decode and augment, which is nearly all of their time:
multiply by the worker processes that a rank can have, and compare with the images per second that it trains.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megavar.config.data import (
    CacheSource,
    DataConfig,
    ImageFolderSource,
    TenCropTransform,
    VarTransform,
    WebDatasetSource,
)
from megavar.config.loading import decode, read_tree
from megavar.data.batch import Batch
from megavar.data.build import build_loader, build_source, build_transform
from megavar.data.caches import CachePlan
from megavar.data.caching import ViewReader, write_cache
from megavar.data.photographs import Photographs
from megavar.data.shards.listing import list_originals
from megavar.data.shards.writing import Plan, write_shards
from megavar.errors import ExitCode, MegavarError
from megavar.paths import as_path

WIDTH, HEIGHT = 500, 375
"""About the mean size of an ImageNet image (400x350 to 500x375, 110 kB)."""
TOKENS = 680


@dataclass(frozen=True)
class Speed:
    """One row of the table."""

    path: str
    workers: int
    images_per_second: float
    """Of one loader, the median of all repetitions; with 0 workers that is per core."""
    megabytes_per_second: float
    """Of tensors delivered, in the same repetition."""
    images_per_cpu_second: float | None
    """The same per second of processor time, which other processes on the machine lower less; without workers only."""
    repetitions: tuple[float, ...]
    """Images per second of each, in the order of time."""


def write_originals(folder: Path, count: int) -> Path:
    """``count`` JPEG files of real photographs, enlarged to the size of ImageNet's, in class folders."""
    source = Photographs("train", 188, length=count, short_side=512)
    for index in range(count):
        sample = source.read(index)
        path = folder / source.class_names[sample.label] / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert isinstance(sample.image, np.ndarray)
        image = Image.fromarray(sample.image).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(path, quality=95)
    return folder


def write_tokens(config: DataConfig, folder: Path) -> None:
    """A cache with ids of the right number and range. Reading speed does not depend on which ids they are."""
    images = build_source(config)
    reader = ViewReader(images, build_transform(config), seed=0, views=10)

    def ids_from_pixels(batch: torch.Tensor) -> torch.Tensor:
        return (batch.flatten(1)[:, :TOKENS] * 2000 + 2000).long()

    plan = CachePlan(
        content="tokens",
        views=10,
        shape=(TOKENS,),
        rows=len(images),
        rows_per_part=4096,
        batch_rows=4,
        image_size=config.image_size,
        transform=repr(build_transform(config)),
        seed=0,
        source=images.fingerprint,
        tokenizer_sha256="",
        class_names=images.class_names,
    )
    write_cache(folder, plan, reader, ids_from_pixels)


def embedded_configurations(folder: Path, count: int, size: int) -> dict[str, DataConfig]:
    """Make the data of all paths below ``folder``; the configurations that read them, by name of the path."""
    originals = write_originals(folder / "originals", count)
    shards = 8
    write_shards(Plan(list_originals("class_folders", originals), shards), folder / "shards")
    jpeg = DataConfig(source=ImageFolderSource(path=str(originals)), image_size=size, transform=VarTransform())
    index = WebDatasetSource(path=str(folder / "shards"))
    ten_crop = jpeg.model_copy(update={"source": index, "transform": TenCropTransform()})
    write_tokens(ten_crop, folder / "cache")
    cache = CacheSource(path=str(folder / "cache"), views=10, images=index)
    stream = index.model_copy(update={"order": "stream", "lanes": shards})
    return {
        "raw JPEG": jpeg,
        "index": jpeg.model_copy(update={"source": index}),
        "stream": jpeg.model_copy(update={"source": stream}),
        "tokens": ten_crop.model_copy(update={"source": cache}),
    }


def _megabytes(batch: Batch) -> float:
    tensors = [batch.images, batch.tokens, batch.latents]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None) / 1e6


def measure(path: str, config: DataConfig, *, batch_size: int, seconds: float) -> Speed:
    """Read for ``seconds`` after one batch per worker of warm-up."""
    source = build_source(config)
    loader = build_loader(config, source, seed=0, global_batch_size=batch_size, micro_batch_size=batch_size)
    steps = iter(loader)
    for _ in range(1 + config.workers * config.prefetch):  # what workers have read ahead must not count
        next(steps)
    images, megabytes, started, cpu_started = 0, 0.0, time.perf_counter(), time.process_time()
    for step in steps:
        for batch in step:
            images, megabytes = images + len(batch), megabytes + _megabytes(batch)
        if (elapsed := time.perf_counter() - started) >= seconds:
            break
    speed, cpu_seconds = images / elapsed, time.process_time() - cpu_started
    per_cpu_second = None if config.workers else images / cpu_seconds
    return Speed(path, config.workers, speed, megabytes / elapsed, per_cpu_second, (speed,))


def benchmark(
    configurations: dict[str, DataConfig],
    *,
    workers: Iterable[int] = (0,),
    batch_size: int = 32,
    seconds: float = 5.0,
    repetitions: int = 3,
    report: Callable[[Speed], None] = lambda speed: None,
) -> list[Speed]:
    """Measure every configuration with every number of workers; repetitions are rounds through all of them."""
    cases = [
        (path, config.model_copy(update={"workers": number}))
        for (path, config), number in itertools.product(configurations.items(), workers)
    ]
    rounds = [
        [measure(path, config, batch_size=batch_size, seconds=seconds) for path, config in cases]
        for _ in range(repetitions)
    ]
    speeds = []
    for found in zip(*rounds):
        middle = sorted(found, key=lambda speed: speed.images_per_second)[repetitions // 2]
        speeds.append(replace(middle, repetitions=tuple(speed.images_per_second for speed in found)))
        report(speeds[-1])
    return speeds


def machine() -> dict[str, str | int]:
    """What the numbers belong to."""
    model = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": Image.__version__,
    }


def _print_row(speed: Speed) -> None:
    unit = "images/s per core" if speed.workers == 0 else f"images/s with {speed.workers} workers"
    spread = f"({min(speed.repetitions):.0f} to {max(speed.repetitions):.0f})"
    cpu = "" if speed.images_per_cpu_second is None else f"{speed.images_per_cpu_second:.0f} per CPU second"
    megabytes = f"{speed.megabytes_per_second:.1f} MB/s"
    print(f"{speed.path:<10}{speed.images_per_second:>9.0f} {unit:<26}{spread:<18}{megabytes:>12}  {cpu}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=as_path, help="measure the data section of this run, not embedded data")
    parser.add_argument("--images", type=int, default=256, help="embedded images (default: 256)")
    parser.add_argument("--size", type=int, default=256, help="image size after the transform (default: 256)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement (default: 5)")
    parser.add_argument("--repetitions", type=int, default=3, help="of which the median is taken (default: 3)")
    parser.add_argument("--workers", type=int, default=0, help="measure also with this many worker processes")
    parser.add_argument("--json", type=as_path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if min(options.repetitions, options.images, options.batch_size) < 1 or options.workers < 0:
        parser.error("--repetitions, --images and --batch-size must be at least 1, --workers at least 0")
    torch.set_num_threads(1)
    place = machine()
    print(", ".join(f"{key} {value}" for key, value in place.items()))
    folder = Path(tempfile.mkdtemp(prefix="megavar-benchmark-"))
    try:
        if options.config is not None:
            data = decode(read_tree(options.config).get("data", {}), DataConfig, str(options.config))
            configurations: dict[str, DataConfig] = {data.source.name: data}
        else:
            configurations = embedded_configurations(folder, options.images, options.size)
        speeds = benchmark(
            configurations,
            workers=sorted({0, options.workers}),
            batch_size=options.batch_size,
            seconds=options.seconds,
            repetitions=options.repetitions,
            report=_print_row,
        )
    except MegavarError as error:
        print(f"benchmark_data: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {"machine": place, "speeds": [asdict(speed) for speed in speeds]}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    else:
        print(json.dumps(result))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
