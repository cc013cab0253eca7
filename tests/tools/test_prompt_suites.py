"""The command line of the text-to-image suites."""

import json

import numpy as np
import pytest
import torch

from megavar.data.shapes_grammar import evaluation_prompts
from megavar.evaluation.official.geneval import GenEvalFolder
from megavar.evaluation.shape_eval import true_scenes
from tools import prompt_suites


def call(*arguments):
    return prompt_suites.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Two right images for each prompt of a small ShapeEval."""
    prompts = [prompt for prompt in evaluation_prompts(32, per_tag=3) for _ in range(2)]
    images = true_scenes(prompts, 32).permute(0, 2, 3, 1).numpy()
    path = tmp_path_factory.mktemp("shapes") / "images.npz"
    np.savez(path, arr_0=images)
    return path, prompts


def test_shape_prompts_go_through_the_layout_of_geneval_and_back(shapes, tmp_path, capsys):
    images, prompts = shapes
    metadata, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "layout"
    assert call("prompts", "shapes", "--image-size", 32, "--per-tag", 3, "--out", metadata) == 0
    assert GenEvalFolder.read(metadata) == [prompt.metadata() for prompt in prompts[::2]]
    layout = ("geneval", "--prompts", metadata, "--out", out, "--per-prompt", 2)
    assert call("emit", *layout, "--images", images) == 0
    assert "nothing amiss" in capsys.readouterr().out
    assert call("verify", *layout) == 0
    described = json.loads(out.with_name("layout.run.json").read_text())
    assert described["prompt_rewrite"] == "none" and described["images"]["kind"] == "npz"
    with np.load(images) as content:
        np.savez(tmp_path / "others.npz", arr_0=255 - content["arr_0"])
    assert call("emit", *layout, "--images", tmp_path / "others.npz") == 2
    assert "holds other images" in capsys.readouterr().err
    assert call("emit", *layout, "--images", images) == 0
    out.with_name("layout.run.json").unlink()
    assert call("emit", *layout, "--images", images) == 2
    assert "is not empty" in capsys.readouterr().err
    (out / "00000" / "samples" / "00001.png").unlink()
    assert call("verify", *layout) == 2
    assert "holds 1 samples instead of 2" in capsys.readouterr().err


def test_shape_scores_are_printed_and_written(shapes, tmp_path, capsys):
    images, prompts = shapes
    out = tmp_path / "results.jsonl"
    assert call("score", "shapes", "--images", images, "--per-tag", 3, "--per-prompt", 2, "--out", out) == 0
    printed = capsys.readouterr().out
    assert next(line for line in printed.splitlines() if line.startswith("strict ↑")).split()[-1] == "1.000"
    assert len(out.read_text().splitlines()) == len(prompts)
    assert call("score", "shapes", "--images", images, "--per-tag", 2, "--per-prompt", 2, "--out", out) == 2
    assert "36 images for 24 prompts" in capsys.readouterr().err


def test_results_are_read_by_a_summary_like_the_official_one(shapes, tmp_path):
    """GenEval's script groups with pandas; the same grouping in plain Python must agree with our summary."""
    images, _ = shapes
    out = tmp_path / "results.jsonl"
    assert call("score", "shapes", "--images", images, "--per-tag", 3, "--per-prompt", 2, "--out", out) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"} <= records[0].keys()
    assert len({record["metadata"] for record in records}) == len(records) // 2


def test_dpg_grids(tmp_path, capsys):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for item in ("a1", "b2"):
        (folder / f"{item}.txt").write_text(item)
    np.savez(tmp_path / "images.npz", arr_0=torch.randint(0, 256, (8, 8, 8, 3)).to(torch.uint8).numpy())
    layout = ("dpg", "--prompts", folder, "--out", tmp_path / "dpg")
    assert call("emit", *layout, "--images", tmp_path / "images.npz") == 0
    printed = capsys.readouterr().out
    assert "2 prompts instead of the official 1065" in printed and "--pic-num 4 --resolution 8" in printed
    (tmp_path / "dpg" / "notes.txt").write_text("x")
    assert call("verify", *layout) == 2
