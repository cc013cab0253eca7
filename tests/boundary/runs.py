"""Configurations of the foreign family, and what several tests do with them."""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from megavar.config.loading import load_config
from megavar.config.root import Config
from megavar.data.build import build_source
from megavar.data.reading import stored_images
from megavar.data.transforms import Unchanged
from tests.boundary.toy.choices import LineTokenizerConfig
from tests.boundary.toy.tokenizer import LineLayout, LineTokenizer

ROOT = Path(__file__).parents[2]
SHARP = {"router": "toy_sharp", "number": 4, "top_k": 2, "balance_coefficient": 0.05, "sharpness": 3.0}
MEPA = {"router": "scale_token", "number": 4, "top_k": 2, "balance_coefficient": 0.05}
TERM = {"name": "toy_brightness", "block": 1, "weight": 0.5}


def write_tokenizer(path: Path) -> Path:
    """Fit the tokenizer on the embedded digits and write it in its "public" layout."""
    choice = LineTokenizerConfig()
    source = build_source(load_config(ROOT / "configs/quickstart/tokenizer.yaml").data)
    images, _ = stored_images(source, Unchanged(16), range(len(source)))
    tokenizer = LineTokenizer(choice).fit(images.float() / 127.5 - 1)
    tensors = {name: value.detach() for name, value in tokenizer.named_parameters()}
    published = LineLayout(choice, choice.space).export(tensors)
    save_file({name: value.contiguous() for name, value in published.items()}, path)
    return path


def write_run(path: Path, tokenizer: Path, **sections: Any) -> Path:
    """A run of the foreign family; ``sections`` are merged over it."""
    tree: dict[str, Any] = {
        "plugins": ["tests.boundary.toy.choices"],
        "run": {"name": path.stem, "directory": str(path.with_suffix(""))},
        "data": {"source": {"name": "digits"}, "image_size": 16},
        "tokenizer": {"name": "toy_line"},
        "recipe": {"name": "toy_self_taught", "tokenizer_weights": str(tokenizer), "terms": [TERM]},
        "generator": {"name": "toy_causal", "experts": SHARP},
        "deepspeed": str(ROOT / "configs/deepspeed/zero1.json"),
        "train": {"steps": 8, "global_batch_size": 16, "checkpoint": {"interval": 4}, "cpu_threads": 1},
        "optimizer": {"lr": 0.003, "schedule": {"name": "constant"}, "gradient_clipping": 0.5},
        "sampling": {"procedure": "toy_line", "chunk_size": 16, "number": 64},
        "evaluation": {"suite": {"name": "toy_class_means"}},
    }
    for name, section in sections.items():
        tree[name] = tree[name] | section if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(tree))
    return path


def load(path: Path, *overrides: str) -> Config:
    """As the commands do, plugins and all."""
    return load_config(path, overrides)


def tensors_of(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """All logical tensors of the generator in a checkpoint."""
    from megavar.training.checkpoint.weights import read_weights

    return read_weights(directory / "checkpoints" / f"step-{step:08d}", "generator")
