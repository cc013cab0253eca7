"""Measure how many images per second feature extraction scores: ADM's Inception and the small trained classifier.

    python -m tools.benchmark_features
    python -m tools.benchmark_features --inception-weights weights-inception-2015-12-05-6726825d.pth --batch-size 64

Without the published weights Inception runs with random ones, which take the same time. On a CPU the figure per core
is images by processor time of all threads, so other work on the machine disturbs it less than images by wall time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from megavar.errors import ExitCode, MegavarError
from megavar.evaluation.classifier import load_network
from megavar.evaluation.digits import digits_extractor
from megavar.evaluation.inception import ADMInception
from megavar.paths import as_path
from tools.benchmark_data import machine


def random_inception(path: Path) -> Path:
    """Write Inception weights of the published layout with random values to ``path``."""
    download = feature_extractor_inceptionv3.load_state_dict_from_url
    load = FeatureExtractorInceptionV3.load_state_dict
    feature_extractor_inceptionv3.load_state_dict_from_url = lambda *args, **kwargs: {}
    FeatureExtractorInceptionV3.load_state_dict = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    finally:
        feature_extractor_inceptionv3.load_state_dict_from_url = download
        FeatureExtractorInceptionV3.load_state_dict = load  # type: ignore[method-assign]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@dataclass(frozen=True)
class Speed:
    """Medians over batches."""

    images_per_second: float
    images_per_second_per_core: float | None
    """By processor time; None on a GPU."""


def measure(extract: Callable[[Tensor], object], images: Tensor, seconds: float) -> Speed:
    """The speed of ``extract`` on one batch, which is not counted the first time."""
    extract(images)
    walls: list[float] = []
    processors: list[float] = []
    while sum(walls) < seconds or len(walls) < 3:
        began, began_processor = time.perf_counter(), time.process_time()
        extract(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - began)
        processors.append(time.process_time() - began_processor)
    per_core = None if images.is_cuda else len(images) / statistics.median(processors)
    return Speed(len(images) / statistics.median(walls), per_core)


def benchmark(weights: Path | None, size: int, batch_size: int, seconds: float) -> dict[str, Speed]:
    """Speed by extractor."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
    with tempfile.TemporaryDirectory() as folder:
        path = weights if weights is not None else random_inception(Path(folder) / "random.pth")
        inception = ADMInception(path, unofficial=weights is None).to(device)
    classifier = load_network(digits_extractor().path).to(device)
    small = images[:, :, :16, :16].repeat(16, 1, 1, 1)
    return {
        f"inception {size}": measure(inception, images, seconds),
        "digits-cnn 16": measure(classifier, small, seconds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools.benchmark_features", description=__doc__.splitlines()[0])
    parser.add_argument("--inception-weights", type=as_path, help="published weights; default: random ones")
    parser.add_argument("--size", type=int, default=256, help="image size (default: 256)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="per extractor (default: 10)")
    parser.add_argument("--json", type=as_path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    try:
        figures = benchmark(options.inception_weights, options.size, options.batch_size, options.seconds)
    except MegavarError as error:
        print(f"tools.benchmark_features: error: {error}", file=sys.stderr)
        return int(error.exit_code)
    for name, speed in figures.items():
        per_core = speed.images_per_second_per_core
        print(
            f"{name:<16} {speed.images_per_second:10.1f} images/s"
            + (f" {per_core:10.1f} images/s per core" if per_core is not None else "")
        )
    if options.json:
        content = {"speeds": {name: asdict(speed) for name, speed in figures.items()}, "machine": machine()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(ExitCode.FINISHED)


if __name__ == "__main__":
    sys.exit(main())
