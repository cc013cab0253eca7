"""SAR on a small FlexVAR with random lists of scales; used by the layout tests."""

from dataclasses import replace
from typing import Any

import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.flexvar import FlexVARConfig
from megavar.config.recipes.sar import SARConfig
from megavar.config.recipes.student_forcing import StudentForcingConfig
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.llamagen_vq import LlamaGenVQConfig
from megavar.generators.base import Stage
from megavar.generators.flexvar import FlexVAR
from megavar.parallel import seeds, topology
from megavar.parallel.logical import initialize_parameters
from megavar.recipes.sar import SAR
from megavar.recipes.student_forcing import StudentForcing, StudentInputs
from megavar.tokenizers.llamagen_vq import LlamaGenVQ
from tests.distributed import curves
from tests.distributed.curves import Setup

STEPS, LAST, LABEL_DROP = 3, 5, 0.2
LISTS = {"name": "flexvar", "fine_from": 3, "coarse": 0, "fine": 1, "dropped": []}
KINDS: dict[str, dict[str, Any]] = {
    "released": {"rollout": {"top_k": 20}},
    "Eq. 10": {"student_scales": "all", "context": "prefix", "target": "soft", "rollout": {"sampled": False}},
    "one by one": {"student_scales": "all", "target": "most_likely", "rollout": {"guidance": 1.0}},
}
"""What each run changes in SAR's defaults."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "full": {"rollout": {"guidance": 2.0, "top_k": 20}},
    "interleave": {"schedule": "interleave", "rollout": {"sampled": False}},
    "hybrid": {"schedule": "hybrid", "true_until": 2},
    "alternate": {"schedule": "alternate"},
}
"""What each run changes in the defaults of naive student forcing."""


def tokenizer(scales: tuple[int, ...] = (1, 2, 3, LAST)) -> LlamaGenVQ:
    config = LlamaGenVQConfig(
        scales=scales, vocabulary_size=curves.VOCABULARY, code_dimension=curves.CODE, latent_channels=8,
        base_channels=8, channel_multipliers=(1,), norm_groups=4,
    )  # fmt: skip
    model = LlamaGenVQ(config)
    initialize_parameters(model, lambda name, value, generator: value.normal_(generator=generator), seed=3)
    return model.requires_grad_(False)


def generator(setup: Setup, mesh: topology.Topology, space: TokenSpace, **options: Any) -> torch.nn.Module:
    """This rank's part of a small FlexVAR; ``options``: its taps and heads."""
    experts = ExpertsChoice.make(router=setup.router, number=4, top_k=2, balance_coefficient=0.05)
    config = FlexVARConfig(
        depth=4, width=32, heads=4, classes=curves.CLASSES, drop_path=0.2, label_drop=LABEL_DROP, initial_gamma=0.3,
        initial_head=1.0, position_side=8, experts=None if setup.dense else experts,
    )  # fmt: skip
    chunks = [
        FlexVAR(
            config,
            space,
            parallel=mesh.config,
            stage=Stage.split(4, mesh.config, mesh.pipeline_rank, chunk),
            seed=11,
            **options,
        )
        for chunk in range(mesh.config.virtual_pipeline)
    ]
    return chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)


def build(setup: Setup, mesh: topology.Topology, kind: str) -> Any:
    frozen = tokenizer()
    trained = generator(setup, mesh, frozen.space)
    place = {"classes": curves.CLASSES, "label_drop": LABEL_DROP, "seed": 5}
    common = {"tokenizer_weights": "unused", "scale_lists": LISTS}
    if kind in SCHEDULES:
        return StudentForcing(StudentForcingConfig(**common, **SCHEDULES[kind]), trained, frozen, **place)
    return SAR(SARConfig(**common, student_weight=0.5, **KINDS[kind]), trained, frozen, **place)


def batches(step: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[Any]:
    """As ``curves.batches``, with latents instead of tokens."""
    found = []
    for batch in curves.batches(step, data_rank, data_size, micro_batch_size):
        place = torch.arange(curves.CODE * LAST * LAST).view(curves.CODE, LAST, LAST)
        values = seeds.uniform(2, "latents", batch.sample_ids[:, None, None, None], place)
        found.append(replace(batch, tokens=None, latents=(values - 0.5).float()))
    return found


def engine_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank: metrics of every step, for each kind."""
    return curves.engine_runs(setup, [*KINDS, *SCHEDULES], build, batches, STEPS, drawn_of)


def bare_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """The reference: one process, no engine."""
    return curves.bare_runs(setup, [*KINDS, *SCHEDULES], build, batches, STEPS, drawn_of)


def drawn_of(inputs: Any) -> torch.Tensor:
    """The tokens that rollouts have drawn, true ones elsewhere."""
    return inputs.mixed if isinstance(inputs, StudentInputs) else inputs.drawn
