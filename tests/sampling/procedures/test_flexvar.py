"""FlexVAR's guidance beyond the scales that golden vectors reach."""

import pytest
import torch

from megavar.config.procedures.flexvar import FlexVARSampling
from megavar.sampling.procedures.flexvar import FlexVARDecoding


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((1, 2, 3, 4, 5), [0, 0.25, 0.5, 0.75, 1]),
        (tuple(range(1, 13)), [k / 9 for k in range(12)]),  # beyond ten scales more than the guidance, as released
        ((1, 2, 16, 20), [0, 1 / 3, 2 / 3, 1]),
        ((1, 20, 24, 32), [0, 1, 1, 1]),  # sides beyond the largest of training: the guidance itself
    ],
)
def test_how_guidance_rises(sides, expected):
    procedure = FlexVARDecoding(FlexVARSampling(guidance=2.0, guidance_rise=9, largest=16))
    one, zero = torch.ones(1), torch.zeros(1)
    strengths = [float(procedure.guide(one, zero, k, sides)) - 1 for k in range(len(sides))]
    assert strengths == pytest.approx([2 * share for share in expected])
    llamagen = FlexVARDecoding(FlexVARSampling(guidance=2.0, guidance_form="llamagen"))
    assert [float(llamagen.guide(3 * one, one, k, sides)) for k in range(2)] == [5, 5]  # u + 2 (c - u)
