"""Runs of QueryAR on captions: resumed bitwise, sampled the same on any number of ranks, planned, exported; begun with
a folder of a language model."""

import json

import pytest
import torch
import yaml

pytest.importorskip("diffusers", reason="the package diffusers is not installed (pip install 'megavar[vlm]')")
pytest.importorskip("transformers", reason="the vlm extra is not installed")

from PIL import Image
from safetensors.torch import load_file, save_file

from megavar.__main__ import main
from megavar.beginning import warn_of_differences
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.tokenizers.kl_vae import KLVAEConfig
from megavar.data.build import build_text
from megavar.errors import ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.pictures import GAP, LINE
from megavar.planning.plan import plan
from megavar.recipes.vgt import QueryFlow
from megavar.records.reading import json_lines
from megavar.retention import score_understanding
from megavar.scoring import score
from megavar.tokenizers.kl_vae import KLVAE
from megavar.tokenizers.kl_vae.published import LDMLayout
from megavar.training.checkpoint.weights import find_checkpoint, read_weights, tensors_of
from tests.boundary.runs import ROOT
from tests.boundary.runs import tensors_of as trained
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.whole_runs import chunks, samples_of, train_until
from tests.evaluation.official.conftest import picture
from tests.evaluation.understanding import files, folders
from tests.reporting.test_report import loads_nothing
from tools import convert_checkpoint

pytestmark = pytest.mark.distributed
VAE = {
    "name": "kl_vae", "image_side": 32, "latent_channels": 2, "base_channels": 8, "channel_multipliers": [1, 1, 2, 2],
    "residual_blocks": 1, "norm_groups": 4, "patch": 1, "scaling": 1.0,
}  # fmt: skip
MODEL = {"vocabulary": 400, "width": 32, "depth": 2, "heads": 4, "groups": 2, "feed_forward": 48}
FRESH = ["image.", "condition.", "head."]
PLANTED = {"\n": {"Yes": 6.0, "A": 4.0, "No": 2.0}, "Yes": {"<|im_end|>": 9.0}}
DATA = {
    "source": {"name": "shapes", "length": 64, "test_length": 32}, "image_size": 32,
    "text": {"length": 24, "vocabulary": 300},
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A random autoencoder as a file of latent diffusion, and a vision-language model as Hugging Face's folder."""
    folder, config = tmp_path_factory.mktemp("parts"), KLVAEConfig(**VAE)
    model = KLVAE(config)
    model.initialize(torch.Generator().manual_seed(2))
    state = LDMLayout(config, config.space).export(tensors_of(model))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "vae.safetensors")
    sizes = {"num_hidden_layers": 3}  # one more than is kept
    folders.write(folder / "model", "internvl", PLANTED, **sizes)
    return folder


