"""Training of TiTok, AliTok and VGT-AE under the real engine: the same for any ZeRO stage, ranks, micro-batches."""

from collections.abc import Callable

import pytest
import torch

from megavar.config.optimizer import OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.kl_vae import KLVAETrainingConfig
from megavar.config.recipes.tokenizer import CodebookConfig, TokenizerTrainingConfig
from megavar.config.recipes.vgt_ae import LatentNoiseConfig, VGTAETrainingConfig
from megavar.config.tokenizers.vgt_ae import InternViTConfig, SDVAEDecoderConfig, VGTAEConfig
from megavar.data.batch import Batch
from megavar.parallel.environment import environment
from megavar.parallel.topology import initialize
from megavar.recipes.base import Recipe
from megavar.recipes.tokenizer.kl_vae import KLVAETraining
from megavar.recipes.tokenizer.recipe import TokenizerTraining
from megavar.recipes.vgt_ae import VGTAETraining
from tests.distributed.harness import run_ranks
from tests.loops import EngineLoop
from tests.recipes.digit_images import digit_batch
from tests.recipes.line_tokenizers import BLURRED, CPU, TITOK, VECTORS, first_stage, staged

pytestmark = pytest.mark.distributed
GLOBAL_BATCH, STEPS = 8, 8
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, gradient_clipping=1.0, epsilon=1e-4)
"""Of gradients that are rounding alone (biases before norms) a smaller epsilon would make steps of full length."""
VGT_AE = VGTAEConfig(
    image_side=16, semantic_width=24, channels=8,
    decoder=SDVAEDecoderConfig(channels=(16, 16), layers=1, norm_groups=4),
    encoder=InternViTConfig(width=16, depth=2, heads=2, feed_forward=32, patch=4),
)  # fmt: skip
TOLERANCES = {"proxy": 1e-4, "decoder": 1e-3, "alitok": 1e-3, "vectors": 1e-3, "vgt_first": 1e-5, "vgt_second": 1e-5}
"""Relative, of metrics."""
RECIPES: dict[str, Callable[[], Recipe]] = {
    "proxy": lambda: first_stage(codebook=CodebookConfig(draw_from_data=False, revive_every=2, usage_decay=0.5)),
    "decoder": lambda: TokenizerTraining(
        TokenizerTrainingConfig(trained="decoder", adversarial=BLURRED.model_copy(update={"start_step": 3})),
        TITOK, 0, CPU,
    ),
    "alitok": lambda: staged(STEPS),
    "vectors": lambda: KLVAETraining(
        KLVAETrainingConfig(kl_weight=1e-3, adversarial=BLURRED.model_copy(update={"start_step": 5})), VECTORS, 0, CPU
    ),
    "vgt_first": lambda: VGTAETraining(
        VGTAETrainingConfig(adversarial=BLURRED.model_copy(update={"start_step": 3})),
        VGT_AE.model_copy(update={"normalize": False}), 0, CPU,
    ),
    "vgt_second": lambda: VGTAETraining(
        VGTAETrainingConfig(encoder="frozen", noise=LatentNoiseConfig(kind="uniform")), VGT_AE, 0, CPU
    ),
}  # fmt: skip
Curves = dict[str, tuple[list[dict[str, float]], dict[str, torch.Tensor]]]


def train(stage: int, micro_batches: int) -> Curves:
    """Of every recipe metrics per step, and the final weights of the tokenizer."""
    topology = initialize(ParallelConfig(), environment())
    size = GLOBAL_BATCH // topology.data // micro_batches

    def batches(step: int) -> list[Batch]:
        whole = digit_batch(GLOBAL_BATCH * step, GLOBAL_BATCH)
        return whole.split(size)[topology.data_rank * micro_batches :][:micro_batches]

    results = {}
    for name, build in RECIPES.items():
        recipe = build()
        loop = EngineLoop(
            recipe, topology, batches, optimizer=OPTIMIZER,
            zero={"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
            global_batch_size=GLOBAL_BATCH, micro_batch_size=size,
        )  # fmt: skip
        curve = [{key: value for key, value in loop.step(step).items() if isinstance(value, float)}
                 for step in range(STEPS)]  # fmt: skip
        results[name] = curve, whole(recipe, stage)
    return results


def whole(recipe: Recipe, stage: int) -> dict[str, torch.Tensor]:
    """All weights, gathered under ZeRO-3."""
    import deepspeed

    model = recipe.modules()["autoencoder"]
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def alone() -> Curves:
    return run_ranks(1, train, 1, 1)[0]


@pytest.mark.parametrize(("ranks", "stage", "micro_batches"), [(2, 1, 2), (2, 2, 1), (2, 3, 1)])
def test_every_layout_trains_the_same(alone: Curves, ranks: int, stage: int, micro_batches: int) -> None:
    for result in run_ranks(ranks, train, stage, micro_batches):
        for recipe, (curve, weights) in result.items():
            expected, others = alone[recipe]
            for step, (ours, theirs) in enumerate(zip(curve, expected, strict=True)):
                assert ours.keys() == theirs.keys(), f"{recipe} at step {step}"
                for name in ours:
                    near = pytest.approx(theirs[name], rel=TOLERANCES[recipe], abs=1e-6)
                    assert ours[name] == near, f"{recipe}: {name} at {step}"
            for name, value in weights.items():
                if recipe == "alitok" and name == "quantize.embedding.weight":
                    continue  # codes that moved to one vector are equidistant: the curves say that it does not matter
                torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4, msg=f"{recipe}: {name}")


def test_stages_change_nothing_but_their_own(alone: Curves) -> None:
    fresh = {name: dict(RECIPES[name]().modules()["autoencoder"].named_parameters()) for name in RECIPES}
    for recipe, begins in (("proxy", ("encoder.", "decoder.", "latent")), ("decoder", ("decoder.", "pixel_"))):
        changed = {name for name, value in alone[recipe][1].items() if not torch.equal(value, fresh[recipe][name])}
        assert changed and all(name.startswith((*begins, "quantize.")[: 4 if recipe == "proxy" else 2])
                               for name in changed)  # fmt: skip
    assert "strip_squared_error" in alone["alitok"][0][3] and "strip_squared_error" not in alone["alitok"][0][4]
    assert "discriminator" in alone["alitok"][0][2] and "discriminator" not in alone["alitok"][0][4]
