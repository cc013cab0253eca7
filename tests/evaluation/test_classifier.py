"""Extractors trained on the spot: deterministic, cached whole or not at all, never used when damaged."""

import json

import pytest
import torch

from megavar.evaluation import classifier
from megavar.evaluation.classifier import Recipe, load_network, trained_extractor
from megavar.evaluation.fidelity import fidelity_metrics

RECIPE = Recipe(resolution=8, num_classes=2, width=8, feature_dimension=8, steps=20, batch=16)


def dark_and_bright(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 90, (count, 3, 8, 8), generator=generator)
    return (noise + 120 * labels[:, None, None, None]).to(torch.uint8), labels


@pytest.fixture
def data():
    return dark_and_bright(64, 0), dark_and_bright(40, 1)


def test_training_is_deterministic_and_learns(tmp_path, data):
    first = trained_extractor("toy-a-cnn", RECIPE, *data, directory=tmp_path / "1")
    with torch.no_grad():  # as whoever scores a tokenizer is
        second = trained_extractor("toy-a-cnn", RECIPE, *data, directory=tmp_path / "2")
    assert first.sha256 == second.sha256 and first.path.name == second.path.name
    assert first.test_accuracy >= 0.9
    torch.rand(1)
    state = torch.random.get_rng_state()
    trained_extractor("toy-a-cnn", RECIPE, *data, directory=tmp_path / "3")
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are untouched


def test_cache_is_used_and_every_ingredient_names_another_file(tmp_path, data, monkeypatch):
    train, test = data
    kept = trained_extractor("toy-b-cnn", RECIPE, train, test, directory=tmp_path)
    other = [
        trained_extractor("toy-b-cnn", RECIPE, train, test, seed=1, directory=tmp_path),
        trained_extractor("toy-b-cnn", Recipe(8, 2, 8, 8, steps=21, batch=16), train, test, directory=tmp_path),
        trained_extractor("toy-b-cnn", RECIPE, (train[0].flip(0), train[1]), test, directory=tmp_path),
    ]
    assert len({extractor.path for extractor in [kept, *other]}) == 4
    monkeypatch.setattr(classifier, "train_network", lambda *args, **kwargs: pytest.fail("trained again"))
    assert trained_extractor("toy-b-cnn", RECIPE, train, test, directory=tmp_path) == kept


@pytest.mark.parametrize("damage", ["flip", "truncate", "no record", "broken record"])
def test_damaged_cache_is_replaced(tmp_path, data, damage):
    kept = trained_extractor("toy-c-cnn", RECIPE, *data, directory=tmp_path)
    record, content = kept.path.with_suffix(".json"), kept.path.read_bytes()
    if damage == "flip":
        kept.path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "truncate":
        kept.path.write_bytes(content[:-100])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text('{"sha256":')
    assert trained_extractor("toy-c-cnn", RECIPE, *data, directory=tmp_path) == kept
    assert kept.path.read_bytes() == content
    assert json.loads(record.read_text())["sha256"] == kept.sha256


def test_torch_fidelity_runs_on_the_registered_name(tmp_path, data):
    (images, _), (test, _) = data
    extractor = trained_extractor("toy-d-cnn", RECIPE, *data, directory=tmp_path)
    same = fidelity_metrics(images, images, extractor)
    assert set(same) == {f"{key}@toy-d-cnn" for key in ("fid", "isc", "precision", "recall")}
    assert same["precision@toy-d-cnn"] == same["recall@toy-d-cnn"] == 1
    assert abs(same["fid@toy-d-cnn"]) < 1e-5
    # torch-fidelity's first input is what was generated: half the classes gives full precision and half the recall
    half = fidelity_metrics(test[::2], test, extractor)
    assert half["precision@toy-d-cnn"] == 1 and half["recall@toy-d-cnn"] < 0.7
    with pytest.raises(ValueError, match="more than 3"):
        fidelity_metrics(images[:3], images, extractor)


def test_other_image_sizes_are_brought_to_the_training_resolution(tmp_path, data):
    network = load_network(trained_extractor("toy-e-cnn", RECIPE, *data, directory=tmp_path).path)
    images = data[0][0][:4]
    enlarged = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for small, large in zip(network(images), network(enlarged)):
        torch.testing.assert_close(small, large)
