"""Runs of QueryAR and of MAR on captions: resumed bitwise, sampled the same on any number of ranks; QueryAR planned,
exported, and begun with a folder of a language model."""

import functools
import json
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("diffusers", reason="the package diffusers is not installed (pip install 'megavar[diffusers]')")
pytest.importorskip("tokenizers", reason="the vlm extra is not installed")

from safetensors.torch import load_file, save_file

from megavar.beginning import warn_of_differences
from megavar.config.loading import load_config
from megavar.config.tokenizers.kl_vae import KLVAEConfig
from megavar.data.text_training import SPECIAL
from megavar.errors import ExitCode
from megavar.parallel.logical import initialize_parameters
from megavar.planning.plan import plan
from megavar.recipes.kl_vae import initial_value
from megavar.recipes.mar import MaskedDiffusion
from megavar.recipes.vgt import QueryFlow
from megavar.tokenizers.kl_vae import KLVAE
from megavar.tokenizers.kl_vae.published import LDMLayout
from megavar.training.checkpoint.weights import tensors_of
from tests.boundary.runs import ROOT
from tests.boundary.runs import tensors_of as trained
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.whole_runs import chunks, samples_of, train_until
from tools import convert_checkpoint

pytestmark = pytest.mark.distributed
VAE = {
    "name": "kl_vae", "image_side": 32, "latent_channels": 2, "base_channels": 8, "channel_multipliers": [1, 1, 2, 2],
    "residual_blocks": 1, "norm_groups": 4, "patch": 1, "scaling": 1.0,
}  # fmt: skip
MODEL = {"vocabulary": 400, "width": 32, "depth": 2, "heads": 4, "groups": 2, "feed_forward": 48}
FRESH = ["image.", "condition.", "head."]
MAR = {
    "recipe": {"name": "mar"},
    "generator": {
        "name": "mar", "width": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 4, "classes": None,
        "text_vocabulary": 400, "buffer": 24, "head": {"width": 24, "depth": 1},
    },
    "sampling": {"procedure": "mar", "iterations": 4, "steps": 3, "chunk_size": 4, "number": 12, "guidance": 2.0,
                 "weights": "ema"},
}  # fmt: skip
DATA = {
    "source": {"name": "shapes", "length": 64, "test_length": 32}, "image_size": 32,
    "text": {"length": 24, "vocabulary": 300},
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A random autoencoder as a file of latent diffusion, and a random language model as Hugging Face's folder."""
    folder, config = tmp_path_factory.mktemp("parts"), KLVAEConfig(**VAE)
    model = KLVAE(config)
    initialize_parameters(model, initial_value, seed=2)
    state = LDMLayout(config, config.space).export(tensors_of(model))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "vae.safetensors")
    width, inner, small = MODEL["width"], MODEL["feed_forward"], MODEL["width"] // MODEL["heads"] * MODEL["groups"]
    shapes = {"embed_tokens.weight": (MODEL["vocabulary"], width), "norm.weight": (width,)}
    for block in range(3):  # one more than is kept
        rows = {"self_attn.q_proj": width, "self_attn.k_proj": small, "self_attn.v_proj": small}
        for name, size in rows.items():
            shapes |= {f"layers.{block}.{name}.weight": (size, width), f"layers.{block}.{name}.bias": (size,)}
        more = {"self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        more |= {"mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"layers.{block}.{name}.weight": shape for name, shape in more.items()}
    torch.manual_seed(1)
    (folder / "model").mkdir()
    weights = {f"model.{name}": torch.randn(shape) * 0.1 + (len(shape) == 1) for name, shape in shapes.items()}
    save_file(weights, folder / "model/model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": width, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "num_hidden_layers": 3}
    (folder / "model/config.json").write_text(json.dumps(sizes))
    return folder


