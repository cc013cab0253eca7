"""Measures on the device at hand what plans otherwise assume; see :mod:`megavar.planning.calibration` for the result.

    matrix products at the shapes of a block's layers, grouped ones where there are experts, attention
    one block, forward and backward: the difference between a stage of three blocks and one of one
    the ends (embedding, head, loss), the tokenizer's encoder, launches, copies, all-reduce over all ranks

On a GPU it takes one to two minutes, most of it to compile attention; on a CPU the sizes of micro-batches are small.
"""

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavar.config.choice import resolve
from megavar.config.generators.base import GeneratorChoice
from megavar.config.root import Config
from megavar.errors import ConfigError
from megavar.parallel.environment import choose_kernels, device_name
from megavar.planning.calibration import Calibration, ModelPace
from megavar.planning.device_rates import (
    all_reduce_seconds,
    copy_rate,
    launch_seconds,
    product_seconds,
    seconds_of,
)
from megavar.planning.fake_model import build, loss_of
from megavar.planning.measure import Request, measure, tokenizer_cost
from megavar.transformer.kernels import KERNELS, Visibility, choose_kernel

BLOCKS = 2
"""By which two stages differ whose times tell that of a block."""
IMAGES = {"cuda": (1, 16, 64), "cpu": (1, 4)}
LARGE_PRODUCT = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}
ALL_REDUCE_BYTES = {"cuda": (2**20, 2**24, 2**28), "cpu": (2**20, 2**22)}


