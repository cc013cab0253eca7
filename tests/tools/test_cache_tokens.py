"""The caching tool as a person runs it."""

import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavar.assembly import Assembly
from megavar.config.choice import resolve
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.data.build import build_source, build_transform, of_images
from megavar.data.pixels import to_float
from megavar.data.reading import SampleReader
from megavar.errors import ConfigError, DataError, ExitCode
from megavar.parallel import topology
from megavar.parallel.environment import Environment
from megavar.parallel.logical import initialize_parameters
from megavar.parallel.seeds import uniform
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from megavar.transformer.defaults import usual_initial_value
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


TERM = """[{name: semantic_guidance, projection: {hidden: [8]}, scales: last, teacher: {name: self_distilled, grid: 4,
weights: TEACHER, network: {width: 16, depth: 1, heads: 2}}}]"""


@pytest.fixture
def guided(config, tmp_path):
    """Overrides of the run with a term and a cache of its teacher's features."""
    term = TERM.replace("\n", " ").replace("TEACHER", str(tmp_path / "teacher.safetensors"))
    given = [f"recipe.terms={term}", f"data.source.features={tmp_path / 'features'}"]
    (section,) = load_config(config, given).recipe.terms
    teacher = resolve(section.teacher)(section.teacher)
    initialize_parameters(teacher, usual_initial_value, seed=1)
    save_file(dict(teacher.named_parameters()), tmp_path / "teacher.safetensors")
    return given


@pytest.mark.usefixtures("single_process")
def test_a_teachers_features_are_those_of_the_views_beside_them(config, guided, tmp_path, capsys):
    """Training on tokens and features gives what training on the images gives, which one augmentation shows to both."""
    for more in ([], ["--teacher"]):
        assert cache_tokens.main([str(config), *guided, *more, "--rows-per-part", "16"]) == ExitCode.FINISHED
    assert "40 samples x 4 views of features [16, 16]" in capsys.readouterr().out
    run = load_config(config, guided)
    cached, images = build_source(run.data), build_source(of_images(run.data))
    transform, seed = build_transform(run.data), run.train.seed
    reader = {source: SampleReader(source, transform, seed=seed) for source in (cached, images)}
    mesh = topology.initialize(ParallelConfig(), Environment(0, 1, 0, "single"))
    term = {source: Assembly(run, source, torch.device("cpu"), mesh).terms()[0] for source in reader}
    seen = 0
    for epoch in range(8):
        rows = torch.arange(40)
        stored = reader[cached].read(torch.full((40,), epoch), rows)
        assert stored.images is None and stored.features.dtype == torch.float32
        view = choose_views(seed, epoch, rows)
        for number in set(view.tolist()):  # view v is what the transform makes of epoch v
            mine = view == number
            fresh = reader[images].read(torch.full((int(mine.sum()),), number), rows[mine])
            fresh = replace(fresh, images=to_float(fresh.images))
            exact = term[images].prepare(fresh, None).features
            found = term[cached].prepare(replace(stored, features=stored.features[mine]), None).features
            torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-3)
            seen += len(exact)
    assert seen == 320

    flip_bit(tmp_path / "features" / "part-00001.bin", 999)
    assert cache_tokens.main([str(config), *guided, "--teacher", "--verify", "--rows", "0"]) == ExitCode.CONFIGURATION
    assert cache_tokens.main([str(config), *guided, "--teacher", "--repair"]) == ExitCode.FINISHED
    tensors = load_file(tmp_path / "teacher.safetensors")
    save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1}, tmp_path / "teacher.safetensors")
    with pytest.raises(ConfigError, match="made by another teacher than the one that a term of this run names"):
        Assembly(run, cached, torch.device("cpu"), mesh).terms()
    other = load_config(config, [*guided, f"data.source.features={tmp_path / 'cache'}"])
    with pytest.raises(DataError, match="does not hold a teacher's features of the views in"):
        build_source(other.data)


def choose_views(seed, epoch, rows):
    drawn = uniform(seed, "augmentation", torch.full((len(rows), 1), epoch), rows[:, None], torch.arange(3))
    return (drawn[:, 0] * 4).floor().to(torch.int64)


def test_features_need_a_place_and_one_teacher(config, guided, capsys):
    assert cache_tokens.main([str(config), "--teacher"]) == ExitCode.CONFIGURATION
    assert "have 0. Give a configuration whose terms have one." in capsys.readouterr().err
    assert cache_tokens.main([str(config), guided[0], "--teacher"]) == ExitCode.CONFIGURATION
    assert "Set data.source.features, for example to" in capsys.readouterr().err


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
