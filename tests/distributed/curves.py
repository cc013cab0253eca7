"""Trains a small STMoE-VAR for some steps under a layout and returns its curve; used by the layout tests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.optimizer import ConstantSchedule, OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.data.batch import Batch
from megavar.generators.base import Stage
from megavar.generators.var import VAR
from megavar.parallel import seeds, topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import initialize_parameters
from megavar.parallel.sharded import Sharding
from megavar.recipes.base import Pass, Recipe
from megavar.recipes.next_scale import NextScale
from megavar.recipes.terms.base import Term, heads_of, taps_of
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.loops import BatchesOf, EngineLoop, bare_loop

STEPS = 10
BATCH = 8
CLIPPING = 0.5
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
CLASSES, VOCABULARY, CODE = 10, 64, 8
SCALES = (1, 2, 3)


RankBatches = Callable[[int, int, int, int], Sequence[Batch]]
"""(step, data rank, data ranks, micro-batch size) -> this rank's micro-batches."""


@dataclass(frozen=True)
class Curve:
    """What a layout has to reproduce."""

    loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    load: Any
    """Tokens per block, scale and expert over all steps; None for a dense model."""


@dataclass(frozen=True)
class Setup:
    """A layout and everything else that must not change the curve."""

    world_size: int = 1
    stage: int = 1
    micro_batch_size: int | None = None
    offload: tuple[str, ...] = ()
    precision: str = "fp32"
    backend: str = "megatron"
    dense: bool = False
    router: str = "scale_token"
    shared: bool = False
    head_chunks: int = 1
    sharded: bool = False
    """Built for ZeRO-3 block by block."""
    taps: tuple[str, ...] = ()
    parallel: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        layout = "-".join(f"{name}{value}" for name, value in self.parallel.items() if value)
        extras = [*(f"offload_{part}" for part in self.offload), self.precision if self.precision != "fp32" else ""]
        extras += [self.backend if self.backend != "megatron" else "", "dense" if self.dense else ""]
        extras += [self.router if self.router != "scale_token" else ""]
        extras += [f"micro{self.micro_batch_size}" if self.micro_batch_size else "", "shared" if self.shared else ""]
        extras += ["sharded" if self.sharded else ""]
        extras += [f"head_chunks{self.head_chunks}" if self.head_chunks > 1 else ""]
        return "-".join(filter(None, [f"ranks{self.world_size}", layout, f"zero{self.stage}", *extras]))


def generator_config(setup: Setup) -> VARConfig:
    experts = ExpertsChoice.make(
        router=setup.router, number=4, top_k=2, balance_coefficient=0.05, backend=setup.backend
    )
    return VARConfig(
        depth=4,
        width=32,
        heads=4,
        classes=CLASSES,
        drop_path=0.2,
        label_drop=0.2,
        initial_gamma=0.3,  # the default starts the blocks so close to the identity that errors inside would not show
        initial_head=1.0,
        shared_adaptive_norm=setup.shared,
        head_chunks=setup.head_chunks,
        experts=None if setup.dense else experts,
    )


def tokenizer() -> MultiScaleVQ:
    config = MultiScaleVQConfig(
        scales=SCALES, vocabulary_size=VOCABULARY, code_dimension=CODE, base_channels=8, channel_multipliers=(1, 1),
        residual_blocks=1, norm_groups=4,
    )  # fmt: skip
    model = MultiScaleVQ(config)

    def fill(name: str, value: torch.Tensor, generator: torch.Generator) -> None:
        value.normal_(generator=generator).mul_(0.5)

    initialize_parameters(model, fill, seed=3)
    return model


def batches(step: int, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[Batch]:
    """This rank's micro-batches of a step: tokens, labels and sample numbers from counters."""
    share = BATCH // data_size
    first = step * BATCH + data_rank * share
    for start in range(first, first + share, micro_batch_size):
        ids = torch.arange(start, start + micro_batch_size)
        length = sum(side * side for side in SCALES)
        tokens = seeds.random_bits(1, "tokens", ids[:, None], torch.arange(length)) % VOCABULARY
        labels = seeds.random_bits(1, "labels", ids) % CLASSES
        yield Batch(None, labels, ids, torch.zeros_like(ids), tokens=tokens)


def build(
    setup: Setup, mesh: topology.Topology, kind: type[NextScale] = NextScale, terms: Sequence[Term] = ()
) -> NextScale:
    """The recipe with this rank's part of the generator; ``kind`` is another class of the same arguments."""
    config, space = generator_config(setup), TokenSpace.of_scales(SCALES, VOCABULARY, CODE, image_side=6)
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    shard = Sharding({"zero_optimization": zero_section(setup)}, dtype) if setup.sharded else None
    chunks = [
        VAR(
            config,
            space,
            parallel=mesh.config,
            stage=Stage.split(4, mesh.config, mesh.pipeline_rank, chunk),
            dtype=dtype,
            seed=11,
            taps=(*setup.taps, *taps_of(terms)),
            heads=heads_of(terms, space),
            shard=shard,
        )
        for chunk in range(mesh.config.virtual_pipeline)
    ]
    generator = chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)
    return kind(
        MEPAConfig(tokenizer_weights="unused"), generator, tokenizer(), classes=config.classes,
        label_drop=config.label_drop, seed=5, terms=terms,
    )  # fmt: skip


def optimizer() -> OptimizerConfig:
    return OptimizerConfig(
        lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, gradient_clipping=CLIPPING, schedule=ConstantSchedule()
    )


