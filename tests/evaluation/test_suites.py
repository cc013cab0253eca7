"""Suites by configuration: what fits is scored by one call, what does not fit is refused before sampling."""

import json

import numpy as np
import pytest
import torch
import torchvision

from megavar.chunks import ChunkStore
from megavar.config.data import DataConfig, DigitsSource, PhotographsSource
from megavar.config.evaluation import EvaluationConfig, PerceptualWeights, ReconstructionConfig
from megavar.config.loading import decode
from megavar.config.shapes import ShapesSource
from megavar.config.suites.adm import ADMSuite
from megavar.config.suites.classifier import ClassifierSuite
from megavar.config.suites.digits import DigitsSuite
from megavar.config.suites.dpg import DPGSuite
from megavar.config.suites.geneval import GenEvalSuite
from megavar.config.suites.shapes import ShapesSuite
from megavar.data.build import build_source
from megavar.errors import CheckpointError, ConfigError, DataError
from megavar.evaluation import classes, reconstruction_suite, suites
from megavar.evaluation.reconstruction_suite import score_tokenizer
from megavar.evaluation.shape_eval import true_scenes
from megavar.evaluation.suites import (
    check_suite,
    image_count,
    score_images,
    shape_prompts,
    suite_baselines,
    take_features,
)
from megavar.parallel.environment import Environment
from megavar.sampling.samples import Samples
from tests.evaluation.conftest import SmallInception

ONE = Environment(0, 1, 0, "single")
PHOTOGRAPHS = DataConfig(source=PhotographsSource(length=400, test_length=60, short_side=64), image_size=16)
CLASS_SHAPES = DataConfig(source=ShapesSource(conditioning="class"), image_size=32)
SHAPES = DataConfig(source=ShapesSource(length=100, test_length=40), image_size=32)


def as_chunks(directory, images, labels):
    store = ChunkStore.open(directory, count=len(images), size=32, identity={})
    for chunk in store.missing():
        first, last = store.range(chunk)
        store.write(chunk, {"images": images[first:last].numpy(), "labels": labels[first:last].numpy()})
    return Samples.stored(directory)


def real_images(data, split="test"):
    source = build_source(data, split)
    samples = [source.read(index) for index in range(len(source))]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    return images, torch.tensor([sample.label for sample in samples])


def test_digits_suite(tmp_path, extractor_directory):
    data = DataConfig()
    suite = DigitsSuite(extractor_cache=str(extractor_directory))
    images = as_chunks(tmp_path / "chunks", *real_images(data))
    scores = score_images(suite, data, images, ONE.device, work_directory=tmp_path)
    assert scores.metrics["fd64"] == pytest.approx(19.24, abs=0.1) and len(scores.extractor["sha256"]) == 64
    assert scores.reference["count"] == 1433 and scores.table
    assert suite_baselines(DigitsSuite(baselines=False), data, 50) == {}


def test_classifier_suite_names_the_source_and_sees_copies(tmp_path, extractor_directory, monkeypatch):
    monkeypatch.setattr(classes, "_STEPS", 80)
    suite = ClassifierSuite(reference_images=400, extractor_cache=str(extractor_directory))
    images = as_chunks(tmp_path / "chunks", *real_images(PHOTOGRAPHS))
    scores = score_images(suite, PHOTOGRAPHS, images, ONE.device, work_directory=tmp_path)
    keys = {f"{key}@photographs-cnn" for key in ("fid", "isc", "precision", "recall", "label_accuracy")}
    assert set(scores.metrics) == keys | {"nearest_train_distance"} == {metric.key for metric in scores.table}
    rows = suite_baselines(suite, PHOTOGRAPHS, 60)
    assert rows["held-out real"] == pytest.approx(scores.metrics)
    fid = {name: row["fid@photographs-cnn"] for name, row in rows.items()}
    assert fid["memoriser (train copies)"] < fid["held-out real"] < min(fid["class means"], fid["uniform noise"])
    assert rows["memoriser (train copies)"]["nearest_train_distance"] == 0 < scores.metrics["nearest_train_distance"]
    assert rows["held-out real"]["label_accuracy@photographs-cnn"] > 0.4


def test_shapes_suite_scores_prompts_in_index_order(tmp_path):
    suite = ShapesSuite(name="shapes", per_tag=5, per_prompt=2)
    prompts = shape_prompts(suite, SHAPES)
    doubled = [prompt for prompt in prompts for _ in range(2)]
    images = as_chunks(tmp_path / "chunks", true_scenes(doubled, 32), torch.full((len(doubled),), -1))
    scores = score_images(suite, SHAPES, images, ONE.device, work_directory=tmp_path)
    assert scores.metrics["strict"] == scores.metrics["lenient/position"] == 1
    assert len((tmp_path / "shape_eval.jsonl").read_text().splitlines()) == len(doubled)
    rows = suite_baselines(suite, SHAPES, 0)
    assert rows["right scenes"]["strict"] == 1 and rows["other captions"]["strict"] < 0.3


