"""reAR under every layout is that of one process: RAR, with experts, and AliTok, with noise, dropout and its term."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.alitok import AliTokConfig
from megavar.config.generators.rar import RARConfig
from megavar.config.noise import NoiseConfig
from megavar.config.recipes.rear import RandomOrderConfig, ReARConfig
from megavar.config.terms.codebook_embedding import CodebookEmbeddingConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.generators.alitok import AliTok
from megavar.generators.base import Stage
from megavar.generators.rar import RAR
from megavar.parallel import seeds, topology
from megavar.recipes.rear import NextToken
from megavar.recipes.terms.base import heads_of
from megavar.recipes.terms.codebook_embedding import CodebookEmbedding
from tests.distributed import curves
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
STEPS, TOLERANCE, CLASSES, VOCABULARY = 4, 1e-5, 5, 24
SPACE = TokenSpace("grid", (3,), 9, VOCABULARY, 4, image_side=12)
METRICS = ("loss", "accuracy", "loss/codebook_embedding", "codebook_embedding/cosine/encoding",
           "codebook_embedding/cosine/decoding", "gradient_norm")  # fmt: skip
SIZES = {"depth": 4, "width": 32, "heads": 4, "feed_forward": 48, "classes": CLASSES, "dropout": 0.2}
KINDS = ("rar", "experts", "alitok")


class Codes:
    """A codebook; batches hold tokens."""

    space = SPACE
    vectors = torch.randn(VOCABULARY, SPACE.channels, generator=torch.Generator().manual_seed(7))

    def embed(self, ids: Tensor) -> Tensor:
        return self.vectors[ids]


def build(setup: Setup, mesh: topology.Topology, kind: str) -> NextToken:
    term = CodebookEmbedding(CodebookEmbeddingConfig(hidden=16, shared=False), Codes(), depth=4)
    experts = ExpertsChoice.make(router="scale_token", number=4, top_k=2) if kind == "experts" else None
    alitok = kind == "alitok"
    tied: Any = {"rar": None, "experts": "both", "alitok": "embedding"}[kind]
    choice: Any = (
        AliTokConfig(prefix_tokens=0, grid=3, tied_codebook=tied, target_positions=True, **SIZES) if alitok
        else RARConfig(experts=experts, tied_codebook=tied, **SIZES)
    )  # fmt: skip
    chunks = [
        (AliTok if alitok else RAR)(
            choice, SPACE, parallel=mesh.config, stage=Stage.split(4, mesh.config, mesh.pipeline_rank, chunk), seed=3,
            heads=heads_of([term], SPACE), codebook=Codes.vectors,
        )
        for chunk in range(mesh.config.virtual_pipeline)
    ]  # fmt: skip
    order = RandomOrderConfig(from_progress=0.25, until_progress=1.0)
    config = ReARConfig(tokenizer_weights="unused", noise=NoiseConfig(), random_order=order)
    generator = chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)
    return NextToken(config, generator, Codes(), classes=CLASSES, label_drop=0.2, seed=5, steps=8, terms=[term])


def batches(step: int, rank: int, size: int, micro: int) -> list[Batch]:
    places, made = torch.arange(SPACE.length), []
    for batch in curves.batches(step, rank, size, micro):
        tokens = seeds.random_bits(1, "raster", batch.sample_ids[:, None], places) % VOCABULARY
        made.append(replace(batch, tokens=tokens, labels=batch.labels % CLASSES))
    return made


def trained(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank."""
    return curves.engine_runs(setup, KINDS, build, batches, STEPS)


def trained_bare() -> dict[str, list[dict[str, Any]]]:
    return curves.bare_runs(Setup(), KINDS, build, batches, STEPS)


@functools.cache
def reference() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = run_ranks(1, trained_bare)[0]
    return found


LAYOUTS = [
    Setup(2, 0),
    Setup(2, 1),
    Setup(2, 2, micro_batch_size=2),
    Setup(2, 3, parallel={"recompute": "full"}),
    Setup(2, 0, parallel={"tensor": 2}),
    Setup(2, 1, parallel={"tensor": 2, "sequence": True}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2}),
]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_training_is_that_of_one_process(setup: Setup) -> None:
    for rank in run_ranks(setup.world_size, trained, setup):
        for kind, steps in reference().items():
            assert all(metric in steps[0] for metric in METRICS)
            for number, (found, step) in enumerate(zip(rank[kind], steps, strict=True)):
                for name in METRICS:
                    assert found[name] == pytest.approx(step[name], abs=TOLERANCE), f"{kind}, step {number}: {name}"
