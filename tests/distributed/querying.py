"""QueryAR on random latents and texts; used by the layout tests."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.query_ar import QueryARConfig
from megavar.config.language_model import LanguageModelConfig
from megavar.config.recipes.vgt import VGTConfig
from megavar.config.terms.base import TermChoice
from megavar.config.token_space import TokenSpace
from megavar.data.text import Text
from megavar.generators.base import Stage
from megavar.generators.query_ar import QueryAR
from megavar.parallel import seeds, topology
from megavar.parallel.logical import initialize_parameters
from megavar.recipes.terms.base import heads_of, taps_of
from megavar.recipes.terms.repa import FlowAlignment
from megavar.recipes.vgt import QueryFlow
from tests.distributed import curves
from tests.distributed.curves import Setup

STEPS, TEXT, VOCABULARY, SIDE, CHANNELS, DEPTH = 3, 6, 40, 3, 4, 4
SPACE = TokenSpace("latent", (SIDE,), SIDE * SIDE, None, CHANNELS, image_side=SIDE * 4)
FEATURES = 384
"""Channels of the teacher that REPA's section names; its features come from a cache."""
KINDS: dict[str, dict[str, Any]] = {
    "batch": {},
    "sample": {"permutation": "sample", "time_shift_towards": "data", "times": "uniform"},
}
EMPTY = Text(torch.tensor([[1, 2, 0, 0, 0, 0]]), torch.tensor([[True, True, False, False, False, False]]))


class Latents:
    """A tokenizer of vectors whose latents are its tokens, row by row."""

    def __init__(self, space: TokenSpace = SPACE) -> None:
        self.space = space

    def tokens(self, latents: Tensor) -> Tensor:
        return latents

    def normalize(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def choice(setup: Setup, groups: int = 2) -> QueryARConfig:
    experts = ExpertsChoice.make(router=setup.router, number=4, top_k=2, balance_coefficient=0.05)
    return QueryARConfig(
        language_model=LanguageModelConfig(
            vocabulary=VOCABULARY, width=32, depth=DEPTH, heads=4, groups=groups, feed_forward=48,
            experts=None if setup.dense else experts,
        ),
        query_sides=(16, 16), head=DenoisingMLPConfig(width=24, depth=2), text_length=TEXT, image_start=(7, 8),
        caption_drop=0.3,
    )  # fmt: skip


def random_values(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Nothing begins at zero or as the identity, so that errors anywhere show."""
    deviation = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1
    value.normal_(std=deviation, generator=generator).add_(1.0 if "norm" in name else 0.0)


def terms(kind: str) -> list[Any]:
    """REPA on the flow head, on one kind."""
    if kind != "sample":
        return []
    section = TermChoice.make(
        name="flow_alignment", projection={"hidden": [8]},
        teacher={"name": "dinov3", "size": "small", "weights": "none"},
    )  # fmt: skip
    return [FlowAlignment(section, None, width=24, depth=2)]


def build(setup: Setup, mesh: topology.Topology, kind: str, space: TokenSpace = SPACE) -> QueryFlow:
    config, more = choice(setup), terms(kind)
    chunks = [
        QueryAR(config, space, parallel=mesh.config, seed=11, heads=heads_of(more, space), taps=taps_of(more),
                stage=Stage.split(DEPTH, mesh.config, mesh.pipeline_rank, chunk))
        for chunk in range(mesh.config.virtual_pipeline)
    ]  # fmt: skip
    for chunk in chunks:
        initialize_parameters(chunk, random_values, seed=4)
    generator = chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)
    recipe = QueryFlow(
        VGTConfig(tokenizer_weights="unused", **KINDS[kind]), generator, Latents(space), classes=0,
        label_drop=config.caption_drop, seed=5, terms=more,
    )  # fmt: skip
    recipe.empty = EMPTY
    return recipe


def batches(step: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[Any]:
    """As ``curves.batches``, with latents and texts of different lengths instead of tokens."""
    found = []
    for batch in curves.batches(step, data_rank, data_size, micro_batch_size):
        keys = batch.sample_ids[:, None]
        lengths = 2 + seeds.random_bits(3, "length", keys) % (TEXT - 1)
        mask = torch.arange(TEXT) < lengths
        ids = torch.where(mask, seeds.random_bits(3, "text", keys, torch.arange(TEXT)) % VOCABULARY, 0)
        latents = seeds.normal_tokens(3, "latents", batch.epochs, batch.sample_ids, SPACE.length, CHANNELS)
        features = seeds.normal_tokens(3, "features", batch.epochs, batch.sample_ids, 4, FEATURES)
        found.append(replace(batch, tokens=None, latents=latents, features=features, text_ids=ids, text_mask=mask))
    return found


def engine_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank: metrics of every step, for each kind."""
    return curves.engine_runs(setup, KINDS, build, batches, STEPS)


def bare_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """The reference: one process, no engine."""
    return curves.bare_runs(setup, KINDS, build, batches, STEPS)