def test_adm_suite_keeps_features_and_qualifies_keys(tmp_path, small_inception, monkeypatch):
    monkeypatch.setattr(suites, "ADMInception", lambda weights, unofficial: small_inception)
    from megavar.evaluation import reference

    real, _ = real_images(PHOTOGRAPHS, "train")
    features = small_inception(real)
    statistics = [reference.gaussian(part) for part in (features.pool, features.spatial)]
    made = reference.Reference(*statistics, features.pool, {"of": "photographs"})
    reference.save_reference(tmp_path / "ref.npz", made, small_inception)
    images = as_chunks(tmp_path / "chunks", *real_images(PHOTOGRAPHS))
    for backend in ("megavar", "torch-fidelity"):
        suite = ADMSuite(name="adm", inception_weights="w", reference=str(tmp_path / "ref.npz"), backend=backend)
        take_features(suite, images, ONE, work_directory=tmp_path)
        scores = score_images(suite, PHOTOGRAPHS, images, ONE.device, work_directory=tmp_path)
        assert scores.metrics["fid@60@small"] > 0 and scores.reference["kind"] == "megavar"
        assert any("60 images instead of 50000" in note for note in scores.notes)
    assert (tmp_path / "features-small" / "chunk_000000.npz").exists()


def test_official_suites_emit_and_verify(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(name)
    lines = [{"tag": "colors", "include": [], "prompt": name} for name in "abcdef"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = as_chunks(tmp_path / "chunks", *(part[:12] for part in real_images(PHOTOGRAPHS)))
    geneval = GenEvalSuite(name="geneval", prompts=str(tmp_path / "metadata.jsonl"), per_prompt=2)
    dpg = DPGSuite(name="dpg", prompts=str(tmp_path / "prompts"))
    for suite in (geneval, dpg):
        check_suite(suite, SHAPES)
        assert image_count(suite, SHAPES, 70) == 12
        scores = score_images(suite, SHAPES, images, ONE.device, work_directory=tmp_path)
        assert scores.metrics == {} and any("nothing amiss" in note for note in scores.notes)
    assert len(list((tmp_path / "geneval").glob("*/samples/*.png"))) == 12 and (tmp_path / "dpg" / "b.png").exists()
    with pytest.raises(DataError, match=r"no \.txt files"):
        check_suite(DPGSuite(name="dpg", prompts=str(tmp_path)), SHAPES)


@pytest.mark.parametrize(
    ("suite", "data", "remedy"),
    [
        (DigitsSuite(), PHOTOGRAPHS, "classifier"),
        (ShapesSuite(name="shapes"), DataConfig(source=DigitsSource()), "classifier"),
        (ShapesSuite(name="shapes"), CLASS_SHAPES, "classifier"),
        (ClassifierSuite(), SHAPES, "shapes"),
        (ClassifierSuite(), DataConfig(source=DigitsSource()), "digits"),
    ],
)
def test_suites_that_do_not_fit_the_data_are_refused(suite, data, remedy):
    with pytest.raises(ConfigError, match=f"evaluation.suite.name={remedy}"):
        check_suite(suite, data)


def test_suites_that_fit_pass():
    check_suite(DigitsSuite(), DataConfig())
    check_suite(ClassifierSuite(), PHOTOGRAPHS)
    check_suite(ShapesSuite(name="shapes"), SHAPES)
    assert image_count(ClassifierSuite(), PHOTOGRAPHS, 70) == 70
    assert image_count(ShapesSuite(name="shapes", per_tag=2, per_prompt=3), SHAPES, 70) == 6 * 2 * 3


def test_missing_files_of_the_adm_suite_are_found_before_sampling(tmp_path, random_weights):
    np.savez(tmp_path / "mar.npz", mu=np.zeros(3), sigma=np.eye(3))
    given = {"name": "adm", "inception_weights": str(random_weights), "unofficial_weights": True}
    check_suite(ADMSuite(**given, reference=str(tmp_path / "mar.npz")), SHAPES)
    with pytest.raises(DataError, match=r"none\.npz do not exist"):
        check_suite(ADMSuite(**given, reference=str(tmp_path / "none.npz")), SHAPES)
    with pytest.raises(CheckpointError, match="do not exist"):
        check_suite(ADMSuite(**given | {"inception_weights": "w"}, reference=str(tmp_path / "mar.npz")), SHAPES)


def test_configuration_is_decoded_strictly():
    tree = {
        "samples": 64,
        "suite": {"name": "adm", "inception_weights": "w.pth", "reference": "r.npz"},
        "reconstruction": {"protocol": "vgt", "lpips_alex": {"backbone": "a", "linear": "b"}},
    }
    config = decode(tree, EvaluationConfig, "test")
    assert isinstance(config.suite, ADMSuite) and config.reconstruction.protocol == "vgt"
    for wrong in ({"suite": {"name": "fid"}}, {"reconstruction": {"protocol": "mine"}}, {"samples": 2}):
        with pytest.raises(ConfigError):
            decode(wrong, EvaluationConfig, "test")
    assert json.loads(config.model_dump_json())["suite"]["backend"] == "megavar"


def test_tokenizer_is_measured_by_the_configuration(tmp_path, extractor_directory):
    config = ReconstructionConfig(images=40, extractor_cache=str(extractor_directory), chunk_size=16)
    scores = {}
    for name, reconstruct in (("exact", lambda x: x), ("dark", lambda x: x - 0.2)):
        arguments = {"work_directory": tmp_path / name, "identity": {"tokenizer": name}}
        scores[name] = score_tokenizer(config, DataConfig(), reconstruct, ONE, **arguments).metrics
    assert scores["exact"]["ssim"] == 1 and "psnr" not in scores["exact"]
    assert 19 < scores["dark"]["psnr"] < 26 and scores["dark"]["rfid@digits-cnn"] > scores["exact"]["rfid@digits-cnn"]


def test_tokenizer_of_captioned_shapes_has_a_ceiling_instead_of_a_classifier(tmp_path):
    arguments = {"work_directory": tmp_path, "identity": {}}
    scores = score_tokenizer(ReconstructionConfig(images=20), SHAPES, lambda x: -x, ONE, **arguments)
    assert scores.metrics["ceiling/strict"] < 0.5 and "psnr" in scores.metrics
    assert not any(key.startswith("rfid") for key in scores.metrics)


@pytest.fixture(scope="module")
def perceptual_weights(tmp_path_factory):
    """Random files in the formats of torchvision and of the LPIPS package."""
    directory = tmp_path_factory.mktemp("lpips")
    alexnet = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    convolutions = {f"{place}.weight": torch.randn(o, i, k, k) * 0.05 for place, (o, i, k) in alexnet.items()}
    convolutions |= {f"{place}.bias": torch.zeros(shape[0]) for place, shape in alexnet.items()}
    vgg = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]).state_dict()
    given = {}
    for name, features, channels in (
        ("lpips_vgg", vgg, (64, 128, 256, 512, 512)), ("lpips_alex", convolutions, (64, 192, 384, 256, 256))
    ):  # fmt: skip
        torch.save({f"features.{key}": tensor for key, tensor in features.items()}, directory / f"{name}.pth")
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
        torch.save(linear, directory / f"{name}-linear.pth")
        paths = {"backbone": str(directory / f"{name}.pth"), "linear": str(directory / f"{name}-linear.pth")}
        given[name] = PerceptualWeights(**paths)
    return given