def write_run(path, parts, **sections):
    tree = {
        "run": {"name": path.stem, "directory": str(path.with_suffix(""))},
        "data": DATA,
        "tokenizer": VAE,
        "recipe": {"name": "vgt", "tokenizer_weights": str(parts / "vae.safetensors"), "permutation": "sample"},
        "generator": {
            "name": "query_ar", "language_model": MODEL, "query_sides": [6, 6], "head": {"width": 24, "depth": 1},
            "text_length": 24, "image_start": [0],
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
        "logging": {"interval": 1, "wandb": {"mode": "disabled"}},
        "validation": {"interval": 3, "samples": 20},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = tree[name] | section
    path.write_text(yaml.safe_dump(tree))
    marked = build_text(load_config(path).data).id("<img>")
    tree["generator"]["image_start"] = [marked]
    path.write_text(yaml.safe_dump(tree))
    return path


def go(path, die_at=None):
    """Runs on every rank: train to the end, or to a sudden death while step ``die_at`` is prepared."""
    return train_until(QueryFlow, load_config(path), die_at)


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("run") / "whole.yaml", parts)
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    return path


def test_killed_and_resumed_bitwise(finished, parts, tmp_path):
    path = write_run(tmp_path / "killed.yaml", parts)
    with pytest.raises(RankFailure, match="exit code -9"):
        run_ranks(1, go, path, 5)
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    whole, resumed = trained(finished.with_suffix(""), 6), trained(tmp_path / "killed", 6)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    _is_shown_to_people(tmp_path / "killed")


def _is_shown_to_people(run):
    """Held-out loss and prompts below the previews; the restart in the report, which needs nothing but itself."""
    points = [line for line in json_lines(run / "metrics.jsonl") if line.get("event") == "validation"]
    assert [(point["step"], point["samples"]) for point in points] == [(3, 16), (6, 16)]
    with Image.open(run / "samples/step-00000006.png") as picture:
        assert picture.width == 5 * (160 + GAP) + GAP and picture.height > 4 * (160 + LINE) + 22
    assert main(["report", str(run)]) == ExitCode.FINISHED
    page = (run / "report/report.html").read_text()
    assert loads_nothing(page) and len(page) < 3e6
    for text in ("Attempts of killed", "<td>KILLED</td>", "Vertical lines: restart",
                 'id="figure-validation"', "finished at step 6 of 6"):  # fmt: skip
        assert text in page, text


def test_samples_are_the_same_bytes_on_one_and_two_ranks(finished, tmp_path):
    found = []
    for ranks in (1, 2):
        drawn = samples_of(finished, ranks, tmp_path / f"of-{ranks}")
        found.append(chunks(drawn))
    assert len(found[0]) == 3 and found[0] == found[1]


def test_it_begins_with_the_folder_and_goes_back_to_its_names(finished, parts, tmp_path):
    path = write_run(tmp_path / "begun.yaml", parts, optimizer={"lr": 1e-12, "weight_decay": 0.0})
    assert run_ranks(1, go, path) == [ExitCode.FINISHED]
    file = tmp_path / "weights.safetensors"
    assert convert_checkpoint.main([str(tmp_path / "begun"), str(file), "--layout", "vgt"]) == 0
    exported, given = load_file(file), load_file(parts / "model/model.safetensors")
    part = "language_model.model."
    kept = {name: value for name, value in given.items()
            if name.startswith(part) and not name.startswith(f"{part}layers.2.")}  # fmt: skip
    assert len(kept) == 2 + 2 * 12
    for name, value in kept.items():
        torch.testing.assert_close(exported[f"lmm.{name}"], value, rtol=0, atol=1e-6)
    words = [str(tmp_path / "begun"), str(tmp_path / "tuned"), "--into", str(parts / "model")]
    assert convert_checkpoint.main(words) == 0
    again = load_file(tmp_path / "tuned/model.safetensors")
    assert again.keys() == {name for name in given if ".layers.2." not in name}
    for name, value in again.items():
        torch.testing.assert_close(value, given[name], rtol=0, atol=1e-6 if name in kept else 0)


def understanding_of(path, overrides):
    place = environment()
    topology.initialize(ParallelConfig(), place)
    return score_understanding(load_config(path, overrides), place)


def test_what_it_still_understands_stands_beside_the_original(finished, parts, tmp_path):
    """VGT Table 1. The original always says yes, which is right once for each image; after steps at a large rate the
    language model says something else."""
    benchmarks = [{"name": "mme", "path": str(files.mme(tmp_path / "MME.tsv"))},
                  {"name": "ai2d", "path": str(files.ai2d(tmp_path / "AI2D.tsv"))}]  # fmt: skip
    asked = {"model": str(parts / "model"), "benchmarks": benchmarks, "precision": "fp32", "answers": "likelihood"}
    given = [f"evaluation.understanding={json.dumps(asked)}"]
    scores, _ = run_ranks(2, understanding_of, finished, given)
    run = finished.with_suffix("")
    result = json.loads((run / "scores-understanding-step-00000006.json").read_text())
    original = result["baselines"]["original"]
    assert (original["mme_p"], original["ai2d"]) == (500, 50)
    assert scores == result["metrics"] and scores["retained/ai2d"] == 2 * scores["ai2d"]
    assert scores["retained/mme_p"] == pytest.approx(scores["mme_p"] / 5) and result["count"] == 24 + 4
    tuned = load_file(run / "understanding/step-00000006/model/model.safetensors")
    average = load_weights_of(run)
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    assert torch.equal(tuned[name], average["blocks.1.feed_forward.mlp.linear_fc2.weight"])
    written = json.loads((run / "understanding/step-00000006/model/config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == 2


def load_weights_of(run):
    return read_weights(find_checkpoint(run)[0], "generator", ema=True)


def suite_of(path, suite):
    place = environment()
    topology.initialize(ParallelConfig(), place)
    return score(load_config(path, [f"evaluation.suite={json.dumps(suite)}", "sampling.chunk_size=3"]), place)


def test_it_fills_the_folders_of_public_scorers(finished, tmp_path):
    """GenEval's file of prompts and DPG-Bench's folder of texts, four images of each, drawn on two ranks."""
    lines = [{"tag": "colors", "include": [{"class": "bus", "count": 1}], "prompt": f"a photo of {what}"}
             for what in ("a red bus", "two cups")]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg/whoops7.txt").write_text("a red bus beside a blue cup")
    run = finished.with_suffix("")
    assert run_ranks(2, suite_of, finished, {"name": "geneval", "prompts": str(tmp_path / "metadata.jsonl")})[0] == {}
    assert run_ranks(2, suite_of, finished, {"name": "dpg", "prompts": str(tmp_path / "dpg")})[0] == {}
    (root,) = run.glob("generated/*/geneval")
    assert [json.loads((root / f"0000{n}/metadata.jsonl").read_text()) for n in (0, 1)] == lines
    pictures = [picture(root / f"0000{n}/samples/0000{m}.png") for n in (0, 1) for m in range(4)]
    assert all(one.shape == (3, 32, 32) for one in pictures) and len({one.numpy().tobytes() for one in pictures}) == 8
    (root,) = run.glob("generated/*/dpg")
    assert [file.name for file in root.iterdir()] == ["whoops7.png"]
    assert picture(root / "whoops7.png").shape == (3, 64, 64)
    results = [*run.glob("scores-dpg-*"), *run.glob("scores-geneval-*")]
    notes = [json.loads(path.read_text())["notes"] for path in results]
    assert all(any("nothing amiss" in note for note in found) for found in notes) and len(notes) == 2


def test_another_rotary_base_than_the_folders_is_named(finished, parts, caplog):
    config = load_config(finished, ["generator.language_model.rotary_base=10000.0"])
    warn_of_differences(config)
    assert "generator.language_model.rotary_base was 1000000.0 and is 10000.0 here" in caplog.text
    assert "depth" not in caplog.text


def test_it_is_planned(finished):
    predicted = plan(load_config(finished), 2, "h200", None, gpus_per_node=2, images=1000)
    weights = trained(finished.with_suffix(""), 6)
    assert predicted.workload.parameters.total == sum(value.numel() for value in weights.values())
