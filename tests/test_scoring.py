"""From conditions over samples and features to the result file: the same bytes from any number of ranks, and after an
interruption anywhere; suites with prompts of their own; what cannot be scored is refused before anything is drawn.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launchers import checks
from megavar import scoring
from megavar.__main__ import main as megavar_command
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import CheckpointError, ConfigError, DataError, ExitCode
from megavar.evaluation import adm
from megavar.evaluation.images import NpzImages, open_images
from megavar.evaluation.reference import Reference, save_reference
from megavar.evaluation.statistics import gaussian
from megavar.evaluation.suites import adm as suite
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.run_samples import stored_samples
from megavar.sampling.sampler import Sampler
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.distributed.harness import RankFailure, run_ranks
from tests.evaluation.conftest import SmallInception
from tests.tokenizers.public_files import save_public
from tools import evaluate_fid

pytestmark = pytest.mark.distributed
COUNT, CHUNK, KEEP = 23, 3, 5  # eight chunks, the last one short; the images of two of them are kept
CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tokenizer weights in the published layout, and a reference."""
    directory = tmp_path_factory.mktemp("inputs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_public(MultiScaleVQ(load_config(CONFIG).tokenizer), directory / "vae.pth")
        real = torch.randint(0, 256, (40, 3, 16, 16)).to(torch.uint8)
    network = SmallInception()
    features = network(real)
    statistics = gaussian(features.pool), gaussian(features.spatial)
    save_reference(directory / "ref.npz", Reference(*statistics, features.pool, {"of": "noise"}), network)
    return directory


def overrides(inputs, directory):
    chosen = {"name": "adm", "inception_weights": "w", "reference": str(inputs / "ref.npz")}
    return [
        f"run.directory={directory}", f"recipe.tokenizer_weights={inputs / 'vae.pth'}", "generator.depth=1",
        "generator.width=16", "generator.heads=2", "generator.experts=null", f"evaluation.suite={json.dumps(chosen)}",
        f"sampling.number={COUNT}", f"sampling.chunk_size={CHUNK}", f"sampling.keep_images={KEEP}",
    ]  # fmt: skip


class Stopped(Exception):
    pass


def run(given, interrupt):
    """Evaluate on every rank, perhaps stopped at the second chunk: before it is drawn, or before its features are."""

    class Network(SmallInception):
        calls = 0

        def forward(self, images):
            Network.calls += 1
            if interrupt == "features" and Network.calls == 2:
                raise Stopped
            return super().forward(images)

    draw, drawn = Sampler.draw, []

    def interrupted(self, indices):
        drawn.append(indices)
        if interrupt == "draw" and len(drawn) == 2:
            raise Stopped
        return draw(self, indices)

    Sampler.draw = interrupted
    suite.ADMInception = lambda weights, unofficial: Network()
    suite.check_weights = lambda weights, unofficial: "5" * 64
    place = environment()
    topology.initialize(ParallelConfig(), place)
    scoring.score(load_config(CONFIG, given), place, untrained=True)
    return len(drawn), Network.calls


def content(directory):
    # a rank that is killed while it writes leaves its unfinished file under another name
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def place_of_run(tmp_path_factory):
    return tmp_path_factory.mktemp("chain") / "run"  # the same for all, as result files name it


@pytest.fixture(scope="module")
def expected(inputs, place_of_run):
    """What one rank writes without interruption; the directory is moved away."""
    assert run_ranks(1, run, overrides(inputs, place_of_run), None) == [(8, 8)]
    kept = place_of_run.rename(place_of_run.with_name("one"))
    return kept, content(kept)


def test_result_names_everything_that_decides_the_number(expected, inputs):
    directory, _ = expected
    (path,) = directory.glob("scores-adm-megavar-untrained-*.json")
    result = json.loads(path.read_text())
    assert result["count"] == COUNT and result["class_histogram"] == {str(c): 3 if c < 3 else 2 for c in range(10)}
    assert result["rounding"] == "round" and result["tf32"] is False and len(result["extractor"]["sha256"]) == 64
    assert result["sampler"]["chunk_size"] == CHUNK and result["sampler"]["seed"] == 0
    assert result["sampler"]["conditions"] == {"kind": "class", "classes": 10}
    assert result["order"] == "image i has condition i: class i modulo 10"
    manifest = json.loads((samples_of(directory) / "manifest.json").read_text())
    assert manifest["conditions"]["classes"] == 10 and manifest["space"]["sides"] == [1, 2, 4]
    assert result["checkpoint"]["weights"] == "model" and result["checkpoint"]["precision"] == "fp32"
    assert result["checkpoint"]["tokenizer"]["file"] == "vae.pth" and len(result["reference"]["sha256"]) == 64
    assert {"fid@23@small", "sfid@23@small", "is@23@small", "precision@23@small", "recall@23@small"} <= set(
        result["metrics"]
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(expected, inputs, place_of_run, tmp_path, world_size):
    counts = run_ranks(world_size, run, overrides(inputs, place_of_run), None)
    assert sum(drawn for drawn, _ in counts) == sum(calls for _, calls in counts) == 8
    assert all(drawn == calls for drawn, calls in counts)  # each rank takes features of what it draws, no more
    found = content(place_of_run.rename(tmp_path / "run"))
    assert found == expected[1]


@pytest.mark.parametrize(("interrupt", "before", "after"), [("draw", 2, 3), ("features", 3, 1)])
def test_interrupted_sampling_continues_to_the_same_bytes(
    expected, inputs, place_of_run, tmp_path, interrupt, before, after
):
    with pytest.raises(RankFailure, match="Stopped"):
        run_ranks(before, run, overrides(inputs, place_of_run), interrupt)
    there = content(place_of_run)
    drawn = {name for name in there if "chunk_" in name and "features" not in name}
    measured = {name for name in there if "chunk_" in name and "features" in name}
    assert 0 < len(measured) <= len(drawn) < 8
    counts = run_ranks(after, run, overrides(inputs, place_of_run), None)
    assert sum(count for count, _ in counts) == 8 - len(drawn)
    assert sum(calls for _, calls in counts) == 8 - len(measured)
    found = content(place_of_run.rename(tmp_path / "run"))
    assert found == expected[1]


def samples_of(directory):
    return next((directory / "generated").iterdir())


def test_tools_decode_what_was_not_kept(expected, tmp_path):
    directory = samples_of(expected[0])
    assert sum("images" in np.load(path).files for path in directory.glob("chunk_*.npz")) == 2
    for order in ("shuffled", "interleaved"):
        out = tmp_path / f"{order}.npz"
        assert evaluate_fid.main(["export", "--images", str(directory), "--out", str(out), "--order", order]) == 0
    assert torch.equal(NpzImages(tmp_path / "interleaved.npz").labels, torch.arange(COUNT) % 10)
    # the exported images give the features that were taken while they were drawn
    images, network = NpzImages(tmp_path / "interleaved.npz"), SmallInception()
    store = next(directory.glob("features-*"))
    features = adm.collect_features(adm.ChunkStore.existing(store))
    for first in range(0, COUNT, CHUNK):
        last = min(first + CHUNK, COUNT)
        assert torch.equal(network(images.read(first, last)).pool, features.pool[first:last])


def test_tokens_are_not_decoded_by_another_tokenizer(expected, inputs, tmp_path):
    directory = tmp_path / "samples"
    shutil.copytree(samples_of(expected[0]), directory)
    other = torch.load(inputs / "vae.pth")
    torch.save({name: value + 1 for name, value in other.items()}, tmp_path / "vae.pth")
    described = json.loads((directory / "decoder.json").read_text())
    (directory / "decoder.json").write_text(json.dumps(described | {"weights": str(tmp_path / "vae.pth")}))
    opened = open_images(directory, lambda path: stored_samples(path, torch.device("cpu")))
    assert opened.read(0, CHUNK).shape == (CHUNK, 3, 16, 16)  # these were kept
    with pytest.raises(CheckpointError, match=r"weights of .tokenizer. were replaced"):
        opened.read(COUNT - 1, COUNT)
    (tmp_path / "vae.pth").unlink()
    with pytest.raises(DataError, match=r"vae\.pth, which do not exist"):
        opened.read(COUNT - 1, COUNT)


def geneval_prompts(path, texts):
    lines = [{"tag": "colors", "include": [], "prompt": text} for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"evaluation.suite={{name: geneval, prompts: {path}, per_prompt: 4}}"


def text_overrides(inputs, directory, suite):
    given = [value for value in overrides(inputs, directory) if not value.startswith("evaluation.suite=")]
    text = ["plugins=[tests.text_plugin]", "generator.name=text_var", "sampling={procedure: caption_lengths}"]
    return [*given[:-2], *text, "sampling.chunk_size=3", suite]


def score_text(given):
    place = environment()
    topology.initialize(ParallelConfig(), place)
    return scoring.score(load_config(CONFIG, given), place, untrained=True)


def test_prompts_of_a_suite_reach_the_generator_on_any_number_of_ranks(inputs, tmp_path):
    suite = geneval_prompts(tmp_path / "prompts.jsonl", ["a", "bcd", "ef"])
    place, found = tmp_path / "run", []
    for world_size in (1, 2):
        run_ranks(world_size, score_text, text_overrides(inputs, place, suite))
        found.append(content(place))
        directory = samples_of(place)
        chunks = [dict(np.load(path)) for path in sorted(directory.glob("chunk_*.npz"))]
        captions = np.concatenate([chunk["captions"] for chunk in chunks]).tolist()
        assert captions == ["a"] * 4 + ["bcd"] * 4 + ["ef"] * 4
        tokens = np.concatenate([chunk["tokens"] for chunk in chunks])
        lengths = np.array([len(caption) for caption in captions])[:, None]
        assert set((tokens - lengths).flatten().tolist()) == {0, 1, 2} and len(np.unique(tokens, axis=0)) == 12
        pictures = sorted((directory / "geneval").glob("*/samples/*.png"))
        images = np.concatenate([chunk["images"] for chunk in chunks])
        for path, image in zip(pictures, images, strict=True):
            with Image.open(path) as picture:
                assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), image)
        place.rename(tmp_path / f"of {world_size}")
    assert found[0] == found[1]


def test_a_directory_of_samples_belongs_to_one_suite(inputs, tmp_path):
    for name, texts in (("one", ["a", "b"]), ("two", ["a", "c"])):  # as many images of other prompts
        suite = geneval_prompts(tmp_path / f"{name}.jsonl", texts)
        run_ranks(1, score_text, text_overrides(inputs, tmp_path / "run", suite))
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("run/generated/*/manifest.json")]
    assert len(manifests) == 2 and len({manifest["conditions"]["sha256"] for manifest in manifests}) == 2
    assert [manifest["conditions"]["origin"] for manifest in manifests] == ["geneval"] * 2