def test_every_reconstruction_metric_by_configuration(tmp_path, perceptual_weights, monkeypatch):
    class Network(SmallInception):  # decomposing covariances of 2048 dimensions takes half a minute on a busy core
        def __init__(self, weights, unofficial):
            super().__init__()

    monkeypatch.setattr(reconstruction_suite, "ADMInception", Network)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(24), sigma=np.eye(24))
    data = DataConfig(source=PhotographsSource(test_length=6, short_side=256), image_size=64)
    config = ReconstructionConfig(
        inception_weights="w", reference=str(tmp_path / "ref.npz"), chunk_size=4, **perceptual_weights
    )
    arguments = {"work_directory": tmp_path, "identity": {"tokenizer": "dark"}}
    scores = score_tokenizer(config, data, lambda x: x - 0.1, ONE, **arguments)
    keys = {"rfid@small", "rfid_adm@small", "psnr", "ssim", "ssim_dr2", "lpips_vgg", "lpips_alex"}
    assert set(scores.metrics) == keys and min(scores.metrics.values()) > 0
    assert scores.extractor["sha256"] == SmallInception.weights_sha256
    assert {len(value) for name in perceptual_weights for value in scores.extractor[name].values()} == {64}
    with pytest.raises(CheckpointError, match="images 0 to 3 are not finite"):
        score_tokenizer(config, data, lambda x: x * torch.nan, ONE, work_directory=tmp_path / "nan", identity={})


def test_reconstruction_settings_that_contradict_each_other_are_refused(tmp_path, perceptual_weights):
    arguments = {"work_directory": tmp_path, "identity": {}}
    for config, message in (
        (ReconstructionConfig(reference="r"), "inception_weights is not set"),
        (ReconstructionConfig(reference="r", inception_weights="w"), "r do not exist"),
        (ReconstructionConfig(inception_weights="w"), "weights w do not exist"),
        (ReconstructionConfig(lpips_alex=perceptual_weights["lpips_alex"]), "at least 63 pixels"),
    ):
        with pytest.raises((ConfigError, DataError, CheckpointError), match=message):
            score_tokenizer(config, PHOTOGRAPHS, lambda x: x, ONE, **arguments)
