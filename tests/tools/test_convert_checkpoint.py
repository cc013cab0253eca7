"""Weights go from a checkpoint to exports and public layouts, and back, without a bit being lost."""

import functools
import json
import re

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megavar.assembly import build_trained, weight_layouts
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import CheckpointError
from megavar.parallel import topology
from megavar.parallel.environment import Environment
from megavar.training.checkpoint import read_weights
from megavar.training.checkpoint.initial import InitialWeights, read_whole
from megavar.training.checkpoint.weights import fill, shapes_of
from megavar.weight_file import read_weights_file
from tests.checkpoint.conftest import assert_same
from tests.checkpoint.old_runs import unpack
from tests.checkpoint.written import write_weights
from tests.tokenizers.public_files import load_public
from tools.convert_checkpoint import main

DENSE = {
    "run": {"name": "test"},
    "recipe": {"name": "mepa", "tokenizer_weights": "unused"},
    "tokenizer": {"name": "multiscale_vq", "scales": [1, 2, 3], "vocabulary_size": 64, "code_dimension": 8,
                  "base_channels": 8, "channel_multipliers": [1, 1], "residual_blocks": 1, "norm_groups": 4},
    "generator": {"name": "var", "depth": 3, "width": 32, "heads": 4, "classes": 10},
    "train": {"steps": 4, "global_batch_size": 8},
}  # fmt: skip


def random_tensors(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


def build(config, device):
    """The whole model, in a process of its own kind: the tool, too, opens and closes one."""
    topology.initialize(ParallelConfig(), Environment(0, 1, 0, "single"))
    try:
        return build_trained(config, torch.device(device))
    finally:
        topology.shutdown()


def convert(*arguments):
    """Without tokenizers, which tests/library looks at."""
    return main([*map(str, arguments), "--without-tokenizer"])


@pytest.fixture
def dense(tmp_path):
    """A run directory with a dense VAR, whose recipe also trained a head."""
    return run_of(tmp_path / "dense", {})


def run_of(root, generator):
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(DENSE | {"generator": DENSE["generator"] | generator}))
    shapes = shapes_of(build(load_config(root / "config.yaml"), "meta"))
    write_weights(root / "checkpoints", "generator", random_tensors(shapes | {"heads.guidance.weight": (3, 5)}))
    return root


@pytest.fixture
def old(tmp_path):
    """Runs of real training: an STMoE-VAR with an average, and a tokenizer with buffers and a discriminator."""
    return unpack(tmp_path / "old")


def without_heads(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("heads.")}


def test_a_dense_var_goes_out_and_comes_back(dense, tmp_path):
    expected = without_heads(read_weights(dense))
    assert len(expected) + 1 == len(read_weights(dense))
    assert convert(dense, tmp_path / "ours.safetensors") == 0
    assert convert(dense, tmp_path / "public.pth") == 0
    assert convert(dense, tmp_path / "public.safetensors", "--layout", "var") == 0
    public = torch.load(tmp_path / "public.pth", weights_only=True)
    assert public["blocks.2.attn.mat_qkv.weight"].shape == (96, 32)
    assert public["attn_bias_for_masking"].shape == (1, 1, 14, 14)
    assert_same(load_file(tmp_path / "public.safetensors"), public)
    assert_same(load_file(tmp_path / "ours.safetensors"), expected)
    for name in ("ours.safetensors", "public.pth", "public.safetensors"):
        back = tmp_path / f"back-from-{name}.safetensors"
        assert convert(tmp_path / name, back, "--config", dense / "config.yaml") == 0
        assert_same(load_file(back), expected)
    again = tmp_path / "again.pth"
    assert convert(tmp_path / "ours.safetensors", again, "--config", dense / "config.yaml") == 0
    assert_same(torch.load(again, weights_only=True), public)