def zero_section(setup: Setup) -> dict[str, Any]:
    """Of the DeepSpeed JSON."""
    zero: dict[str, Any] = {"stage": setup.stage}
    if setup.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # the default keeps all of a model this small on every rank
    for part in setup.offload:
        zero[f"offload_{part}"] = {"device": "cpu"}
    return zero


def engine_loop(
    setup: Setup, recipe: Recipe, mesh: topology.Topology, batches_of: BatchesOf | None = None
) -> EngineLoop:
    """Trains ``recipe`` under ``setup``, on :func:`batches` unless others are given."""
    size = setup.micro_batch_size or BATCH // mesh.data
    given = batches_of or (lambda step: list(batches(step, mesh.data_rank, mesh.data, size)))
    return EngineLoop(
        recipe, mesh, given, optimizer=optimizer(), zero=zero_section(setup), global_batch_size=BATCH,
        micro_batch_size=size, precision=setup.precision,
    )  # fmt: skip


def bare_values(
    recipe: Recipe, steps: int = STEPS, batches_of: BatchesOf | None = None
) -> list[dict[str, Any]]:
    """Metrics of every step, from one process without an engine."""
    given = batches_of or (lambda step: list(batches(step, 0, 1, BATCH)))
    return bare_loop(recipe, "generator", given, steps, optimizer=optimizer())


BuildKind = Callable[[Setup, topology.Topology, str], Recipe]
"""(layout, mesh, kind) -> a recipe."""


DrawnOf = Callable[[Any], torch.Tensor]
"""Inputs after a rollout -> the tokens that it drew, int64 [B, L]."""


def watch_draws(recipe: Any, drawn_of: DrawnOf) -> list[dict[int, list[list[int]]]]:
    """For each step, filled while ``recipe`` trains: what each of its rollouts drew, by the key of the sample."""
    found: list[dict[int, list[list[int]]]] = []
    passes = recipe.passes

    def watched(module: str, step: int) -> list[Pass]:
        found.extend({} for _ in range(step + 1 - len(found)))
        return [
            replace(one, following=one.following and partial(noted, one.following, step))
            for one in passes(module, step)
        ]

    def noted(following: Callable[[Any, Any], Any], step: int, inputs: Any, carried: torch.Tensor) -> Any:
        after = following(inputs, carried)
        for key, ids in zip(inputs.model.sample_keys.tolist(), drawn_of(after).tolist(), strict=True):
            found[step].setdefault(key, []).append(ids)
        return after

    recipe.passes = watched
    return found


def engine_runs(
    setup: Setup,
    kinds: Iterable[str],
    build_kind: BuildKind,
    batches_of: RankBatches,
    steps: int,
    drawn_of: DrawnOf | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank: metrics of every step, for each kind of recipe; ``drawn``: see :func:`watch_draws`."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    size, result = setup.micro_batch_size or BATCH // mesh.data, {}
    for kind in kinds:
        recipe = build_kind(setup, mesh, kind)
        drawn = [] if drawn_of is None else watch_draws(recipe, drawn_of)
        loop = engine_loop(setup, recipe, mesh, lambda step: batches_of(step, mesh.data_rank, mesh.data, size))
        result[kind] = with_draws([loop.step(step) for step in range(steps)], drawn)
        loop.engines["generator"].destroy()
    return result


def bare_runs(
    setup: Setup,
    kinds: Iterable[str],
    build_kind: BuildKind,
    batches_of: RankBatches,
    steps: int,
    drawn_of: DrawnOf | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The reference for :func:`engine_runs`: one process, no engine."""
    mesh, result = topology.initialize(ParallelConfig(), environment()), {}
    for kind in kinds:
        recipe = build_kind(setup, mesh, kind)
        drawn = [] if drawn_of is None else watch_draws(recipe, drawn_of)
        result[kind] = with_draws(bare_values(recipe, steps, lambda step: batches_of(step, 0, 1, BATCH)), drawn)
    return result


def with_draws(steps: list[dict[str, Any]], drawn: Sequence[Any]) -> list[dict[str, Any]]:
    """Metrics with what was drawn beside them."""
    return [metrics | ({"drawn": drawn[number]} if drawn else {}) for number, metrics in enumerate(steps)]


def compare_draws(by_rank: Sequence[dict[str, list[dict[str, Any]]]], expected: dict[str, list[dict[str, Any]]]) -> int:
    """Every rank drew for its samples what one process drew for them; together they have all. Returns how many ids."""
    compared = 0
    for kind, steps in expected.items():
        for number, step in enumerate(steps):
            seen = set()
            for values in by_rank:
                own = values[kind][number]["drawn"]
                assert own == {key: step["drawn"][key] for key in own}, f"{kind}, step {number}"
                seen |= own.keys()
                compared += sum(len(ids) for rollouts in own.values() for ids in rollouts)
            assert seen == step["drawn"].keys(), f"{kind}, step {number}: samples are missing"
    return compared


def engine_curve(setup: Setup) -> Curve:
    """Runs on every rank: the curve under ``setup``."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    loop = engine_loop(setup, build(setup, mesh), mesh)
    return _curve([loop.step(step) for step in range(STEPS)])


def bare_curve(setup: Setup) -> Curve:
    """The reference: one process, no engine."""
    return _curve(bare_values(build(setup, topology.initialize(ParallelConfig(), environment()))))


def _curve(values: list[dict[str, Any]]) -> Curve:
    loads = [value.get("load") for value in values]
    return Curve(
        loss=tuple(value["loss"] for value in values),
        gradient_norm=tuple(float(value["gradient_norm"]) for value in values),
        load=None if loads[0] is None else torch.stack(loads).sum(0).tolist(),
    )
