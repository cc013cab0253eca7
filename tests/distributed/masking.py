"""MAR on random latents, asked for by class and by text; used by the layout tests."""

from typing import Any

from megavar.config.denoising_mlp import DenoisingMLPConfig
from megavar.config.generators.mar import MARConfig
from megavar.config.recipes.mar import MARRecipeConfig
from megavar.generators.base import Stage
from megavar.generators.mar import MAR
from megavar.parallel import topology
from megavar.parallel.logical import initialize_parameters
from megavar.recipes.mar import MaskedDiffusion
from tests.distributed import curves
from tests.distributed.curves import Setup
from tests.distributed.querying import EMPTY, SPACE, TEXT, VOCABULARY, Latents, batches, random_values

KINDS: dict[str, dict[str, Any]] = {
    "class": {"classes": curves.CLASSES, "buffer": 3},
    "text": {"classes": None, "text_vocabulary": VOCABULARY, "buffer": TEXT},
}
STEPS = 3


def build(setup: Setup, mesh: topology.Topology, kind: str) -> MaskedDiffusion:
    choice = MARConfig(
        width=32, encoder_depth=2, decoder_depth=2, heads=4, head=DenoisingMLPConfig(width=24, depth=2),
        label_drop=0.3, **KINDS[kind],
    )  # fmt: skip
    stage = Stage.split(4, mesh.config, mesh.pipeline_rank, 0)
    generator = MAR(choice, SPACE, parallel=mesh.config, seed=11, stage=stage)
    initialize_parameters(generator, random_values, seed=4)
    share = "batch" if kind == "class" else "sample"
    recipe = MaskedDiffusion(
        MARRecipeConfig(tokenizer_weights="unused", noise_draws=2, posterior="mean", masked_share=share), generator,
        Latents(), classes=choice.classes or 0, label_drop=choice.label_drop, seed=5,
    )  # fmt: skip
    recipe.empty = None if kind == "class" else EMPTY
    return recipe


def engine_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank: metrics of every step, for each kind."""
    return curves.engine_runs(setup, KINDS, build, batches, STEPS)


def bare_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """The reference: one process, no engine."""
    return curves.bare_runs(setup, KINDS, build, batches, STEPS)


