"""The caching tool as a person runs it."""

import multiprocessing
import os

import pytest
import torch

from megavar.config.loading import load_config
from megavar.config.token_space import TokenSpace
from megavar.data.build import build_source
from megavar.errors import ConfigError, ExitCode
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.sources.originals import content_of, flip_bit, write_class_folders
from tests.tokenizers.public_files import save_public
from tools import cache_tokens

CONFIG = """
run: {name: cached}
recipe: {name: mepa, tokenizer_weights: WEIGHTS}
generator: {name: var, depth: 1, width: 16, heads: 2, classes: 10}
tokenizer:
  name: multiscale_vq
  scales: [1, 2, 4]
  vocabulary_size: 300
  code_dimension: 8
  base_channels: 8
  channel_multipliers: [1, 1, 2]
  residual_blocks: 1
  norm_groups: 4
  lowest_level_attention: false
  middle_attention: false
data:
  source: {name: cache, path: CACHE, views: 4, images: {name: photographs, length: 40, short_side: 128}}
  transform: {name: var}
  image_size: 16
train: {steps: 1, global_batch_size: 8}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    text = CONFIG.replace("WEIGHTS", str(tmp_path / "tokenizer.pth")).replace("CACHE", str(tmp_path / "cache"))
    path.write_text(text)
    torch.manual_seed(0)
    save_public(MultiScaleVQ(load_config(path).tokenizer), tmp_path / "tokenizer.pth")
    return path


def test_make_verify_and_repair(config, tmp_path, capsys):
    arguments = [str(config), "--rows-per-part", "16"]
    assert cache_tokens.main(arguments) == ExitCode.FINISHED
    assert "40 samples x 4 views of tokens [21]" in capsys.readouterr().out
    assert build_source(load_config(config).data).read(3).tokens.shape == (4, 21)
    assert cache_tokens.main([*arguments, "--verify", "--rows", "30"]) == ExitCode.FINISHED
    assert "3 parts hashed" in capsys.readouterr().out
    before = content_of(tmp_path / "cache")
    flip_bit(tmp_path / "cache" / "part-00001.bin", 999)
    assert cache_tokens.main([*arguments, "--verify", "--rows", "0"]) == ExitCode.CONFIGURATION
    assert "part-00001.bin" in capsys.readouterr().out
    assert cache_tokens.main([*arguments, "--repair"]) == ExitCode.FINISHED
    assert content_of(tmp_path / "cache") == before
    assert cache_tokens.main([*arguments, "--repair"]) == ExitCode.FINISHED


def _as_rank(rank, arguments):
    place = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_ADDR": "nobody", "MASTER_PORT": 1}  # no meeting
    os.environ |= {name: str(value) for name, value in place.items()}
    os._exit(cache_tokens.main(arguments))


def test_ranks_share_the_work(config, tmp_path):
    arguments = [str(config), "--rows-per-part", "8"]
    assert cache_tokens.main([*arguments, f"data.source.path={tmp_path / 'alone'}"]) == ExitCode.FINISHED
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_as_rank, args=(rank, arguments)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    assert content_of(tmp_path / "cache") == content_of(tmp_path / "alone")


def test_what_is_wrong_is_one_paragraph(config, tmp_path, capsys):
    assert cache_tokens.main([str(config), "data.source={name: digits}"]) == ExitCode.CONFIGURATION
    assert "data.source.name is 'digits'" in capsys.readouterr().err
    assert cache_tokens.main([str(config), "--verify"]) == ExitCode.CONFIGURATION
    assert "not a finished cache" in capsys.readouterr().err
    assert cache_tokens.main([str(config), "data.source.content=latents"]) == ExitCode.FINISHED
    assert cache_tokens.main([str(config)]) == ExitCode.CONFIGURATION
    assert "content 'latents' -> 'tokens'" in capsys.readouterr().err
    torch.save({}, tmp_path / "tokenizer.pth")
    assert cache_tokens.main([str(config)]) == ExitCode.CONFIGURATION
    assert not list((tmp_path / "cache").glob(".progress"))


def test_vectors_are_cached_as_latents(config):
    space = TokenSpace("latent", (4,), 16, None, 8, 16)
    with pytest.raises(ConfigError, match=r"tokens of this tokenizer are vectors. Set data\.source\.content=latents"):
        cache_tokens.encoder(None, "tokens", space)


def test_damage_is_named_and_has_the_outcome_of_the_policy(config, tmp_path, capsys, caplog):
    """Truncated, empty and HTML files among images; which sample stands in does not depend on workers."""
    images = write_class_folders(tmp_path / "images", 20)
    paths = sorted(path for path in images.rglob("*.*"))
    whole = paths[3].read_bytes()
    for path, content in ((paths[3], whole[: len(whole) // 2]), (paths[7], b""), (paths[11], b"<html>no</html>")):
        path.write_bytes(content)

    def source(name):
        folder = f"{{name: image_folder, path: {images}}}"
        return f"data.source={{name: cache, path: {tmp_path / name}, views: 2, images: {folder}}}"

    assert cache_tokens.main([str(config), source("cache")]) == ExitCode.CONFIGURATION
    said = capsys.readouterr().err.splitlines()[-1]
    assert paths[3].relative_to(images).as_posix() in said and "skip-and-count" in said
    contents = []
    for workers in (0, 1):
        given = [str(config), source(str(workers)), "data.damaged_samples=skip-and-count"]
        assert cache_tokens.main([*given, f"data.workers={workers}"]) == ExitCode.FINISHED
        contents.append(content_of(tmp_path / str(workers)))
    assert contents[0] == contents[1]
    assert caplog.text.count("stands in for it") >= 3
