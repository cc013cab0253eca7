"""Reconstruction metrics by configuration: what fits is measured by one call, what contradicts itself is refused."""

import json

import numpy as np
import pytest
import torch

from megavar.config.data import DataConfig, PhotographsSource
from megavar.config.evaluation import EvaluationConfig, ReconstructionConfig
from megavar.config.loading import decode
from megavar.config.suites.adm import ADMSuite
from megavar.errors import CheckpointError, ConfigError, DataError
from megavar.evaluation import reconstruction_suite
from megavar.evaluation.reconstruction_suite import score_tokenizer
from megavar.parallel.environment import Environment
from tests.evaluation.conftest import SmallInception
from tests.evaluation.suites.conftest import PHOTOGRAPHS, SHAPES
from tests.perceptual_files import write_perceptual_files

ONE = Environment(0, 1, 0, "single")


def test_configuration_is_decoded_strictly():
    tree = {
        "suite": {"name": "adm", "inception_weights": "w.pth", "reference": "r.npz"},
        "reconstruction": {"protocol": "vgt", "lpips_alex": {"backbone": "a", "linear": "b"}},
    }
    config = decode(tree, EvaluationConfig, "test")
    assert isinstance(config.suite, ADMSuite) and config.reconstruction.protocol == "vgt"
    for wrong in ({"suite": {"name": "fid"}}, {"reconstruction": {"protocol": "mine"}}, {"chunks": 2}):
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
    return write_perceptual_files(tmp_path_factory.mktemp("lpips"))


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
