"""FlowAR on random latents and on random images; used by the layout tests."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.flowar import FlowARConfig
from megavar.config.recipes.flowar import FlowARRecipeConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Stage
from megavar.generators.flowar import FlowAR
from megavar.parallel import seeds, topology
from megavar.recipes.flowar import NextScaleFlow
from tests.distributed import curves
from tests.distributed.curves import Setup

STEPS, CHANNELS, SCALES, PATCH = 3, 3, (1, 2, 3), 2
SPACE = TokenSpace("latent", (SCALES[-1],), SCALES[-1] ** 2, None, CHANNELS * PATCH**2, image_side=SCALES[-1] * 4)
KINDS: dict[str, dict[str, Any]] = {
    "spatial": {},
    "cross": {"head_cross_attention": True, "scale_inputs": "image", "supervision": "image"},
}


class Averages:
    """A tokenizer of vectors that needs no package: latents are means of 2 x 2 pixels, with a known deviation."""

    space, stride = SPACE, 2 * PATCH

    def encode(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 2)

    def tokens(self, latents: Tensor) -> Tensor:
        return self.pack(latents)

    def sample(self, latents: Tensor, normal: Tensor) -> Tensor:
        return self.pack(latents) + 0.1 * normal

    def decode(self, tokens: Tensor) -> Tensor:
        return F.interpolate(self.unpack(tokens), scale_factor=2).clamp(-1, 1)

    def unpack(self, tokens: Tensor) -> Tensor:
        side = int(tokens.shape[1] ** 0.5)
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), PATCH)

    def pack(self, maps: Tensor) -> Tensor:
        return F.pixel_unshuffle(maps, PATCH).flatten(2).transpose(1, 2)


def choice(setup: Setup, kind: str) -> FlowARConfig:
    experts = ExpertsChoice.make(router=setup.router, number=4, top_k=2, balance_coefficient=0.05)
    return FlowARConfig(
        scales=SCALES, width=48, encoder_depth=2, decoder_depth=2, heads=4, head_depth=2, head_width=256, rope_side=4,
        head_cross_attention=kind == "cross", scale_inputs=KINDS[kind].get("scale_inputs", "latent"),
        classes=curves.CLASSES, dropout=0.1, label_drop=0.2,
        experts=None if setup.dense else experts,
    )  # fmt: skip


def build(setup: Setup, mesh: topology.Topology, kind: str) -> NextScaleFlow:
    config = choice(setup, kind)
    chunks = [
        FlowAR(config, SPACE, parallel=mesh.config, seed=11,
               stage=Stage.split(4, mesh.config, mesh.pipeline_rank, chunk))
        for chunk in range(mesh.config.virtual_pipeline)
    ]  # fmt: skip
    generator = chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)
    supervision = KINDS[kind].get("supervision", "latent")
    return NextScaleFlow(
        FlowARRecipeConfig(tokenizer_weights="unused", supervision=supervision), generator, Averages(),
        classes=config.classes, label_drop=config.label_drop, seed=5,
    )  # fmt: skip


def batches(step: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[Any]:
    """As ``curves.batches``, with images instead of tokens."""
    found = []
    for batch in curves.batches(step, data_rank, data_size, micro_batch_size):
        place = torch.arange(CHANNELS * SPACE.image_side**2).view(CHANNELS, SPACE.image_side, SPACE.image_side)
        values = seeds.uniform(2, "images", batch.sample_ids[:, None, None, None], place)
        found.append(replace(batch, tokens=None, images=(2 * values - 1).float()))
    return found


def engine_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank: metrics of every step, for each kind."""
    return curves.engine_runs(setup, KINDS, build, batches, STEPS)


def bare_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """The reference: one process, no engine."""
    return curves.bare_runs(setup, KINDS, build, batches, STEPS)
