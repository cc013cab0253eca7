"""A raster VQGAN trained on the spot, and RAR on its tokens: train, draw, reconstruct, through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import TINY_TOKENIZER, megavar

pytestmark = pytest.mark.end_to_end


def test_rar_learns_the_tokens_of_a_vqgan(tmp_path: Path) -> None:
    demo = "configs/demo/maskgit_vqgan.yaml"
    trained = megavar("train", demo, *TINY_TOKENIZER, f"run.directory={tmp_path / 'vqgan'}")
    assert trained.code == 0, trained.output
    rar = (
        f"run.directory={tmp_path / 'rar'}", "run.name=rar", "train.steps=4", "train.checkpoint.interval=4",
        f"recipe={{name: rear, tokenizer_weights: {tmp_path / 'vqgan'}}}", "logging.samples_interval=4",
        "generator={name: rar, depth: 2, width: 32, heads: 4, classes: 60}", "optimizer.schedule.warmup_steps=2",
        "sampling={procedure: raster, number: 8, chunk_size: 4, guidance: 4.0}",
    )  # fmt: skip
    trained = megavar("train", demo, *rar)
    assert trained.code == 0, trained.output
    drawn = megavar("sample", demo, *rar)
    assert drawn.code == 0, drawn.output
    (chunk, *_) = sorted((tmp_path / "rar").rglob("*.npz"))
    with np.load(chunk) as arrays:
        tokens = next(arrays[name] for name in arrays.files if arrays[name].ndim == 2)
    assert tokens.dtype == np.uint16 and tokens.shape == (4, 64) and tokens.max() < 128
    scored = megavar("evaluate", demo, *TINY_TOKENIZER, f"run.directory={tmp_path / 'vqgan'}",
                     "evaluation.reconstruction={images: 32, chunk_size: 16}")  # fmt: skip
    assert scored.code == 0, scored.output
    results = [json.loads(path.read_text()) for path in (tmp_path / "vqgan").rglob("*.json") if "recon" in path.name]
    assert any("psnr" in json.dumps(result) for result in results), scored.output