def calibrate(config: Config, device: torch.device, say: Callable[[str], None] = lambda text: None) -> Calibration:
    """Measure ``device`` with the generator of ``config``. Collective over all ranks, each on its own device.

    Args:
        say: is told what is measured next.

    Raises:
        ConfigError: the configuration has no generator.
        UnmeasurableError: its FLOPs cannot be counted.
    """
    if config.generator is None:
        raise ConfigError(
            f"Run {config.run.name} trains a tokenizer, and calibration times the blocks of a generator. Give the "
            f"configuration of a generator."
        )
    choose_kernels(config.train.precision, config.train.tf32, config.train.deterministic)
    kind, precision = device.type, config.train.precision
    say("matrix products, copies, launches")
    side = LARGE_PRODUCT[kind]
    rates = {
        name: 2 * side**3 / _product_seconds(device, dtype, side, tf32=name == "tf32")
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("tf32", torch.float32))
    }
    products, attention, pace = _model(config.generator, config, device, say)
    world = dist.get_world_size() if dist.is_initialized() else 1
    reduced = [
        {"bytes": float(size), "seconds": all_reduce_seconds(device, size)}
        for size in ALL_REDUCE_BYTES[kind] if world > 1
    ]  # fmt: skip
    return Calibration(
        device=device_name(),
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        memory=_memory(device),
        bf16=rates["bf16"],
        tf32=rates["tf32"],
        fp32=rates["fp32"],
        bandwidth=copy_rate(device, COPY_BYTES[kind]),
        launch_seconds=launch_seconds(device),
        products=products,
        attention=attention,
        models=[ModelPace(run=config.run.name, precision=precision, **pace)],
        all_reduce=reduced,
        ranks=world,
    )


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _product_seconds(device: torch.device, dtype: torch.dtype, side: int, *, tf32: bool) -> float:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return product_seconds(device, dtype, side, side, side)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _model(
    choice: GeneratorChoice, config: Config, device: torch.device, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Products, attention, and the fields of a :class:`ModelPace`."""
    space, precision = config.tokenizer.space, config.train.precision
    request = Request(choice, space, precision=precision)
    depth = choice.limits(space).depth
    say("the model's operations")
    (cost,) = measure([request])
    images = IMAGES[device.type]
    with device:
        small = build(request, 0, 1, first=True, last=True)
        say("its layers")
        products, attention = _products(small, images[-1]), _attention(small, images[-1])
        say("its blocks")
        one = [_pass_seconds(small, space, count) for count in images]
        del small
        more = min(BLOCKS, depth - 1)
        several = one
        if more:
            large = build(request, 0, 1 + more, first=True, last=True)
            several = [_pass_seconds(large, space, count) for count in images]
            del large
    # Without a second block the ends count as none of theirs: all of the time is the block's.
    blocks = [max(b - a, 0.05 * a) / more for a, b in zip(one, several)] if more else one
    ends = [max(a - block, 0.0) for a, block in zip(one, blocks)]
    whole = depth * blocks[-1] + ends[-1]
    return products, attention, {
        "generator": choice.model_dump(mode="json"), "images": list(images), "block_seconds": blocks,
        "ends_seconds": ends, "flops_per_second": cost.model_flops * images[-1] / whole,
        "tokenizer_flops_per_second": _tokenizer_rate(config, device, say),
    }  # fmt: skip


def _pass_seconds(model: Any, space: Any, images: int) -> float:
    """A forward and a backward pass of ``images`` images, with drop path and label drop as in training."""
    inputs, device = model.example(images), next(model.parameters()).device

    def both() -> None:
        loss_of(model(inputs), space).backward()
        model.routing.clear()
        for parameter in model.parameters():
            parameter.grad = None

    return seconds_of(both, device)


def _products(model: Any, images: int) -> list[dict[str, Any]]:
    """The different matrix products of the first block with all tokens; of stacked experts, their grouped products."""
    block = next(iter(model.blocks.values()))
    found: dict[tuple[int, int, int, int], nn.Parameter] = {}
    layout = model.sequence(model.example(1)).layout
    tokens = images * layout.tokens
    copies = 1 if model.experts is None else model.experts.copies(layout.sizes)
    for name, weight in block.named_parameters():
        if weight.dim() == 2 and ".modulation." not in f".{name}" and min(weight.shape) >= 16:
            found.setdefault((1, tokens, weight.shape[1], weight.shape[0]), weight)
        elif weight.dim() == 3:
            found.setdefault((weight.shape[0], round(tokens * copies), weight.shape[2], weight.shape[1]), weight)
    result = []
    for (groups, rows, inner, columns), weight in found.items():
        seconds = _grouped_seconds(weight, rows) if groups > 1 else _plain_seconds(weight, rows)
        result.append({
            "groups": groups, "rows": rows, "inner": inner, "columns": columns, "seconds": seconds,
            "flops_per_second": 2 * rows * inner * columns / seconds,
        })  # fmt: skip
    return result


def _plain_seconds(weight: Tensor, rows: int) -> float:
    return product_seconds(weight.device, weight.dtype, rows, weight.shape[1], weight.shape[0])


@torch.no_grad()
def _grouped_seconds(weight: nn.Parameter, rows: int) -> float:
    """Of ``rows`` rows spread evenly over the stacked weights [E, out, in]."""
    from megavar.transformer.moe.experts import _grouped_mm

    groups, _, inner = weight.shape
    tokens = torch.randn(rows, inner, dtype=weight.dtype)
    ends = (torch.arange(1, groups + 1) * rows // groups).to(torch.int32)
    turned = weight.transpose(1, 2)
    return seconds_of(lambda: _grouped_mm(tokens, turned, offs=ends), weight.device)


def _attention(model: Any, images: int) -> list[dict[str, Any]]:
    """The kernel that training takes, forward and backward, on one block's queries, keys and values."""
    config, layout = model.config, model.sequence(model.example(1)).layout
    seen, device = Visibility(layout), next(model.parameters()).device
    name = choose_kernel("auto", seen, device)
    q, upstream = (
        torch.randn(images, config.num_attention_heads, layout.length, config.kv_channels, dtype=config.params_dtype)
        for _ in range(2)
    )
    k, v = (torch.randn(images, config.num_query_groups, *q.shape[2:], dtype=q.dtype) for _ in range(2))
    for part in (q, k, v):
        part.requires_grad_()
    seconds = seconds_of(lambda: KERNELS[name].function(q, k, v, seen, 0.125).backward(upstream), device)
    return [{"kernel": name, "images": images, "heads": q.shape[1], "length": layout.length, "seconds": seconds}]


def _tokenizer_rate(config: Config, device: torch.device, say: Callable[[str], None]) -> float:
    """Operations per second of the frozen tokenizer's encoder."""
    say("the tokenizer")
    space, images = config.tokenizer.space, IMAGES[device.type][-2]
    tokenizer = resolve(config.tokenizer)(config.tokenizer).eval().requires_grad_(False).to(device)
    pixels = torch.rand(images, space.image_channels, space.image_side, space.image_side, device=device) * 2 - 1
    seconds = seconds_of(lambda: tokenizer.tokens(tokenizer.encode(pixels)), device)
    return tokenizer_cost(config.tokenizer).encode_flops * images / seconds
