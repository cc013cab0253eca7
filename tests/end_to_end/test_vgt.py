"""VGT's demonstration with a few steps of each part: the folder of a small vision-language model, the autoencoder's two
stages, the language model that learns to draw, its score and its picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="the vlm extra is not installed")

from safetensors.torch import load_file

from megavar.commands.train import train
from megavar.config.loading import load_config
from megavar.errors import ExitCode
from megavar.parallel.environment import environment
from tests.distributed.harness import run_ranks
from tools import small_vlm

pytestmark = pytest.mark.end_to_end
FEW = [
    "run.requires=[]", "train.steps=2", "train.global_batch_size=4", "optimizer.schedule.warmup_steps=1",
    "evaluation.reconstruction.images=8",
]  # fmt: skip
LITTLE = ["evaluation.suite.per_tag=1", "evaluation.suite.per_prompt=2", "sampling.steps=2"]


def demonstrate(folder: Path) -> list[int]:
    """Runs on one rank."""
    vlm, codes = folder / "vlm", []
    text = [f"data.text.tokenizer={vlm}", f"train.initial_weights.path={vlm}"]
    assert small_vlm.main(["configs/vgt/demo.yaml", *text, "--steps", "2", "--batch", "4"]) == 0
    own = {
        "demo_ae_stage1": [f"recipe.encoder_weights={vlm}"],
        "demo_ae_stage2": [f"recipe.encoder_weights={vlm}", f"train.initial_weights.path={folder / 'demo_ae_stage1'}"],
        "demo": [f"recipe.tokenizer_weights={folder / 'demo_ae_stage2'}", *text, *LITTLE],
    }
    for name, words in own.items():
        config = load_config(f"configs/vgt/{name}.yaml", [f"run.directory={folder / name}", *FEW, *words])
        codes.append(int(train(config, environment())))
    return codes


def test_the_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert run_ranks(1, demonstrate, tmp_path) == [[ExitCode.FINISHED] * 3]
    understood = json.loads((tmp_path / "vlm" / small_vlm.RECORD).read_text())
    assert 0 < understood["loss"] < 10 and understood["right"] <= 1
    names = load_file(tmp_path / "vlm/model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}
    (scores,) = (tmp_path / "demo").glob("scores-shapes-*.json")
    found = json.loads(scores.read_text())
    assert {"right scenes", "other captions", "tokenizer's ceiling", "untrained model"} <= found["baselines"].keys()
    assert found["baselines"]["tokenizer's ceiling"]["strict"] < found["baselines"]["right scenes"]["strict"] == 1
    grids = list((tmp_path / "demo/generated").glob("*/grid.png"))
    assert grids and Image.open(grids[0]).height > 64
