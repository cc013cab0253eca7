"""QueryAR's configurations: parameters that VGT's sizes come from, on the meta device; plans at the paper's batch."""

from pathlib import Path

import pytest
import torch

from megavar.assembly import build_generator
from megavar.config.loading import load_config
from megavar.planning.plan import plan

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


def test_plans_at_the_papers_batch_and_longest_sequence(monkeypatch):
    """1024 rows: 511 of text, the beginning of an image, two per latent. Costs follow from the sizes."""
    monkeypatch.chdir(ROOT)
    longest = ["data.text.length=511", "generator.text_length=511", "sampling.tokens_per_step=16"]
    config = load_config("configs/vgt/queryar_qwen25vl_3b_21.yaml", longest)
    plans = [plan(config, gpus, "h200", images=36_000_000, suggestions=0) for gpus in (8, 64)]
    for found in plans:
        assert found.fits and found.steps == 100_000 and found.prediction.layout.global_batch == 256
    assert plans[1].seconds < plans[0].seconds / 6
    width, rows, latents = 2048, 1024, 256
    block = 2 * width * (width + 256) + 3 * width * 11008
    forward = 21 * (2 * rows * block + 4 * width * rows * (rows + 1) // 2)
    forward += 2 * latents * (152.4e6 + width**2)
    assert plans[0].workload.train_flops == pytest.approx(3 * forward, rel=0.01)
    # drawing reads every row of the image with and without caption, latents together with their queries; 30 flow steps
    drawn = 2 * (2 * (512 + 3 * latents) * 21 * block + 2 * 30 * latents * 152.4e6)
    assert plans[0].sample_flops == pytest.approx(drawn, rel=0.05)
