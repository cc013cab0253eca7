"""SAR's hybrid with history: what it decodes with a cache is what it was trained to predict."""

import pytest
import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.config.generators.scalear import ScaleARConfig
from megavar.config.procedures.masked_scales import MaskedScalesSampling
from megavar.config.tokenizers.llamagen_vq import LlamaGenVQConfig
from megavar.generators.scalear import ScaleAR, ScaleARInputs
from megavar.sampling.procedures.masked_scales import MaskedScales, schedule
from megavar.tokenizers.llamagen_vq import LlamaGenVQ

pytestmark = pytest.mark.usefixtures("single_process")
SIDES = (2, 3, 4)


def model_of(history: str) -> ScaleAR:
    config = ScaleARConfig(depth=2, width=16, heads=2, classes=3, position_side=8, history=history, initial_gamma=1.0)
    model = ScaleAR(config, tokenizer().config.space, seed=1).eval()
    with torch.no_grad():
        model.head.projection.weight.mul_(50)
    return model


def tokenizer() -> LlamaGenVQ:
    torch.manual_seed(0)
    return LlamaGenVQ(
        LlamaGenVQConfig(
            scales=SIDES, vocabulary_size=32, code_dimension=8, latent_channels=8, base_channels=8, norm_groups=8,
            channel_multipliers=(1,),
        )
    )  # fmt: skip


def trained(model: ScaleAR, pyramid: LlamaGenVQ, ids: Tensor, labels: Tensor) -> Tensor:
    """Teacher-forced logits of the maps after the first, with the first one hidden."""
    features = torch.cat([pyramid.embed(ids[:, :4]), pyramid.inputs(ids)], 1)
    with torch.no_grad():
        masked = torch.ones(len(ids), 4, dtype=torch.bool)
        return model(ScaleARInputs(labels, features, masked=masked)).prediction[:, 4:]


@pytest.mark.parametrize(("history", "equal"), [("causal", True), ("released", False), ("none", False)])
def test_only_the_corrected_variant_decodes_what_it_was_trained_on(history: str, equal: bool) -> None:
    model, pyramid, labels = model_of(history), tokenizer(), torch.tensor([0, 2])
    settings = MaskedScalesSampling(guidance=0.0, first_steps=2, top_k=0, top_p=0.0)
    steps = list(MaskedScales(settings).steps(model, pyramid, Condition(labels, classes=3), None))
    ids = torch.cat([step.ids for step in steps if step.finished], 1)
    decoded = torch.cat([step.logits for step in steps[2:]], 1)
    difference = (decoded - trained(model, pyramid, ids, labels)).abs().max() / decoded.abs().max()
    assert (difference < 1e-5) == equal, difference


def test_a_later_map_sees_history_but_never_the_masked_one() -> None:
    pyramid, labels = tokenizer(), torch.tensor([1])
    ids = torch.randint(32, (1, 29), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, :4] = (other[:, :4] + 1) % 32  # reaches the last map through the second one's rows alone
    for history, reached in (("none", False), ("causal", True)):
        model = model_of(history)
        rows = [trained(model, pyramid, one, labels)[:, 9:] for one in (ids, other)]
        assert torch.allclose(*rows, atol=1e-6) != reached


def test_the_first_map_has_a_token_per_step_at_least() -> None:
    for tokens, steps in ((16, 8), (16, 4), (16, 16), (4, 8)):
        pairs = schedule(tokens, steps)
        assert pairs[0][0] == 0 and pairs[-1][1] == tokens and len(pairs) == steps
        assert all(after > known or known == tokens for known, after in pairs)