def test_a_generator_of_classes_is_not_asked_for_prompts(inputs, tmp_path):
    suite = geneval_prompts(tmp_path / "prompts.jsonl", ["a"])
    config = load_config(CONFIG, [*overrides(inputs, tmp_path / "run"), suite])
    for refuse in (scoring.check, lambda config: scoring.score(config, environment())):
        with pytest.raises(ConfigError, match=r"suite.name=geneval asks for prompts, but generator.name=var draws cla"):
            refuse(config)
    assert not (tmp_path / "run").exists()


def check_text(given):
    scoring.check(load_config(CONFIG, given))


def test_a_generator_of_prompts_is_not_asked_for_classes(inputs, tmp_path):
    given = text_overrides(inputs, tmp_path / "run", "evaluation.suite={name: digits}")
    with pytest.raises(RankFailure, match=r"suite.name=digits asks for classes, but generator.name=text_var draws pro"):
        run_ranks(1, check_text, given)


def test_a_generator_of_other_classes_is_refused(inputs, tmp_path):
    given = [*overrides(inputs, tmp_path / "run"), "evaluation.suite={name: digits}", "generator.classes=7"]
    with pytest.raises(ConfigError, match=r"asks for 10 classes, but generator.name=var has 7"):
        scoring.check(load_config(CONFIG, given))