def write_run(path, parts, **sections):
    tree: dict[str, Any] = {
        "run": {"name": path.stem, "directory": str(path.with_suffix(""))},
        "data": DATA,
        "tokenizer": VAE,
        "recipe": {"name": "vgt", "tokenizer_weights": str(parts / "vae.safetensors"), "permutation": "sample"},
        "generator": {
            "name": "query_ar", "language_model": MODEL, "query_sides": [6, 6], "head": {"width": 24, "depth": 1},
            "text_length": 24, "image_start": [SPECIAL.index("<img>")],
        },
        "deepspeed": str(ROOT / "configs/deepspeed/zero1.json"),
        "train": {
            "steps": 6, "global_batch_size": 8, "checkpoint": {"interval": 3}, "cpu_threads": 1,
            "ema": {"decay": 0.9, "start_step": 2},
            "initial_weights": {"path": str(parts / "model"), "layout": "qwen2", "fresh": FRESH},
        },
        "optimizer": {"lr": 0.003, "schedule": {"name": "constant"}},
        "sampling": {
            "procedure": "query_ar", "steps": 3, "chunk_size": 4, "number": 12, "guidance": 2.0, "weights": "ema",
            "tokens_per_step": 2,
        },
        "logging": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = tree[name] | section
    path.write_text(yaml.safe_dump(tree))
    return path


def write_mar(path, parts):
    """The same of MAR, from random weights."""
    write_run(path, parts)
    tree = yaml.safe_load(path.read_text())
    del tree["train"]["initial_weights"]
    kept = {"tokenizer_weights": tree["recipe"]["tokenizer_weights"]}
    path.write_text(yaml.safe_dump(tree | MAR | {"recipe": MAR["recipe"] | kept}))
    return path


WRITERS = {QueryFlow: write_run, MaskedDiffusion: write_mar}


def go(path, die_at=None, recipe=QueryFlow):
    """Runs on every rank: train to the end, or to a sudden death while step ``die_at`` is prepared."""
    return train_until(recipe, load_config(path), die_at)


@pytest.fixture(scope="module")
def run_of(parts, tmp_path_factory):
    """The finished run of a recipe."""

    @functools.cache
    def make(recipe):
        path = WRITERS[recipe](tmp_path_factory.mktemp("run") / "whole.yaml", parts)
        assert run_ranks(1, go, path, None, recipe) == [ExitCode.FINISHED]
        return path

    return make


@pytest.fixture
def finished(run_of):
    return run_of(QueryFlow)


@pytest.mark.parametrize("recipe", WRITERS)
def test_killed_and_resumed_bitwise(run_of, recipe, parts, tmp_path):
    path = WRITERS[recipe](tmp_path / "killed.yaml", parts)
    with pytest.raises(RankFailure, match="exit code -9"):
        run_ranks(1, go, path, 5, recipe)
    assert run_ranks(1, go, path, None, recipe) == [ExitCode.FINISHED]
    whole, resumed = trained(run_of(recipe).with_suffix(""), 6), trained(tmp_path / "killed", 6)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("recipe", WRITERS)
def test_samples_are_the_same_bytes_on_one_and_two_ranks(run_of, recipe, tmp_path):
    found = []
    for ranks in (1, 2):
        drawn = samples_of(run_of(recipe), ranks, tmp_path / f"of-{ranks}")
        found.append(chunks(drawn))
    assert len(found[0]) == 3 and found[0] == found[1]


def test_it_begins_with_the_folder_and_goes_back_to_its_names(finished, parts, tmp_path):
    path = write_run(tmp_path / "begun.yaml", parts, optimizer={"lr": 1e-12, "weight_decay": 0.0})
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    file = tmp_path / "weights.safetensors"
    assert convert_checkpoint.main([str(tmp_path / "begun"), str(file), "--layout", "vgt"]) == 0
    exported, given = load_file(file), load_file(parts / "model/model.safetensors")
    kept = {name: value for name, value in given.items() if not name.startswith("model.layers.2.")}
    for name, value in kept.items():
        torch.testing.assert_close(exported[f"lmm.language_model.{name}"], value, rtol=0, atol=1e-6)


def test_another_rotary_base_than_the_folders_is_named(finished, parts, caplog):
    config = load_config(finished, ["generator.language_model.rotary_base=10000.0"])
    warn_of_differences(config)
    assert "generator.language_model.rotary_base was 1000000.0 and is 10000.0 here" in caplog.text
    assert "depth" not in caplog.text


def test_it_is_planned(finished):
    predicted = plan(load_config(finished), 2, "h200", None, gpus_per_node=2, images=1000)
    weights = trained(finished.with_suffix(""), 6)
    assert predicted.workload.parameters.total == sum(value.numel() for value in weights.values())
