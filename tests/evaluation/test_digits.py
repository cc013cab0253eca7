"""Scores of digits: the baselines of notes/evaluation.md section 6, and no way to look good by cheating."""

import pytest
import torch

from megavar.data.digits import Digits
from megavar.errors import DataError
from megavar.evaluation import digits
from megavar.evaluation.classifier import load_network
from megavar.evaluation.digits import METRICS, baselines, digits_extractor, digits_reference, evaluate_digits
from megavar.evaluation.statistics import frechet_distance, gaussian, inception_score, precision_recall
from megavar.evaluation.table import format_table, thresholds_missed


@pytest.fixture(scope="module")
def scores(extractor_directory):
    return baselines(1000, directory=extractor_directory)


def test_reference_is_the_training_split_in_its_published_units():
    reference = digits_reference()
    assert (len(reference.train), len(reference.test)) == (1433, 364)
    published = torch.from_numpy(Digits("train").original).flatten(1).double()
    assert (reference.train - published).abs().max() < 0.05  # rounding to uint8
    for side in (8, 16, 32):
        assert torch.equal(digits.grey_values(digits.as_images(reference.test, side)), reference.test)


# Columns of the table: FD64, accuracy, precision, recall, distance to the nearest training image. The table does not
# say how many images its samplers drew; with 1000 the tolerances below cover what other counts and seeds give.
@pytest.mark.parametrize(
    ("name", "expected", "tolerance"),
    [
        ("held-out real", (19.3, 0.989, 0.876, 0.930, 16.9), (0.1, 0.001, 0.002, 0.002, 0.1)),
        ("per-class Gaussian", (25.0, 0.993, 0.714, 0.678, 19.3), (4, 0.01, 0.03, 0.04, 0.3)),
        ("class means", (454.8, 1.0, 1.0, 0.0, 15.7), (6, 0.0, 0.0, 0.0, 0.1)),
        ("memoriser (train copies)", (3.3, 1.0, 1.0, 0.939, 0.0), (2, 0.0, 0.0, 0.05, 0.0)),
        ("uniform noise", (2585, 0.102, 0, 0, 58), (70, 0.04, 0, 0.01, 2)),
    ],
)
def test_baselines_reproduce_the_measured_table(scores, name, expected, tolerance):
    keys = ("fd64", "judge_accuracy", "precision@pixels64", "recall@pixels64", "nearest_train_distance")
    for key, value, allowed in zip(keys, expected, tolerance):
        assert scores[name][key] == pytest.approx(value, abs=allowed + 1e-9), key


def test_only_honest_samplers_meet_all_thresholds_together(scores):
    missed = {name: thresholds_missed(row, METRICS) for name, row in scores.items()}
    assert missed["held-out real"] == missed["per-class Gaussian"] == []
    assert missed["class means"] == ["fd64", "recall@pixels64"]
    assert missed["memoriser (train copies)"] == ["nearest_train_distance"]
    assert "judge_accuracy" in missed["uniform noise"] and "precision@pixels64" in missed["uniform noise"]


def test_extractor_scores_rank_the_baselines(scores):
    fid = {name: row["fid@digits-cnn"] for name, row in scores.items()}
    assert fid["held-out real"] < fid["per-class Gaussian"] < fid["class means"] < fid["uniform noise"]
    assert scores["held-out real"]["precision@digits-cnn"] > 0.85
    assert scores["class means"]["recall@digits-cnn"] == 0
    assert 6.5 < scores["held-out real"]["isc@digits-cnn"] < 10
    assert scores["uniform noise"]["isc@digits-cnn"] < 3


def test_extractor_scores_are_their_definitions(scores, extractor_directory):
    """On the trained network's features and logits: three neighbours, one split."""
    network, reference = load_network(digits_extractor(extractor_directory).path), digits_reference()
    with torch.no_grad():
        (features, logits), (real, _) = (network(digits.as_images(part)) for part in (reference.test, reference.train))
    row = scores["held-out real"]
    assert row["fid@digits-cnn"] == pytest.approx(frechet_distance(gaussian(features), gaussian(real)), rel=1e-4)
    assert row["isc@digits-cnn"] == pytest.approx(inception_score(logits, splits=1)[0], rel=1e-5)
    shares = precision_recall(features, real, neighbours=3)
    assert (row["precision@digits-cnn"], row["recall@digits-cnn"]) == pytest.approx(shares, abs=1e-6)


def test_wrong_labels_are_seen_by_the_judge_alone(scores, extractor_directory):
    reference = digits_reference()
    images = digits.as_images(reference.test)
    row = evaluate_digits(images, (reference.test_labels + 1) % 10, directory=extractor_directory)
    assert row["judge_accuracy"] < 0.05
    right = scores["held-out real"]
    assert {k: v for k, v in row.items() if k != "judge_accuracy"} == pytest.approx(
        {k: v for k, v in right.items() if k != "judge_accuracy"}
    )


def test_unusable_images_are_refused():
    labels = torch.zeros(20, dtype=torch.long)
    with pytest.raises(DataError, match="multiple of 8"):
        evaluate_digits(torch.zeros(20, 3, 12, 12, dtype=torch.uint8), labels)
    with pytest.raises(DataError, match="multiple of 8"):
        evaluate_digits(torch.zeros(20, 3, 16, 16), labels)
    with pytest.raises(DataError, match="at least 16"):
        evaluate_digits(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), labels[:3])


def test_extractor_classifies_held_out_digits(extractor_directory):
    assert digits_extractor(extractor_directory).test_accuracy >= 0.98


def test_table_shows_directions_thresholds_and_gaps(scores):
    text = format_table({**scores, "untrained": {"fd64": 900.0}}, METRICS)
    assert "fd64 ↓ ≤60" in text and "judge_accuracy ↑ ≥0.9" in text
    line = next(line for line in text.splitlines() if line.startswith("fd64"))
    assert line.split()[3:] == [
        "19.2",
        "✓",
        *line.split()[5:7],
        "450.7",
        "✗",
        *line.split()[9:11],
        *line.split()[11:13],
        "900.0",
        "✗",
    ]
    assert next(line for line in text.splitlines() if line.startswith("judge")).split()[-1] == "-"
    assert max(len(line) for line in text.splitlines()) < 120