def test_heads_of_a_checkpoint_are_passed_over_if_one_says_so(dense):
    """A run of another recipe begins with the model alone, from a run or from an export that kept them."""
    assert convert(dense, dense / "all.safetensors", "--keep-heads") == 0
    shapes = shapes_of(build(load_config(dense / "config.yaml"), "meta"))
    for path in (dense, dense / "all.safetensors"):

        def begin(fresh, path=path):
            read = functools.partial(read_weights_file, layouts={})
            return read_whole(InitialWeights(path, lambda *given: read(*given[:2], fresh=given[2]), fresh), shapes)

        with pytest.raises(CheckpointError, match=r"keys unknown to the model: heads\.guidance\.weight"):
            begin(())
        assert_same(begin(("heads.",)), without_heads(read_weights(dense)))


def test_heads_are_kept_if_one_asks(dense, tmp_path):
    assert convert(dense, tmp_path / "all.safetensors", "--keep-heads") == 0
    assert_same(load_file(tmp_path / "all.safetensors"), read_weights(dense))


@pytest.mark.parametrize("backend", ["megatron", "grouped"])
def test_experts_go_out_and_come_back(backend, old, tmp_path, capsys):
    expected = read_weights(old / "generator")
    file = tmp_path / "ours.safetensors"
    assert convert(old / "generator", file) == 0
    assert_same(load_file(file), expected)
    assert "blocks.1.feed_forward.moe.experts.3.linear_fc2.weight" in expected
    config = load_config(old / "generator" / "config.yaml", [f"generator.experts.backend={backend}"])
    model = build(config, "cpu")  # with experts in a list, or stacked
    fill(model, read_weights_file(file, shapes_of(model), {}))
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter, expected[name]), name
    stacked = dict(model.named_parameters()).get("blocks.1.feed_forward.moe.experts.linear_fc2_weight")
    assert (stacked is not None) == (backend == "grouped")
    if stacked is not None:
        assert torch.equal(stacked[3], expected["blocks.1.feed_forward.moe.experts.3.linear_fc2.weight"])
    assert convert(old / "generator", tmp_path / "public.pth") == 2
    assert "VAR with experts has no counterpart" in capsys.readouterr().err
    assert not (tmp_path / "public.pth").exists()


def test_what_a_router_holds_goes_out_and_comes_back(tmp_path):
    run = run_of(tmp_path / "run", {"experts": {"router": "zero_computation", "number": 4, "top_k": 2}})
    file, expected = tmp_path / "ours.safetensors", without_heads(read_weights(run))
    assert convert(run, file) == 0
    assert_same(load_file(file), expected)
    model = build(load_config(run / "config.yaml"), "cpu")
    fill(model, read_weights_file(file, shapes_of(model), {}))
    found = {name: value for name, value in model.named_parameters() if ".moe.router." in name}
    assert {"residual", "constant", "constant_weight", "weight"} == {name.rpartition(".")[2] for name in found}
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name


def test_a_tokenizer_goes_out_and_comes_back_with_its_buffers(old, tmp_path):
    from megavar.tokenizers.multiscale_vq import MultiScaleVQ

    expected = read_weights(old / "tokenizer")
    buffers = [name for name in expected if name.endswith("ema_vocab_hit_SV")]
    assert buffers and expected[buffers[0]].any()
    assert convert(old / "tokenizer", tmp_path / "vae.pth") == 0
    assert convert(old / "tokenizer", tmp_path / "ours.safetensors") == 0
    config = old / "tokenizer" / "config.yaml"
    assert convert(tmp_path / "vae.pth", tmp_path / "back.safetensors", "--config", config) == 0
    for name in ("ours", "back"):
        assert_same(load_file(tmp_path / f"{name}.safetensors"), expected)
    for name in ("vae.pth", "ours.safetensors"):
        tokenizer = MultiScaleVQ(load_config(config).tokenizer)
        load_public(tokenizer, tmp_path / name)
        assert_same(dict(tokenizer.state_dict()), expected)


