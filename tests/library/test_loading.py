"""``megavar.load``: the same model from a run, a checkpoint and an export, or a sentence. On runs of real training:
an STMoE-VAR with a moving average, and its tokenizer."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import megavar
from megavar.errors import CheckpointError, ConfigError
from megavar.parallel import topology
from megavar.parallel.logical import logical_tensors
from megavar.training.checkpoint import read_weights
from tests.checkpoint.old_runs import command, unpack
from tools.convert_checkpoint import main as convert

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EXPERT = "blocks.1.feed_forward.moe.experts.3.linear_fc2.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``generator`` with class names, ``tokenizer``, the samples that ``megavar sample`` draws, and exports."""
    place, here = unpack(tmp_path_factory.mktemp("runs")), Path.cwd()
    try:
        assert command(place, "sample", "generator/config.yaml", "sampling.number=12", "sampling.chunk_size=5") == 0
    finally:
        os.chdir(here)
    described = json.loads((place / "generator/data.json").read_text())
    (place / "generator/data.json").write_text(json.dumps(described | {"class_names": NAMES}))
    for name, options in (("export", ()), ("average", ("--ema",)), ("alone", ("--without-tokenizer",))):
        assert convert([str(place / "generator"), str(place / f"{name}.safetensors"), *options]) == 0
    assert convert([str(place / "tokenizer"), str(place / "tokenizer.safetensors")]) == 0
    return place


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In another folder, and in the end without process groups: other tests fork."""
    monkeypatch.chdir(tmp_path)
    yield
    topology.shutdown()


def rewritten(source: Path, target: Path, change, **facts: str) -> Path:
    """A copy of an export with changed tensors and metadata."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target, metadata | facts)
    return target


@pytest.mark.parametrize("door", ["generator", "generator/checkpoints/step-00000003", "export.safetensors"])
def test_every_door_draws_what_megavar_sample_draws(runs, door, tmp_path):
    place = runs / door
    if place.is_file():  # alone in the world
        place = Path(shutil.copy(place, tmp_path / "some.safetensors"))
    variables = dict(os.environ)
    model = megavar.load(place)
    drawn = model.sample(number=12, chunk_size=5)
    assert dict(os.environ) == variables, "nobody takes the other program for a rank"
    (folder,) = (runs / "generator/generated").iterdir()
    expected = np.concatenate([np.load(file)["tokens"] for file in sorted(folder.glob("*.npz"))])
    np.testing.assert_array_equal(drawn.tokens, expected)
    assert (model.step, model.class_names, drawn.asked) == (3, tuple(NAMES), tuple(NAMES + NAMES[:2]))
    assert {(type(image), image.size, image.mode) for image in drawn.images} == {(Image.Image, (16, 16), "RGB")}
    assert len({image.tobytes() for image in drawn.images}) == 12
    weights = read_weights(runs / "generator")
    parameters = dict(model.generator.named_parameters())
    compared = 0
    for tensor in logical_tensors(model.generator):
        assert torch.equal(tensor.local(parameters[tensor.parameter]), weights[tensor.name]), tensor.name
        compared += "experts" in tensor.name
    assert compared == 2 * 4 * 4, "two blocks, four experts, two layers with biases"


