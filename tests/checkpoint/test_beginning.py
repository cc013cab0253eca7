"""A whole run begins with given weights, remembers which, and then does without them."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from megavar.frozen import identify
from megavar.training.checkpoint import find_checkpoint, read_weights
from tests.checkpoint.old_runs import command, unpack
from tests.distributed.harness import run_ranks
from tools.convert_checkpoint import main as convert

pytestmark = pytest.mark.distributed
STEPS = ("train.steps=2", "train.checkpoint.interval=1", "train.ema=null")


@pytest.fixture
def runs(tmp_path):
    return unpack(tmp_path)


def train(runs, name, *overrides, source="generator", ranks=1):
    """Train the new run ``name`` with the configuration of an old one; the exit codes."""
    arguments = (f"{source}/config.yaml", f"run.directory={name}", f"run.name={name}", *STEPS, *overrides)
    return run_ranks(ranks, command, runs, "train", *arguments)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("stage", [1, 3])
def test_from_a_run_or_an_export_the_losses_are_the_same(stage, runs):
    assert convert([str(runs / "generator"), str(runs / "g.safetensors")]) == 0
    zero = runs / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    for name, path in (("run", "generator"), ("export", "g.safetensors")):
        given = (f"train.initial_weights={{path: {path}}}", f"deepspeed={zero}")
        assert train(runs, name, *given, ranks=2) == [0, 0]
        manifest = find_checkpoint(runs / name)[1]
        identity = identify(runs / path).to_json()
        assert manifest.provenance["initial_weights"] == identity
        assert json.loads((runs / name / "weights.json").read_text())["initial"] == {"path": path} | identity
    assert losses(runs / "run") == losses(runs / "export") and len(losses(runs / "run")) == 2
    assert train(runs, "random") == [0]
    assert losses(runs / "random")[0] > losses(runs / "run")[0] + 0.01


def test_settings_that_differ_are_named(runs, capfd):
    """Another number of heads does not change a shape."""
    assert convert([str(runs / "generator"), str(runs / "g.safetensors")]) == 0
    for name, path in (("run", "generator/checkpoints/step-00000003"), ("export", "g.safetensors")):
        assert train(runs, name, f"train.initial_weights.path={path}", "generator.drop_path=0.2") == [0]
        expected = f"The weights in {path} were made with other settings: generator.drop_path was 0.1 and is 0.2 here."
        assert expected in capfd.readouterr().err


def test_the_weights_may_vanish_once_there_is_a_checkpoint(runs):
    shutil.copytree(runs / "generator", runs / "source")
    given = ("train.initial_weights.path=source",)
    assert train(runs, "new", *given) == [0]
    (runs / "source").rename(runs / "moved")
    shutil.rmtree(runs / "new" / "checkpoints" / "step-00000002")
    (runs / "new" / "DONE").unlink()
    assert train(runs, "new", *given) == [0]  # continues after step 1
    manifest = find_checkpoint(runs / "new")[1]
    assert manifest.step == 2
    assert manifest.provenance["initial_weights"] == identify(runs / "moved").to_json()
    assert train(runs, "new", "train.initial_weights.path=moved") == [0]  # the same, elsewhere
    assert train(runs, "new", "train.initial_weights.path=tokenizer") == [2]
    assert train(runs, "new") == [2]


def test_other_weights_do_not_take_their_place_before_there_is_a_checkpoint(runs, capfd):
    shutil.copytree(runs / "generator", runs / "source")
    given = ("train.initial_weights.path=source",)
    assert train(runs, "new", *given, ranks=2) == [0, 0]
    shutil.rmtree(runs / "new" / "checkpoints")
    (runs / "new" / "DONE").unlink()
    before = identify(runs / "source")
    shutil.rmtree(runs / "source")
    shutil.copytree(runs / "tokenizer", runs / "source")
    assert train(runs, "new", *given, ranks=2) == [2, 2]
    message = capfd.readouterr().err
    assert before.sha256 in message and identify(runs / "source").sha256 in message
    shutil.rmtree(runs / "source")
    shutil.copytree(runs / "generator", runs / "source")
    assert train(runs, "new", *given) == [0]


def test_parts_may_be_fresh(runs):
    tree = yaml.safe_load((runs / "generator" / "config.yaml").read_text())
    tree["generator"]["experts"]["number"] = 5  # one more: no longer the weights of this model
    tree["run"]["directory"] = "wider"
    (runs / "wider.yaml").write_text(yaml.safe_dump(tree))
    arguments = ("train", "wider.yaml", *STEPS, "train.initial_weights.path=generator")
    assert run_ranks(1, command, runs, *arguments) == [2]
    shutil.rmtree(runs / "wider")
    fresh = [f"blocks.{block}.feed_forward." for block in range(2)]
    assert run_ranks(1, command, runs, *arguments, f"train.initial_weights.fresh={fresh}") == [0]


def test_a_tokenizer_begins_with_a_file(runs):
    given = ("recipe.initial_weights=tokenizer.pth",  # as train.initial_weights.path was called
             "train.steps=1", "optimizer.lr=1e-9")
    assert convert([str(runs / "tokenizer"), str(runs / "tokenizer.pth")]) == 0
    assert train(runs, "new", *given, source="tokenizer") == [0]
    before, after = (read_weights(runs / name) for name in ("tokenizer", "new"))
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before if "ema" not in name)
    (runs / "tokenizer.pth").unlink()
    (runs / "new" / "DONE").unlink()
    assert train(runs, "new", *given, source="tokenizer") == [0]  # the codebook is not drawn anew, nor the file read


def test_given_weights_are_sampled_without_training(runs):
    """What ``--untrained`` draws from an export is what the run that was exported draws."""
    assert convert([str(runs / "generator"), str(runs / "g.safetensors"), "--ema"]) == 0
    arguments = ("sample", "generator/config.yaml", "sampling.number=6")
    assert run_ranks(1, command, runs, *arguments, "sampling.weights=ema") == [0]
    given = [*arguments, "--untrained", "run.directory=new", "train.initial_weights.path=g.safetensors"]
    assert run_ranks(1, command, runs, *given) == [0]
    (first,) = (runs / "generator" / "generated").glob("step-00000003-*")
    (second,) = (runs / "new" / "generated").glob("untrained-*")
    chunks = [np.load(next(directory.glob("chunk_*.npz")))["tokens"] for directory in (first, second)]
    assert np.array_equal(*chunks)
    assert run_ranks(1, command, runs, *given[:-1]) == [0]
    assert len(list((runs / "new" / "generated").glob("untrained-*"))) == 2
