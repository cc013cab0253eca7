"""The same training run on images, on a cache of their tokens, and on a cache of their features."""

import json
from pathlib import Path

import pytest
import torch

from megavar.commands.train import train
from megavar.config.loading import decode
from megavar.config.root import Config
from megavar.errors import ExitCode
from megavar.parallel.environment import environment
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.distributed.harness import run_ranks
from tests.tokenizers.public_files import save_public
from tools import cache_tokens

pytestmark = pytest.mark.distributed
IMAGES = {"name": "photographs", "length": 24, "short_side": 128}


def configure(folder, name, source) -> Config:
    tree = {
        "run": {"name": name, "directory": str(folder / name)},
        "recipe": {"name": "mepa", "tokenizer_weights": str(folder / "tokenizer.pth")},
        "generator": {"name": "var", "depth": 1, "width": 16, "heads": 2, "classes": 10},
        "tokenizer": {
            "name": "multiscale_vq", "scales": [1, 2, 4], "vocabulary_size": 64, "code_dimension": 8,
            "base_channels": 8, "channel_multipliers": [1, 1, 2], "residual_blocks": 1, "norm_groups": 4,
            "lowest_level_attention": False, "middle_attention": False,
        },
        "data": {"source": source, "transform": {"name": "ten_crop"}, "image_size": 16},
        "optimizer": {"lr": 3e-2},
        "train": {"steps": 6, "global_batch_size": 8},
        "logging": {"interval": 1, "samples_interval": None, "wandb": {"mode": "disabled"}},
        "evaluation": {"after_training": False},
    }  # fmt: skip
    return decode(tree, Config, "test")


def losses(config: Config, ranks: int) -> list[float]:
    assert run_ranks(ranks, _train, config) == [ExitCode.FINISHED] * ranks
    lines = (Path(config.run.path) / "metrics.jsonl").read_text().splitlines()
    return [values["loss"] for line in lines if "loss" in (values := json.loads(line))]


def _train(config: Config) -> ExitCode:
    return train(config, environment())


def test_images_tokens_and_features_train_alike(tmp_path):
    caches = {
        content: {"name": "cache", "path": str(tmp_path / f"{content}.cache"), "views": 10, "content": content}
        for content in ("tokens", "latents")
    }
    configs = {name: configure(tmp_path, name, source | {"images": IMAGES}) for name, source in caches.items()}
    torch.manual_seed(0)
    save_public(MultiScaleVQ(configs["tokens"].tokenizer), tmp_path / "tokenizer.pth")
    for name, config in configs.items():
        path = tmp_path / f"{name}.json"
        path.write_text(config.model_dump_json())  # JSON is YAML
        assert cache_tokens.main([str(path), "--rows-per-part", "10"]) == ExitCode.FINISHED
    expected = losses(configure(tmp_path, "images", IMAGES), 1)
    assert len(set(expected)) == 6
    assert losses(configs["tokens"], 2) == pytest.approx(expected, abs=1e-5)
    assert losses(configs["latents"], 1) == pytest.approx(expected, abs=0.03)  # half precision tips some tokens