def test_what_is_asked_for_is_drawn(runs):
    model = megavar.load(runs / "export.safetensors")
    by_name = model.sample(classes=["two", 7], number=4, seed=3)
    assert by_name.asked == ("two", "seven", "two", "seven") and by_name.tokens.shape == (4, 21)
    np.testing.assert_array_equal(by_name.tokens, model.sample(classes=[2, "seven"], number=4, seed=3).tokens)
    np.testing.assert_array_equal(by_name.tokens[:1], model.sample("two", seed=3).tokens)
    for other in ({"seed": 4}, {"seed": 3, "guidance": 8.0}, {"seed": 3, "top_k": 1}, {"seed": 3, "temperature": 50.0}):
        assert (model.sample(classes=["two", 7], number=4, **other).tokens != by_name.tokens).any(), other
    averaged = megavar.load(runs / "generator", weights="ema").sample(number=10).tokens
    np.testing.assert_array_equal(averaged, megavar.load(runs / "average.safetensors").sample(number=10).tokens)
    assert (averaged != model.sample(number=10).tokens).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["tvo"]}, "no class 'tvo'. Did you mean 'two'? Names are zero, one, two, three ..., labels 0"),
        ({"classes": [10]}, "there is no class 10"),
        ({"classes": -1}, "there is no class -1"),
        ({"classes": [True]}, "there is no class True"),
        ({"classes": []}, "classes=[], but generator 'var' is asked by classes"),
        ({"prompts": ["a cat"]}, "prompts=['a cat'], but generator 'var' is asked by classes"),
        ({"number": 0}, "number=0 draws nothing"),
        ({"guidanse": 2.0}, "Unknown key guidanse. Did you mean 'guidance'?"),
        ({"guidance": -1.0}, "guidance: input should be greater than or equal to 0"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_what_cannot_be_asked_is_said(runs, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        megavar.load(runs / "export.safetensors").sample(**arguments)


def test_a_tokenizer_is_a_model_too(runs):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    decoded = []
    for door in ("tokenizer", "tokenizer.safetensors"):
        model = megavar.load(runs / door)
        assert model.generator is None
        decoded.append(model.tokenizer.decode(model.tokenizer.tokens(model.tokenizer.encode(images))))
        with pytest.raises(ConfigError, match="trained a tokenizer, which draws no images"):
            model.sample()
    assert torch.equal(*decoded)


def _drop(tensors):
    del tensors[EXPERT]


def _call_it_as_the_module_does(tensors):
    tensors[EXPERT.replace("experts.", "experts.local_experts.")] = tensors.pop(EXPERT)


def _transpose(tensors):
    tensors[EXPERT] = tensors[EXPERT].T.contiguous()


def _add(tensors):
    tensors[EXPERT.replace("experts.3", "experts.4")] = tensors[EXPERT].clone()


def _harm_the_tokenizer(tensors):
    del tensors["tokenizer/quantize.embedding.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, rf"keys missing from the file: {EXPERT}"),
        (_call_it_as_the_module_does, rf"missing from the file: {EXPERT}; keys unknown .*local_experts\.3"),
        (_transpose, rf"{EXPERT} is 32x8 in the file and 8x32 in the model"),
        (_add, r"keys unknown to the model: .*experts\.4"),
        (_harm_the_tokenizer, r"lacks quantize\.embedding\.weight, which would stay random"),
    ],
)
def test_no_expert_stays_random(runs, tmp_path, change, message):
    path = rewritten(runs / "export.safetensors", tmp_path / "changed.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        megavar.load(path)


@pytest.mark.parametrize("key", ["depth=3", "depth=1", "width=16", "experts.number=3", "experts.number=5", "classes=9"])
@pytest.mark.parametrize("door", ["generator", "export.safetensors"])
def test_another_configuration_is_refused(runs, tmp_path, door, key):
    """Also a smaller one, for which everything is there."""
    from megavar.config.loading import dump, load_config

    (tmp_path / "other.yaml").write_text(dump(load_config(runs / "generator/config.yaml", [f"generator.{key}"])))
    with pytest.raises(CheckpointError, match=r"another model|does not fit the configured model"):
        megavar.load(runs / door, config=tmp_path / "other.yaml")


def test_an_export_says_what_it_is_and_how_to_open_it(runs):
    with safe_open(runs / "export.safetensors", framework="pt") as file:
        facts = file.metadata()
    for told in ("megavar.load(FILE)", "strict=False) would leave those random"):
        assert told in facts["description"]
    assert json.loads(facts["class_names"]) == NAMES and json.loads(facts["config"])["run"]["name"] == "old-generator"
    assert json.loads(facts["tokenizer"])["checkpoint"] == "step-00000003"
    with pytest.raises(CheckpointError, match=r"holds weights='ema' only\. Load the checkpoint"):
        megavar.load(runs / "average.safetensors", weights="model")


def test_the_tokenizer_is_the_one_it_learned_from(runs, tmp_path):
    with pytest.raises(CheckpointError, match=r"The tokenizer of the generator .*Name it, load\(\.\.\., tokenizer="):
        megavar.load(shutil.copy(runs / "alone.safetensors", tmp_path / "alone.safetensors"))
    expected = megavar.load(runs / "export.safetensors").sample(number=2)
    given = megavar.load(tmp_path / "alone.safetensors", tokenizer=runs / "tokenizer").sample(number=2)
    assert [image.tobytes() for image in given.images] == [image.tobytes() for image in expected.images]
    other = rewritten(
        runs / "tokenizer.safetensors", tmp_path / "t.safetensors", lambda t: t["quantize.embedding.weight"].neg_()
    )
    with pytest.raises(CheckpointError, match="weights of 'tokenizer' were replaced"):
        megavar.load(runs / "export.safetensors", tokenizer=other)


def test_files_of_strangers_run_nothing_and_damage_is_a_sentence(runs, tmp_path, monkeypatch):
    (tmp_path / "evil_export.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    export, target = runs / "export.safetensors", tmp_path / "foreign.safetensors"
    config = json.loads(safe_open(export, framework="pt").metadata()["config"])
    nothing = lambda tensors: None  # noqa: E731
    with pytest.raises(ConfigError, match="evil_export, and a file beside samples or weights is no reason to run code"):
        megavar.load(rewritten(export, target, nothing, config=json.dumps(config | {"plugins": ["evil_export"]})))
    with pytest.raises(CheckpointError, match="'config' of its metadata cannot be read"):
        megavar.load(rewritten(export, target, nothing, config="{"))
    with pytest.raises(ConfigError, match=r"Unknown key generator\.depht"):
        wrong = config | {"generator": config["generator"] | {"depht": 3}}
        megavar.load(rewritten(export, target, nothing, config=json.dumps(wrong)))
    target.write_bytes(export.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors cannot be read"):
        megavar.load(target)
    torch.save(load_file(export), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"does not say which model it holds .*config="):
        megavar.load(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        megavar.load(tmp_path / "none")
    shutil.copytree(runs / "generator/checkpoints/step-00000003", tmp_path / "step-00000003")
    with pytest.raises(ConfigError, match=r"No config\.yaml lies beside .*Give config="):
        megavar.load("step-00000003")
    model = megavar.load("step-00000003", config=runs / "generator/config.yaml", tokenizer=runs / "tokenizer")
    np.testing.assert_array_equal(model.sample(number=2).tokens, megavar.load(export).sample(number=2).tokens)


