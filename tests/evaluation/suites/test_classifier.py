import pytest
import torch

from megavar.config.data import DataConfig
from megavar.config.suites.classifier import ClassifierSuite
from megavar.errors import ConfigError
from megavar.evaluation import classes
from megavar.evaluation.suites.classifier import Classifier
from tests.evaluation.suites.conftest import PHOTOGRAPHS, SHAPES, real_images

CPU = torch.device("cpu")


def test_scores_name_the_source_and_see_copies(tmp_path, as_chunks, extractor_directory, monkeypatch):
    monkeypatch.setattr(classes, "_STEPS", 80)
    choice = ClassifierSuite(reference_images=400, extractor_cache=str(extractor_directory))
    suite = Classifier(choice, PHOTOGRAPHS)
    suite.check()
    assert suite.conditions().classes == 10
    scores = suite.score(as_chunks(*real_images(PHOTOGRAPHS)), CPU, tmp_path)
    keys = {f"{key}@photographs-cnn" for key in ("fid", "isc", "precision", "recall", "label_accuracy")}
    assert set(scores.metrics) == keys | {"nearest_train_distance"} == {metric.key for metric in scores.table}
    rows = suite.baselines(60)
    assert rows["held-out real"] == pytest.approx(scores.metrics)
    fid = {name: row["fid@photographs-cnn"] for name, row in rows.items()}
    assert fid["memoriser (train copies)"] < fid["held-out real"] < min(fid["class means"], fid["uniform noise"])
    assert rows["memoriser (train copies)"]["nearest_train_distance"] == 0 < scores.metrics["nearest_train_distance"]
    assert rows["held-out real"]["label_accuracy@photographs-cnn"] > 0.4


@pytest.mark.parametrize(("data", "remedy"), [(SHAPES, "shapes"), (DataConfig(), "digits")])
def test_data_without_classes_and_digits_are_refused(data, remedy):
    with pytest.raises(ConfigError, match=f"evaluation.suite.name={remedy}"):
        Classifier(ClassifierSuite(), data).check()
