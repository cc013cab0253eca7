"""Weights go from a checkpoint to the authors' layout and to safetensors, and from there into a run that trains."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megavar.config.checkpoint import CheckpointConfig
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.training.checkpoint import Checkpointer, ModuleState, find_checkpoint, load_weights, master, read_weights
from megavar.training.checkpoint.weights import write_weights
from tests.checkpoint.conftest import assert_same
from tests.distributed.curves import Setup, build, engine_loop
from tests.distributed.harness import run_ranks
from tools.convert_checkpoint import main

DENSE = Setup(2, 1, dense=True, parallel={"tensor": 2})
EXPERTS = Setup(2, 1, parallel={"expert": 2})


def configuration(experts):
    """The configuration of the models of tests/distributed/curves.py."""
    generator = {"name": "var", "depth": 4, "width": 32, "heads": 4, "classes": 10, "label_drop": 0.2, "drop_path": 0.2}
    if experts:
        generator["experts"] = {"number": 4, "top_k": 2}
    return {
        "run": {"name": "test"},
        "recipe": {"name": "mepa", "tokenizer_weights": "unused"},
        "tokenizer": {"name": "multiscale_vq", "scales": [1, 2, 3], "vocabulary_size": 64, "code_dimension": 8,
                      "base_channels": 8, "channel_multipliers": [1, 1], "residual_blocks": 1, "norm_groups": 4},
        "generator": generator,
        "train": {"steps": 4, "global_batch_size": 8},
    }  # fmt: skip


def _save(setup, root):
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    engine = engine_loop(setup, build(setup, mesh), mesh).engines["generator"]
    average = [tensor.detach() * 2 for tensor in master.master_tensors(engine.deepspeed)]
    modules = {"generator": ModuleState(engine.deepspeed, average)}
    Checkpointer(root / "checkpoints", CheckpointConfig()).save(7, modules, {"step": 7})


def _continue(setup, root):
    """What a run does that starts from converted weights; its first loss."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    recipe = build(setup, mesh)
    for parameter in recipe.generator.parameters():
        parameter.data.fill_(7.0)
    loop = engine_loop(setup, recipe, mesh)
    engine = loop.engines["generator"]
    loop.step(5)  # leaves moments and step counts that must be forgotten
    state = Checkpointer(root / "checkpoints", CheckpointConfig()).load({"generator": ModuleState(engine.deepspeed)})
    moments = master.moments(engine.deepspeed)
    assert not any(tensor.any() for tensors in moments.values() for tensor in tensors)
    assert set(master.get_steps(engine.deepspeed)) == {0}
    recipe.collect()
    return state, loop.step(0)["loss"]


def _first_loss(setup):
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    return engine_loop(setup, build(setup, mesh), mesh).step(0)["loss"]


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def run(request, tmp_path_factory):
    """A run directory, its setup, and its configuration file."""
    root, setup = tmp_path_factory.mktemp("run"), EXPERTS if request.param else DENSE
    run_ranks(2, _save, setup, root)
    (root / "config.yaml").write_text(yaml.safe_dump(configuration(request.param)))
    return root, setup


@pytest.mark.distributed
def test_through_safetensors_into_a_run_that_trains(run, tmp_path):
    root, setup = run
    file, started = tmp_path / "weights.safetensors", tmp_path / "started"
    assert main([str(root), str(file)]) == 0
    assert_same(load_file(file), read_weights(root))
    assert main([str(file), str(started), "--config", str(root / "config.yaml")]) == 0
    assert_same(read_weights(started), read_weights(root))
    state, loss = run_ranks(2, _continue, setup, started)[0]
    assert state == {"step": 0, "data_step": 0, "recovery": {"skipped": 0}}
    assert loss == run_ranks(2, _first_loss, setup)[0]


@pytest.mark.distributed
def test_average_and_type_are_chosen(run, tmp_path):
    root, _ = run
    assert main([str(root), str(tmp_path / "average.safetensors"), "--ema", "--dtype", "bfloat16"]) == 0
    expected = {name: (2 * value).bfloat16() for name, value in read_weights(root).items()}
    assert_same(load_file(tmp_path / "average.safetensors"), expected)


@pytest.mark.distributed
def test_through_the_authors_layout(run, tmp_path, capsys):
    root, setup = run
    file, started = tmp_path / "var.pth", tmp_path / "started"
    if not setup.dense:
        assert main([str(root), str(file)]) == 2
        assert "VAR with experts has no counterpart" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
        return
    assert main([str(root), str(file)]) == 0
    published = torch.load(file, weights_only=True)
    assert published["blocks.3.attn.mat_qkv.weight"].shape == (96, 32)
    assert published["attn_bias_for_masking"].shape == (1, 1, 14, 14)
    assert main([str(file), str(started), "--config", str(root / "config.yaml")]) == 0
    assert_same(read_weights(started), read_weights(root))


def test_a_tokenizer_goes_to_the_authors_layout(tmp_path):
    from megavar.tokenizers.multiscale_vq import MultiScaleVQ

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration(False)))
    config = load_config(tmp_path / "config.yaml").tokenizer
    tokenizer = MultiScaleVQ(config)
    tensors = {name: value for name, value in tokenizer.state_dict().items() if value.is_floating_point()}
    write_weights(tmp_path / "checkpoints", "autoencoder", tensors, {})
    assert main([str(tmp_path), str(tmp_path / "vae.pth")]) == 0
    other = MultiScaleVQ(config)
    other.load_reference(tmp_path / "vae.pth")
    for name, parameter in tokenizer.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], parameter), name
    load_weights(other, tmp_path, "autoencoder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/none", "x.safetensors"], "none does not exist"),
        (["{root}", "{root}/x.bin"], r"ends neither in \.safetensors"),
        (["{root}/x.pth", "{root}/new"], "Which model is"),
        (["{root}/x.safetensors", "{root}/new", "--config", "{root}/other.yaml"], "does not fit the configuration"),
        (["{root}/x.safetensors", "{root}", "--config", "{root}/config.yaml"], "already holds checkpoints"),
        (["{root}", "{root}/y.safetensors", "--module", "critic"], "holds no module 'critic'; it holds generator"),
        (["{root}", "{root}/y.safetensors", "--ema"], "holds no average"),
    ],
)
def test_mistakes_are_explained(arguments, message, tmp_path, capsys):
    import re

    from tools.convert_checkpoint import _expected_shapes

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration(False)))
    other = configuration(False)
    other["generator"]["depth"] = 5
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    shapes = _expected_shapes(load_config(tmp_path / "config.yaml"))
    write_weights(tmp_path / "checkpoints", "generator", {n: torch.zeros(s) for n, s in shapes.items()}, {"step": 0})
    main([str(tmp_path), str(tmp_path / "x.safetensors")])
    torch.save({}, tmp_path / "x.pth")
    before = sorted(tmp_path.rglob("*"))
    assert main([argument.format(root=tmp_path) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before
    assert find_checkpoint(tmp_path)[1].step == 0
