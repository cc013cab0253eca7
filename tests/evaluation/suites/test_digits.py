import pytest
import torch

from megavar.config.data import DataConfig
from megavar.config.suites.digits import DigitsSuite
from megavar.errors import ConfigError
from megavar.evaluation.suites.digits import Digits
from tests.evaluation.suites.conftest import PHOTOGRAPHS, real_images

CPU = torch.device("cpu")
DATA = DataConfig()


def test_digits_are_scored_by_class(tmp_path, as_chunks, extractor_directory):
    suite = Digits(DigitsSuite(extractor_cache=str(extractor_directory)), DATA)
    suite.check()
    scores = suite.score(as_chunks(*real_images(DATA)), CPU, tmp_path)
    assert scores.metrics["fd64"] == pytest.approx(19.24, abs=0.1) and len(scores.extractor["sha256"]) == 64
    assert scores.reference["count"] == 1433 and scores.table
    assert suite.conditions().classes == 10 and suite.label == "digits"
    assert Digits(DigitsSuite(baselines=False), DATA).baselines(50) == {}


def test_images_without_classes_are_refused(tmp_path, as_chunks):
    with pytest.raises(ConfigError, match="needs the class of every image"):
        Digits(DigitsSuite(), DATA).score(as_chunks(real_images(DATA)[0]), CPU, tmp_path)


def test_other_data_are_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.suite\.name=classifier"):
        Digits(DigitsSuite(), PHOTOGRAPHS).check()