def test_what_is_missing_is_found_before_training(inputs, tmp_path):
    with pytest.raises(CheckpointError, match="weights w do not exist"):
        scoring.check(load_config(CONFIG, overrides(inputs, tmp_path / "run")))
    tokenizer = CONFIG.with_name("quickstart") / "tokenizer.yaml"
    with pytest.raises(ConfigError, match="inception_weights is not set"):
        scoring.check(load_config(tokenizer, ["evaluation.reconstruction.reference=r"]))
    scoring.check(load_config(CONFIG))
    scoring.check(load_config(tokenizer))


def test_all_that_is_missing_is_said_at_once(inputs, tmp_path, capsys):
    """By the check before training, and by a plan, which may be made where the files are not."""
    missing = [*overrides(inputs, tmp_path / "run"), "evaluation.suite.reference=r.npz"]
    with pytest.raises(CheckpointError) as caught:
        scoring.check(load_config(CONFIG, missing))
    assert "weights w do not exist" in str(caught.value) and "r.npz do not exist" in str(caught.value)
    tokenizer = CONFIG.with_name("quickstart") / "tokenizer.yaml"
    given = {"inception_weights": "w", "reference": "r.npz", "lpips_alex": {"backbone": "b.pth", "linear": "l.pth"}}
    data = [f"data.source={{name: image_folder, path: {tmp_path}}}", "evaluation.after_training=true"]
    config = load_config(tokenizer, [f"evaluation.reconstruction={json.dumps(given)}", *data])
    with pytest.raises(ConfigError) as caught:
        scoring.check(config)
    for problem in ("at least 63 pixels", "r.npz do not exist", "weights w do not exist", "b.pth does not exist",
                    "data.source.test_path"):  # fmt: skip
        assert problem in str(caught.value), problem
    with pytest.raises(ConfigError, match="at least 63 pixels"):
        checks.evaluation(config)
    assert checks.evaluation(load_config(tokenizer)) == "nothing is scored after training"
    arguments = ["plan", str(CONFIG), "--gpus", "1", *missing]
    assert megavar_command([*arguments, "evaluation.suite={name: shapes}"]) == ExitCode.CONFIGURATION
    assert "evaluation.suite.name=shapes" in capsys.readouterr().err
    assert megavar_command(arguments) == ExitCode.FINISHED
    assert "(evaluation): on this machine The Inception weights w do not exist" in capsys.readouterr().err
