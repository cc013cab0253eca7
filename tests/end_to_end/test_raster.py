"""A raster VQGAN trained on the spot; reAR and AliTok on its tokens: train, resume, draw, analyze, reconstruct."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavar.__main__ import main
from megavar.analysis.kinds.exposure_bias import PROTOCOLS
from megavar.config.loading import load_config
from megavar.errors import ExitCode
from megavar.recipes.rear import NextToken
from megavar.training.checkpoint import read_weights
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.whole_runs import chunks, samples_of, train_until
from tests.end_to_end.conftest import ROOT, TINY_TOKENIZER, megavar, metrics
from tests.perceptual_files import write_perceptual_files

pytestmark = pytest.mark.end_to_end
DEMO = "configs/demo/maskgit_vqgan.yaml"
REAR = (
    "train.steps=4", "train.checkpoint={interval: 2, keep_last: 2}", "logging={interval: 1, samples_interval: 4}",
    "optimizer.schedule.warmup_steps=2", "sampling={procedure: raster, number: 8, chunk_size: 4, guidance: 4.0}",
)  # fmt: skip
SIZES = "depth: 2, width: 32, heads: 4, classes: 60, dropout: 0.2, tied_codebook: both"
GENERATORS = {"rar": f"{{name: rar, {SIZES}}}", "alitok": f"{{name: alitok, prefix_tokens: 0, grid: 8, {SIZES}}}"}


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("raster") / "vqgan"
    trained = megavar("train", DEMO, *TINY_TOKENIZER, f"run.directory={directory}")
    assert trained.code == 0, trained.output
    return directory


def words(kind: str, vqgan: Path, directory: Path) -> tuple[str, ...]:
    """reAR with noise and its term; RAR also in random orders."""
    order = ", random_order: {from_progress: 0.25, until_progress: 1.0}" if kind == "rar" else ""
    term = "terms: [{name: codebook_embedding, hidden: 16}]"
    recipe = f"recipe={{name: rear, tokenizer_weights: {vqgan}, noise: {{}}, {term}{order}}}"
    return (*REAR, f"run.directory={directory}", f"run.name={kind}", f"generator={GENERATORS[kind]}", recipe)


def go(given: tuple[str, ...], die_at: int | None = None) -> int:
    """Runs on every rank: train to the end, or to a sudden death while step ``die_at`` is prepared."""
    return train_until(NextToken, load_config(ROOT / DEMO, given), die_at)


@pytest.fixture(scope="module", params=sorted(GENERATORS))
def trained(request: pytest.FixtureRequest, vqgan: Path) -> tuple[str, Path]:
    directory = vqgan.parent / request.param
    assert run_ranks(1, go, words(request.param, vqgan, directory)) == [ExitCode.FINISHED]
    return request.param, directory


def test_killed_and_resumed_bitwise(trained: tuple[str, Path], vqgan: Path, tmp_path: Path) -> None:
    kind, directory = trained
    again = tmp_path / "again"
    with pytest.raises(RankFailure, match="exit code -9"):
        run_ranks(1, go, words(kind, vqgan, again), 3)
    assert run_ranks(1, go, words(kind, vqgan, again)) == [ExitCode.FINISHED]
    expected, found = read_weights(directory), read_weights(again)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert metrics(again)[4]["loss"] == metrics(directory)[4]["loss"]
    codes = read_weights(vqgan)["quantize.embedding.weight"]  # handed over at the boundary, and nothing trained it
    assert torch.equal(expected["embedding.codes.vectors"], codes)
    assert torch.equal(expected["head.projection.weight"], codes)


def test_samples_do_not_depend_on_ranks_batches_or_interruptions(trained: tuple[str, Path], tmp_path: Path) -> None:
    """Guided tokens of the VQGAN: the same ones from two ranks, in other batches, and after a death between chunks."""
    finished = trained[1] / "config.yaml"
    whole = chunks(samples_of(finished, 1, tmp_path / "whole"))
    assert len(whole) == 2 and whole == chunks(samples_of(finished, 2, tmp_path / "ranks"))
    uneven = samples_of(finished, 2, tmp_path / "uneven", "sampling.chunk_size=3")
    tokens = stored_tokens(whole)
    assert tokens.dtype == np.uint16 and tokens.shape == (8, 64) and tokens.max() < 128
    assert len(np.unique(tokens, axis=0)) == 8 and np.array_equal(stored_tokens(chunks(uneven)), tokens)
    with pytest.raises(RankFailure, match="exit code -9"):
        samples_of(finished, 1, tmp_path / "dead", die_at=4)
    (folder,) = (tmp_path / "dead/generated").iterdir()
    (first,) = folder.glob("*.npz")
    drawn = first.stat().st_mtime_ns
    assert chunks(samples_of(finished, 1, tmp_path / "dead")) == whole and first.stat().st_mtime_ns == drawn


def stored_tokens(files: dict[str, bytes]) -> np.ndarray:
    return np.concatenate([np.load(io.BytesIO(content))["tokens"] for content in files.values()])


def test_analyses(
    trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that must hold of any model: equal counts of true tokens, equal CTR, all layers, all steps."""
    kind, directory = trained
    monkeypatch.chdir(ROOT)

    def found(analysis: str, *more: str) -> dict[str, float]:
        assert main(["analyze", analysis, str(directory), *more, "--out", str(tmp_path)]) == ExitCode.FINISHED
        for picture in tmp_path.glob(f"{analysis}*.png"):
            assert Image.open(picture).width > 300
        content: dict[str, float] = json.loads((tmp_path / f"{analysis}.json").read_text())["metrics"]
        return content

    small = ("analysis.images=6", "analysis.batch=4")
    files = write_perceptual_files(tmp_path)["lpips_vgg"] if kind == "rar" else None  # LPIPS itself, random weights
    lpips = () if files is None else (f"analysis.lpips_vgg={files.model_dump_json()}",)
    bias = found("exposure_bias", *small, *lpips, "analysis.ratios=[0.5,1.0]")
    assert bias["perfect_0.5_ctr"] >= 0.5 and bias["imperfect_0.5_ctr"] >= 0.5
    assert bias["perfect_1_ctr"] == bias["imperfect_1_ctr"] == 1 and bias["perfect_1_psnr"] == 100
    assert bias["perfect_1_perplexity"] == bias["imperfect_1_perplexity"]
    replaced = found("embedding_replacement", *small, *lpips, "analysis.ratios=[0.0,1.0]")
    assert replaced["0_ctr"] == replaced["1_ctr"] < 1 and replaced["0_cosine"] < replaced["1_cosine"] < 1
    assert replaced["1_perplexity_increase"] == pytest.approx(replaced["1_perplexity"] - replaced["0_perplexity"])
    if lpips:
        assert bias["perfect_1_lpips_vgg"] == 0 < min(bias[f"{which}_0.5_lpips_vgg"] for which in PROTOCOLS)
        assert 0 < replaced["1_lpips_vgg"] != replaced["0_lpips_vgg"] > 0
    same = found("generalization", *small)
    assert {"trained", "unseen", "trained_noisy", "unseen_noisy"} <= same.keys()
    assert same["unseen_loss"] != same["unseen_noisy_loss"]
    alignment = found("codebook_alignment", *small)
    assert all(0 < alignment[f"{which}_{layer}"] <= 1 for which in ("encoded", "decoded") for layer in range(3))
    if kind == "rar":  # what the first block reads is a linear map of the code, and positions
        assert alignment["encoded_0"] > alignment["decoded_0"]
    speed = found("step_times", "analysis.batch=4", "analysis.repeats=1", "analysis.steps=[16,64,240]")
    assert speed["steps"] == 64 and {"seconds_at_step_16", "seconds_at_step_64"} <= speed.keys()
    assert "seconds_at_step_240" not in speed


def test_reconstructions_are_scored(vqgan: Path) -> None:
    scored = megavar("evaluate", DEMO, *TINY_TOKENIZER, f"run.directory={vqgan}",
                     "evaluation.reconstruction={images: 32, chunk_size: 16}")  # fmt: skip
    assert scored.code == 0, scored.output
    results = [json.loads(path.read_text()) for path in vqgan.rglob("*.json") if "recon" in path.name]
    assert any("psnr" in json.dumps(result) for result in results), scored.output
