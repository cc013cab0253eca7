"""Sections of ``tools/gpu_check.py`` that measure: the device, train steps, sampling, layers, the tokenizer."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megavar.assembly import build_generator, build_sampler
from megavar.config.root import Config
from megavar.planning.device_rates import copy_rate, launch_seconds, product_seconds
from megavar.run_samples import default_conditions
from megavar.sampling.sampler import Sampler
from tools import benchmark_cases
from tools.benchmark_bench import Bench, Part
from tools.benchmark_timing import Timing, measure, synchronize
from tools.gpu_check_models import Training, compilation, free, published, values_from_the_device
from tools.gpu_check_worker import Check

MEMORY_SHARE = 0.93
"""Of the device, that a micro-batch may take: libraries hold the rest, and what fragmentation wastes."""
TIMED_SECONDS = 4.0


def _timed(work: Callable[[], Any], seconds: float = TIMED_SECONDS, least: int = 3) -> Timing:
    """Several single calls, after one that does not count."""
    work()
    synchronize()
    samples: list[float] = []
    while len(samples) < least or (sum(samples) < seconds and len(samples) < 30):
        began = time.perf_counter()
        work()
        synchronize()
        samples.append(time.perf_counter() - began)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, tuple(samples), 1, _peak())


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _values(timing: Timing, images: int | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "seconds": timing.median, "lower": timing.lower, "upper": timing.upper, "peak_bytes": timing.peak_bytes,
    }  # fmt: skip
    return values if images is None else values | {"images": images, "images_per_second": images / timing.median}


def device(check: Check) -> None:
    """Matrix products by type, copies, and how fast the host launches kernels."""
    side = 256 if check.dry else 8192
    types = (("bf16", torch.bfloat16, False), ("fp32", torch.float32, False), ("tf32", torch.float32, True))
    for name, dtype, tf32 in types:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        seconds = product_seconds(check.device, dtype, side, side, side)
        check.figure("device", f"{name} product of {side}", seconds=seconds, flops_per_second=2 * side**3 / seconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    check.figure("device", "copy", bytes_per_second=copy_rate(check.device, 1 << (20 if check.dry else 30)))
    check.figure("device", "launch", seconds=launch_seconds(check.device))


def train(check: Check, model: str) -> None:
    """The train step, eager and compiled, at two micro-batches: a small one and the largest that fits."""
    mesh = check.mesh()
    largest = 4
    for mode, overrides in (("eager", []), ("compiled", compilation(check.dry))):
        training = Training(published(model, check.dry, *overrides), mesh, check.device, own_values=False)
        began = time.perf_counter()
        small = 2 if check.dry else 16
        _step_peak(training, small if mode == "eager" else largest)
        first = time.perf_counter() - began
        if mode == "eager":
            largest = _largest_micro_batch(check, model, training)
        for images in (largest, small) if mode == "eager" else (largest,):  # another size would compile again
            free()
            batch = training.batch(images)
            timing = _timed(functools.partial(training.step, batch), 0.1 if check.dry else TIMED_SECONDS)
            reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
            check.figure(model, "train step", mode=mode, first_seconds=first, reserved_bytes=reserved,
                         loss=training.loss(), **_values(timing, images))  # fmt: skip
        training.close()


def _step_peak(training: Training, images: int) -> int:
    """Most memory that two steps take; 0 on a CPU."""
    free()
    batch = training.batch(images)
    for _ in range(2):
        training.step(batch)
    synchronize()
    training.metrics.forget()
    return _peak() or 0


def _largest_micro_batch(check: Check, model: str, training: Training) -> int:
    """From the line through two small ones; smaller until it fits."""
    if check.device.type == "cpu":
        return 4
    points = {images: _step_peak(training, images) for images in (8, 16)}
    slope = (points[16] - points[8]) / 8
    room = torch.cuda.get_device_properties(check.device).total_memory * MEMORY_SHARE
    wanted = 8 + int((room - points[8]) / slope)
    wanted -= wanted % 4
    while wanted > 16:
        try:
            points[wanted] = _step_peak(training, wanted)
            break
        except torch.cuda.OutOfMemoryError:
            check.figure(model, "out of memory", images=wanted)
            wanted = int(wanted * 0.92) // 4 * 4
    for images, peak in sorted(points.items()):
        check.figure(model, "peak memory", images=images, peak_bytes=peak)
    return max(wanted, 16)


def sampling(check: Check) -> None:
    """Drawing and decoding images, one at a time and 64 at once, with guidance as in the papers."""
    check.mesh()
    for model in ("d16", "stmoe-d16"):
        config = published(model, check.dry)
        with values_from_the_device():
            generator = build_generator(config, None, device=check.device)
        tokenizer = Bench(config, check.mesh(), check.device, 1).assembly().tokenizer()
        sampler = build_sampler(config, generator, tokenizer, default_conditions(config), check.device)
        for images in (1, 2) if check.dry else (64, 1):
            free()
            indices = torch.arange(images)
            timing = _timed(functools.partial(sampler.draw, indices), 0.1 if check.dry else TIMED_SECONDS)
            check.figure(model, "sampling", **_values(timing, images))
            if check.device.type == "cuda":
                _graphed(check, config, model, sampler, indices)


def _graphed(check: Check, config: Config, model: str, plain: Sampler, indices: torch.Tensor) -> None:
    """The same samples from a CUDA graph: are they, and how fast."""
    settings = config.sampling.model_copy(update={"cuda_graph": True})
    sampler = Sampler(plain.generator, plain.tokenizer, plain.procedure, plain.conditions, settings, plain.device)
    others = indices + len(indices)
    sampler.draw(others)  # as usual
    sampler.draw(others)  # recorded
    same = (sampler.draw(indices).arrays["tokens"] == plain.draw(indices).arrays["tokens"]).all()
    check.passed(f"{model}: {len(indices)} samples from a CUDA graph are the same", bool(same))
    check.figure(
        model, "sampling, CUDA graph", **_values(_timed(functools.partial(sampler.draw, indices)), len(indices))
    )


def _parts(check: Check, model: str, part: Callable[[Bench], Part], images: int) -> None:
    """A part of ``tools/benchmark.py``; an alternative that fails takes no other with it."""
    bench = Bench(published(model, check.dry), check.mesh(), check.device, images)
    made = part(bench)
    for name, reason in made.skipped.items():
        check.figure(model, made.name, alternative=name, skipped=reason)
    for name, work in made.alternatives.items():
        pair = {name: work} if made.baseline is None else {made.baseline: made.alternatives[made.baseline], name: work}
        free()
        try:
            timings = measure(pair, 3 if check.dry else 5)
        except Exception as error:
            if "CUDA error" in str(error):  # nothing works after it
                raise
            check.figure(model, made.name, alternative=name, skipped=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        ratio = None if made.baseline is None else timings[name].ratio(timings[made.baseline])[1]
        flops = made.flops.get(name)
        check.figure(
            model, made.name, alternative=name, relative_to=made.baseline, ratio=ratio,
            flops_per_second=None if flops is None else flops / timings[name].median,
            **_values(timings[name], images),
        )  # fmt: skip


def experts(check: Check) -> None:
    """Expert backends beside a dense network of the same activated FLOPs, forward and backward."""
    _parts(check, "stmoe-d16", benchmark_cases.experts, 2 if check.dry else 64)


def attention(check: Check) -> None:
    """Attention kernels, forward and backward."""
    _parts(check, "d16", benchmark_cases.attention, 2 if check.dry else 64)


def tokenizer(check: Check) -> None:
    """The published tokenizer's size: images to tokens and back, in float32."""
    bench = Bench(published("d16", check.dry), check.mesh(), check.device, 2 if check.dry else 64)
    model, images = bench.assembly().tokenizer(), bench.images().require_images()
    with torch.no_grad():
        tokens = model.tokens(model.encode(images))
        works = {"encode": lambda: model.tokens(model.encode(images)), "decode": lambda: model.decode(tokens)}
        for what, work in works.items():
            free()
            check.figure("tokenizer", what, **_values(_timed(work, 0.1 if check.dry else 2.0), len(images)))
