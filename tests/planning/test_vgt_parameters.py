"""QueryAR's configurations have the numbers of parameters that VGT's sizes come from, counted on the meta device."""

from pathlib import Path

import pytest
import torch

from megavar.assembly import build_generator
from megavar.config.loading import load_config

ROOT = Path(__file__).parents[2]
COUNTS = {
    "queryar_internvl3_1b": (652.6, 357.898112, 150.6),
    "queryar_internvl3_2b": (1709.9, 1310.340608, 151.6),
    "queryar_qwen25vl_3b_8": (1097.0 + 4.3, 616.617984, 152.4),
    "queryar_qwen25vl_3b_21": (2099.0 + 4.3, 1618.61888, 152.4),
}
"""Millions: all that is trained; the language model's blocks and norm; the flow head. Notes count Qwen's without the
projections of latents and hidden states (4.3 M)."""


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts_are_those_of_the_paper(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / f"configs/vgt/{name}.yaml")
    model = build_generator(config, None, dtype=torch.float32, device=torch.device("meta"))
    counted = {part: value.numel() / 1e6 for part, value in model.named_parameters()}
    total, blocks, head = COUNTS[name]
    assert sum(counted.values()) == pytest.approx(total, abs=0.1)
    inside = sum(value for part, value in counted.items() if part.startswith(("blocks.", "norm.")))
    assert inside == pytest.approx(blocks, abs=1e-6)
    assert sum(value for part, value in counted.items() if part.startswith("head.")) == pytest.approx(head, abs=0.05)
