"""Runs of TiTok's stages, AliTok's phases and VGT-AE, resumed bitwise; caches of tokens, and generators on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavar.config.loading import load_config
from megavar.config.tokenizers.titok import TiTokConfig
from megavar.data.build import build_source
from megavar.errors import ExitCode
from megavar.recipes.tokenizer.proxy_codes import ProxyCodes
from megavar.recipes.tokenizer.recipe import TokenizerTraining
from megavar.recipes.vgt_ae import VGTAETraining
from megavar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from megavar.tokenizers.maskgit_vqgan.published import MaskGITVQGANLayout
from megavar.training.checkpoint.weights import read_weights
from tests.boundary.runs import ROOT
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.whole_runs import train_until
from tests.end_to_end.conftest import megavar
from tools import cache_tokens

pytestmark = pytest.mark.distributed
TINY = (
    "run.requires=[]", "train.global_batch_size=8", "train.checkpoint.interval=5", "logging.interval=1",
    "logging.samples_interval=null", "logging.wandb.mode=disabled", "optimizer.schedule.warmup_steps=1",
)  # fmt: skip
STAGE1, STAGE2 = "configs/demo/titok_stage1.yaml", "configs/demo/titok.yaml"
IMAGES = "{name: shapes, conditioning: class, length: 12, test_length: 16}"


def go(path: str, overrides: tuple[str, ...], die_at: int | None = None, recipe: Any = TokenizerTraining) -> int:
    """Runs on every rank: train to the end, or to a sudden death while step ``die_at`` is prepared."""
    return train_until(recipe, load_config(ROOT / path, [*TINY, *overrides]), die_at)


def run(path: str, *overrides: str, ranks: int = 1) -> None:
    assert run_ranks(ranks, go, path, overrides) == [ExitCode.FINISHED] * ranks


def resumes_bitwise(
    path: str, overrides: tuple[str, ...], whole: Path, die_at: int, steps: int, recipe: Any = TokenizerTraining
) -> None:
    """A run that is killed at a step and continues from the checkpoint before it ends as the one that was not."""
    killed = whole.with_name(f"{whole.name}-killed")
    with pytest.raises(RankFailure, match="exit code -9"):
        run_ranks(1, go, path, (*overrides, f"run.directory={killed}"), die_at, recipe)
    run(path, *overrides, f"run.directory={killed}")
    one, other = (read_weights(place / f"checkpoints/step-{steps:08}") for place in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert losses(whole) == losses(killed)


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_titoks_stages_then_rar_on_a_cache_of_their_tokens(tmp_path: Path) -> None:
    choice = load_config(ROOT / STAGE1).tokenizer
    assert isinstance(choice, TiTokConfig)
    torch.manual_seed(0)
    proxy = MaskGITVQGAN(choice.pixel)
    torch.save(MaskGITVQGANLayout(choice.pixel, choice.pixel.space).export(proxy.state_dict()), tmp_path / "vqgan.bin")
    short = ("train.steps=4", "train.checkpoint={interval: 2, keep_last: 2}")
    first = (*short, f"recipe.proxy_weights={tmp_path / 'vqgan.bin'}", "recipe.codebook.revive_every=3")
    second = (*short, "recipe.adversarial.start_step=1", f"train.initial_weights.path={tmp_path / 'one'}")
    run(STAGE1, *first, f"run.directory={tmp_path / 'one'}")
    resumes_bitwise(STAGE1, first, tmp_path / "one", 3, 4, ProxyCodes)  # codes are revived after the checkpoint
    run(STAGE2, *second, f"run.directory={tmp_path / 'two'}")
    one, two = (read_weights(tmp_path / name) for name in ("one", "two"))
    for name, value in proxy.decoder.state_dict().items():
        assert torch.equal(one[f"pixel_decoder.{name}"], value)
    parts = {name.split(".")[0] for name, value in two.items() if not torch.equal(value, one[name])}
    assert {"decoder", "pixel_decoder"} <= parts and not parts & {"encoder", "latent_tokens"}
    assert torch.equal(one["quantize.embedding.weight"], two["quantize.embedding.weight"])

    weights = f"recipe.tokenizer_weights={tmp_path / 'two'}"
    crops = "data.transform={name: ten_crop}"
    cached = f"data.source={{name: cache, path: {tmp_path / 'cache'}, views: 10, images: {IMAGES}}}"
    rar = "configs/demo/rar_titok.yaml"
    given = [weights, crops, "generator.depth=1", "train.steps=4", "evaluation.after_training=false"]
    assert cache_tokens.main([str(ROOT / rar), *TINY, *given, cached]) == ExitCode.FINISHED
    source = build_source(load_config(ROOT / rar, [*TINY, *given, cached]).data)
    sample = source.read(3).tokens
    assert sample is not None and sample.dtype == np.uint16 and sample.shape == (10, 16) and sample.max() < 256
    run(rar, f"run.directory={tmp_path / 'cached'}", *given, cached, ranks=2)
    run(rar, f"run.directory={tmp_path / 'images'}", *given, f"data.source={IMAGES}")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "images"), abs=1e-4)
    assert len(set(losses(tmp_path / "images"))) == 4

    published = tmp_path / "titok.jsonl"  # the first crop alone, as a file like the published ones
    rows = [(sample.label, sample.tokens) for sample in map(source.read, range(12))]
    published.write_text("".join(json.dumps({"class_id": label, "tokens": tokens[0].tolist()}) + "\n"
                                 for label, tokens in rows if tokens is not None))  # fmt: skip
    of_file = f"data.source={{name: token_file, path: {published}, classes: 60}}"
    run(rar, f"run.directory={tmp_path / 'file'}", *given, of_file)
    assert len(set(losses(tmp_path / "file"))) == 4


def test_alitok_from_yaml_to_samples(tmp_path: Path) -> None:
    """The phases are cut anywhere: here in the second stage, after a checkpoint in the first."""
    tokenizer = "configs/demo/alitok_tokenizer.yaml"
    short = ("train.steps=13", "tokenizer.encoder.depth=1", "tokenizer.decoder.depth=1")
    run(tokenizer, *short, f"run.directory={tmp_path / 'whole'}")
    resumes_bitwise(tokenizer, short, tmp_path / "whole", 9, 13)  # stage 2 begins at step 9; step 5 is kept
    assert "decoder.ln_pre.weight" in read_weights(tmp_path / "whole")

    overrides = (
        *TINY, f"run.directory={tmp_path / 'ar'}", f"recipe.tokenizer_weights={tmp_path / 'whole'}", *short[1:],
        "generator.depth=1", "train.steps=4", "sampling.number=8", "sampling.chunk_size=4", "sampling.guidance=4.0",
        "data.transform={name: ten_crop}", "evaluation.after_training=false",
        f"data.source={{name: cache, path: {tmp_path / 'cache'}, views: 10, images: {IMAGES}}}",
    )  # fmt: skip
    generator = str(ROOT / "configs/demo/alitok.yaml")
    assert cache_tokens.main([generator, *overrides]) == ExitCode.FINISHED
    for command in ("train", "sample"):
        done = megavar(command, generator, *overrides)
        assert done.code == 0, done.output
    (chunk, *_) = sorted((tmp_path / "ar").rglob("*.npz"))
    with np.load(chunk) as arrays:
        tokens = next(arrays[name] for name in arrays.files if arrays[name].ndim == 2)
    assert tokens.dtype == np.uint16 and tokens.shape == (4, 73) and tokens.max() < 256


def test_vgts_first_stage_is_resumed_and_the_second_begins_with_it(tmp_path: Path) -> None:
    """Killed between two saved steps, with a discriminator at work, under ZeRO-1."""
    first, second = "configs/vgt/demo_ae_stage1.yaml", "configs/vgt/demo_ae_stage2.yaml"
    judge = "{adaptive: false, start_step: 3, base_channels: 16, layers: 2, norm_groups: 8, lecam_weight: 1.0}"
    own = ("recipe.encoder_weights=null", "evaluation.after_training=false")
    short = ("train.steps=8", f"recipe.adversarial={judge}", f"deepspeed={ROOT / 'configs/deepspeed/zero1.json'}", *own)
    run(first, *short, f"run.directory={tmp_path / 'whole'}")
    resumes_bitwise(first, short, tmp_path / "whole", 6, 8, VGTAETraining)
    one = read_weights(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole"))) == 8
    begin = f"train.initial_weights.path={tmp_path / 'whole'}"
    run(second, f"run.directory={tmp_path / 'second'}", "train.steps=2", begin, *own)
    tuned = read_weights(tmp_path / "second" / "checkpoints" / "step-00000002")
    changed = {name.split(".")[0] for name, value in tuned.items() if not torch.equal(value, one[name])}
    assert changed == {"projection", "decoder"}