def test_other_modules_averages_and_types(old, tmp_path):
    arguments = (old / "generator", tmp_path / "average.safetensors", "--ema", "--dtype", "bfloat16")
    assert convert(*arguments) == 0
    expected = {name: value.bfloat16() for name, value in read_weights(old / "generator", ema=True).items()}
    assert_same(load_file(tmp_path / "average.safetensors"), expected)
    assert convert(old / "tokenizer", tmp_path / "judge.safetensors", "--module", "discriminator") == 0
    assert_same(load_file(tmp_path / "judge.safetensors"), read_weights(old / "tokenizer", "discriminator"))


def test_an_export_says_what_it_is(old, tmp_path):
    assert convert(old / "generator", tmp_path / "ours.safetensors", "--ema") == 0
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert (facts["format"], facts["module"], facts["step"], facts["weights"]) == ("megavar", "generator", "3", "ema")
    assert json.loads(facts["choice"])["experts"]["router"] == "scale_token"
    assert json.loads(facts["space"])["sides"] == [1, 2, 4] and json.loads(facts["dropped"]) == ["heads."]
    assert int(facts["format_version"]) == 3 and facts["megavar"]


def test_a_transposed_matrix_is_refused(dense, tmp_path):
    """It has the same number of elements."""
    convert(dense, tmp_path / "public.pth")
    state = torch.load(tmp_path / "public.pth", weights_only=True)
    state["word_embed.weight"] = state["word_embed.weight"].T.contiguous()
    torch.save(state, tmp_path / "public.pth")
    tensors = without_heads(read_weights(dense))
    name = "embedding.features.weight"
    save_file(tensors | {name: tensors[name].T.contiguous()}, tmp_path / "ours.safetensors")
    config = load_config(dense / "config.yaml")
    layouts = weight_layouts(config.generator, config.tokenizer.space)
    expected = shapes_of(build(config, "meta"))
    for file in ("public.pth", "ours.safetensors"):
        with pytest.raises(Exception, match=r"weight is 8x32 in the file and 32x8 in the model"):
            read_weights_file(tmp_path / file, expected, layouts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/none", "x.safetensors"], "none does not exist"),
        (["{root}", "{root}/x.bin"], r"ends neither in \.safetensors"),
        (["{root}/x.pth", "{root}/y.safetensors"], "Which model is"),
        (["{root}/x.safetensors", "{root}/y.pth", "--config", "{root}/other.yaml"], "not fit the configured model"),
        (["{root}", "{root}/y.pth", "--config", "{root}/other.yaml"], "does not fit the configuration"),
        (["{root}/x.pth", "{root}/y.safetensors", "--config", "{root}/config.yaml"], "keys missing from the file"),
        (["{root}", "{root}/y.safetensors", "--module", "critic"], "holds no module 'critic'; it holds generator"),
        (["{root}", "{root}/y.safetensors", "--ema"], "holds no average"),
        (["{root}/cut.safetensors", "{root}/y.safetensors"], "cut.safetensors cannot be read"),
        (["{root}", "{root}/y.pth", "--layout", "hf"], "no such weight layout. It has var, megavar"),
        (["{root}", "{root}/y.pth", "--layout", "megavar"], r"must end in \.safetensors"),
        (["{root}/x.safetensors", "{root}/y.safetensors", "--config", "{root}/config.yaml", "--input-layout", "hf"],
         "the model has no weight layout 'hf'"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(arguments, message, dense, capsys):
    other = DENSE | {"generator": DENSE["generator"] | {"depth": 5}}
    (dense / "other.yaml").write_text(yaml.safe_dump(other))
    convert(dense, dense / "x.safetensors")
    torch.save({}, dense / "x.pth")
    (dense / "cut.safetensors").write_bytes((dense / "x.safetensors").read_bytes()[:-8])
    before = sorted(dense.rglob("*"))
    assert convert(*[argument.format(root=dense) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(dense.rglob("*")) == before
