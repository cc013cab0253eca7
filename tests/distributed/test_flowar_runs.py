"""Runs of FlowAR on a KL-VAE: resumed bitwise, cached, sampled the same on any number of ranks, planned, exported."""

import json

import pytest
import torch
import yaml

pytest.importorskip("diffusers", reason="the package diffusers is not installed (pip install 'megavar[vlm]')")

from safetensors.torch import save_file

from megavar.assembly import Assembly
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.tokenizers.kl_vae import KLVAEConfig
from megavar.data.batch import Batch
from megavar.data.build import build_source
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.planning.plan import plan
from megavar.recipes.flowar import NextScaleFlow
from megavar.tokenizers.kl_vae import KLVAE
from megavar.tokenizers.kl_vae.published import LDMLayout
from megavar.training.checkpoint.weights import tensors_of
from tests.boundary.runs import ROOT
from tests.boundary.runs import tensors_of as trained
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.whole_runs import chunks, samples_of, train_until
from tools import cache_tokens, convert_checkpoint

pytestmark = pytest.mark.distributed
VAE = {
    "name": "kl_vae", "image_side": 16, "latent_channels": 2, "base_channels": 8, "channel_multipliers": [1, 2],
    "residual_blocks": 1, "norm_groups": 4, "patch": 2, "scaling": 1.0,
}  # fmt: skip
EXPERTS = {"router": "scale_token", "number": 4, "top_k": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random autoencoder as a file of latent diffusion."""
    config = KLVAEConfig(**VAE)
    model = KLVAE(config)
    model.initialize(torch.Generator().manual_seed(2))
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    state = LDMLayout(config, config.space).export(tensors_of(model))
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def write_run(path, weights, **sections):
    tree = {
        "run": {"name": path.stem, "directory": str(path.with_suffix(""))},
        "data": {"source": {"name": "digits"}, "image_size": 16},
        "tokenizer": VAE,
        "recipe": {"name": "flowar", "tokenizer_weights": str(weights)},
        "generator": {
            "name": "flowar", "scales": [1, 2, 4], "width": 48, "encoder_depth": 1, "decoder_depth": 1, "heads": 4,
            "head_depth": 1, "head_width": 64, "rope_side": 4, "classes": 10, "experts": EXPERTS,
        },
        "deepspeed": str(ROOT / "configs/deepspeed/zero1.json"),
        "train": {"steps": 6, "global_batch_size": 16, "checkpoint": {"interval": 3}, "cpu_threads": 1},
        "optimizer": {"lr": 0.003, "schedule": {"name": "constant"}},
        "sampling": {"procedure": "flowar", "steps": 4, "chunk_size": 8, "number": 24, "guidance": 2.0},
        "logging": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = tree[name] | section
    path.write_text(yaml.safe_dump(tree))
    return path


def go(path, die_at=None):
    """Runs on every rank: train to the end, or to a sudden death while step ``die_at`` is prepared."""
    return train_until(NextScaleFlow, load_config(path), die_at)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("run") / "whole.yaml", weights)
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    return path


def test_killed_and_resumed_bitwise(finished, weights, tmp_path):
    path = write_run(tmp_path / "killed.yaml", weights)
    with pytest.raises(RankFailure, match="exit code -9"):
        run_ranks(1, go, path, 5)
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    whole, resumed = trained(finished.with_suffix(""), 6), trained(tmp_path / "killed", 6)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_samples_are_the_same_bytes_on_one_and_two_ranks(finished, tmp_path):
    found = []
    for ranks in (1, 2):
        drawn = samples_of(finished, ranks, tmp_path / f"of-{ranks}")
        found.append(chunks(drawn))
        assert json.loads((drawn / "manifest.json").read_text())["space"]["kind"] == "latent"
    assert len(found[0]) == 3 and found[0] == found[1]


def test_posteriors_are_cached(finished, weights, tmp_path):
    """A cache of means and log variances trains as its images do, but for half precision; images it cannot give."""
    source = {"name": "cache", "path": str(tmp_path / "cache"), "content": "latents", "images": {"name": "digits"}}
    path = write_run(tmp_path / "cached.yaml", weights, data={"source": source})
    assert cache_tokens.main([str(path)]) == ExitCode.FINISHED
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    curves = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in (finished.with_suffix(""), tmp_path / "cached")
    ]
    assert curves[0] and curves[1] == pytest.approx(curves[0], rel=1e-2)
    images = write_run(
        tmp_path / "images.yaml", weights, data={"source": source},
        recipe={"name": "flowar", "tokenizer_weights": str(weights), "supervision": "image"},
    )  # fmt: skip
    with pytest.raises(RankFailure, match=r"needs images, but data\.source is a cache"):
        run_ranks(1, go_loudly, images)


def go_loudly(path):
    """Prepare a batch of latents; errors reach the test."""
    config = load_config(path)
    mesh = topology.initialize(ParallelConfig(), environment())
    recipe = Assembly(config, build_source(config.data), torch.device("cpu"), mesh).recipe()
    ids = torch.arange(2)
    recipe.prepare(Batch(None, ids, ids, ids, latents=torch.zeros(2, 4, 8, 8)), 0)


def test_it_is_planned_and_exported(finished, tmp_path):
    predicted = plan(load_config(finished), 2, "h200", None, gpus_per_node=2, images=1000)
    weights = trained(finished.with_suffix(""), 6)
    assert predicted.workload.parameters.total == sum(value.numel() for value in weights.values())
    file = tmp_path / "weights.safetensors"
    assert convert_checkpoint.main([str(finished.with_suffix("")), str(file), "--layout", "megavar"]) == 0
