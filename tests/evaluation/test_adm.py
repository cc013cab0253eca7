"""The ADM metric set: definitions, torch-fidelity's numbers, and independence of ranks and interruptions."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from megavar.chunks import ChunkStore
from megavar.errors import DataError
from megavar.evaluation import adm
from megavar.evaluation.adm import Features, adm_metrics, collect_features, extract_features, torch_fidelity_metrics
from megavar.evaluation.images import NpzImages
from megavar.evaluation.reference import Reference, load_reference, save_reference
from megavar.evaluation.statistics import frechet_distance, gaussian, inception_score, precision_recall

COUNT, CHUNK = 13, 2


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (COUNT, 16, 16, 3), generator=generator).to(torch.uint8)
    path = tmp_path_factory.mktemp("images") / "samples.npz"
    np.savez(path, arr_0=pixels.numpy(), arr_1=np.arange(COUNT) % 3)
    return NpzImages(path)


@pytest.fixture(scope="module")
def store(images, small_inception, tmp_path_factory):
    store = ChunkStore.open(tmp_path_factory.mktemp("features"), count=COUNT, size=CHUNK, identity={})
    extract_features(store, images, small_inception, store.missing())
    return store


def fake(count, seed, shift=0.0):
    """Features of ``count`` images as if from the network."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(count, 24, generator=generator).abs() * 0.4 + shift
    spatial = torch.randn(count, 18, generator=generator).abs()
    return Features(pool, gaussian(pool.split(7)), gaussian(spatial.split(7)))


def reference_of(features):
    return Reference(features.pool_statistics, features.spatial_statistics, features.pool, {"kind": "test"})


@pytest.fixture(scope="module")
def pair():
    return fake(60, 1), fake(80, 2, shift=0.02)


@pytest.fixture(scope="module")
def metrics(pair, small_inception):
    generated, real = pair
    return adm_metrics(generated, reference_of(real), small_inception, labels=torch.arange(60) % 4)


def test_every_metric_is_its_definition_on_the_stored_features(pair, metrics, small_inception):
    generated, real = pair
    values, notes = metrics
    suffix = f"@60@{small_inception.name}"
    logits = small_inception.logits(generated.pool)
    assert set(values) == {
        key + suffix
        for key in (
            "fid",
            "sfid",
            "is",
            "is_deviation",
            "is_single_split",
            "is_interleaved",
            "precision",
            "recall",
            "precision_fp32",
            "recall_fp32",
        )
    }
    assert values["fid" + suffix] == frechet_distance(generated.pool_statistics, real.pool_statistics)
    assert values["sfid" + suffix] == frechet_distance(generated.spatial_statistics, real.spatial_statistics)
    assert values["is_single_split" + suffix] == inception_score(logits, splits=1)[0]
    order = torch.from_numpy(np.random.RandomState(2020).permutation(60))  # ten splits of torch-fidelity's own shuffle
    of_shuffle = inception_score(logits, splits=10, order=order)
    assert (values["is" + suffix], values["is_deviation" + suffix]) == of_shuffle
    single = precision_recall(generated.pool, real.pool)
    assert (values["precision_fp32" + suffix], values["recall_fp32" + suffix]) == single
    half = precision_recall(generated.pool, real.pool, half=True)
    assert (values["precision" + suffix], values["recall" + suffix]) == half
    assert any("60 images instead of 50000" in note for note in notes)
    assert any("80 reference images" in note for note in notes)


def test_lowered_precision_around_changes_no_number(pair, metrics, small_inception):
    generated, real = pair
    with torch.autocast("cpu", torch.bfloat16):
        assert adm_metrics(generated, reference_of(real), small_inception, labels=torch.arange(60) % 4) == metrics


def test_torch_fidelity_agrees_on_the_same_features(pair, metrics, small_inception):
    generated, real = pair
    theirs, _ = torch_fidelity_metrics(generated, reference_of(real), small_inception)
    ours, _ = metrics
    assert len(theirs) == 5
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-6), key


def test_keys_are_plain_for_the_usual_protocol_only(small_inception):
    official = type("Official", (), {"official": True, "name": "inception"})()
    assert adm.qualified({"fid": 1.0}, 50_000, official) == {"fid": 1.0}
    assert adm.qualified({"fid": 1.0}, 5_000, official) == {"fid@5000": 1.0}
    assert adm.qualified({"fid": 1.0}, 50_000, small_inception) == {f"fid@{small_inception.name}": 1.0}
    assert adm.count_notes(50_000) == []


def test_statistics_alone_give_no_precision(pair, small_inception):
    generated, real = pair
    values, notes = adm_metrics(generated, Reference(real.pool_statistics, None, None, {}), small_inception)
    assert not any(key.startswith(("sfid", "precision", "recall", "is_interleaved")) for key in values)
    assert any("statistics only" in note for note in notes)


def test_interleaved_order_takes_classes_in_turn():
    labels = torch.tensor([2, 2, 2, 0, 0, 1])
    assert adm.interleaved_order(labels).tolist() == [3, 5, 0, 4, 1, 2]
    assert torch.equal(adm.interleaved_order(torch.arange(50) % 7), torch.arange(50))


def test_collected_features_are_the_batch_statistics(store, images, small_inception):
    collected = collect_features(store)
    features = small_inception(images.read(4, 6))
    torch.testing.assert_close(collected.pool[4:6], features.pool, rtol=0, atol=0)
    spatial = torch.cat([torch.from_numpy(arrays["spatial"]) for arrays in store.read_all()])
    expected = gaussian(spatial)
    scale = expected.covariance.abs().max()
    assert (collected.spatial_statistics.covariance - expected.covariance).abs().max() < 1e-12 * scale
    assert collected.pool_statistics.count == COUNT


def test_real_network_fills_and_resumes_a_store(images, inception, tmp_path):
    store = ChunkStore.open(tmp_path, count=3, size=2, identity={})
    extract_features(store, images, inception, store.missing())
    before = store.path(0).read_bytes()
    store.path(0).unlink()
    extract_features(store, images, inception, store.missing())
    assert store.path(0).read_bytes() == before
    collected = collect_features(store)
    assert collected.pool.shape == (3, 2048) and collected.spatial_statistics.covariance.shape == (2023, 2023)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_assignment_to_ranks_and_any_interruption_give_the_same_bits(
    store, images, small_inception, tmp_path, world_size
):
    again = ChunkStore.open(tmp_path, count=COUNT, size=CHUNK, identity={})
    shares = [again.missing()[rank::world_size] for rank in range(world_size)]
    for mine in reversed(shares):
        stopped = iter(range(1))

        def stop_once(images, stopped=stopped):
            if next(stopped, None) is not None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract_features(again, images, small_inception, mine, on_progress=stop_once)
        assert not again.path(mine[1]).exists()
        extract_features(again, images, small_inception, mine[1:])
    real = reference_of(fake(40, 3))
    results = [json.dumps(adm_metrics(collect_features(s), real, small_inception)) for s in (store, again)]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def files(images, small_inception, store, tmp_path_factory):
    """The three kinds of reference files, of the same images."""
    directory = tmp_path_factory.mktemp("references")
    features = collect_features(store)
    mine = adm.reference_from(features, {"of": "test"})
    save_reference(directory / "own.npz", mine, small_inception)
    statistics = {"mu": mine.pool.mean.numpy().astype(np.float32), "sigma": mine.pool.covariance.numpy()}
    spatial = {"mu_s": mine.spatial.mean.numpy().astype(np.float32), "sigma_s": mine.spatial.covariance.numpy()}
    np.savez(directory / "mar.npz", **statistics)
    np.savez(directory / "adm.npz", arr_0=images.read(0, COUNT).permute(0, 2, 3, 1).numpy(), **statistics, **spatial)
    return directory, mine


def test_reference_files_of_all_kinds(files, small_inception, monkeypatch):
    directory, mine = files
    cpu = torch.device("cpu")
    own = load_reference(directory / "own.npz", small_inception, cpu)
    assert torch.equal(own.pool.mean, mine.pool.mean) and torch.equal(own.spatial.covariance, mine.spatial.covariance)
    assert torch.equal(own.pool_features, mine.pool_features) and own.identity["of"]["of"] == "test"
    mar = load_reference(directory / "mar.npz", small_inception, cpu)
    assert mar.spatial is None and mar.pool_features is None and mar.identity["kind"] == "statistics"
    assert frechet_distance(mar.pool, mine.pool) < 1e-6
    full = load_reference(directory / "adm.npz", small_inception, cpu)
    torch.testing.assert_close(full.pool_features, mine.pool_features)
    assert torch.equal(full.spatial.covariance, mine.spatial.covariance) and full.identity["kind"] == "adm"
    assert len(full.identity["sha256"]) == 64


def test_own_reference_of_other_weights_is_refused(files, small_inception):
    directory, _ = files
    other = type("Other", (nn.Module,), {"weights_sha256": "f" * 64})()
    with pytest.raises(DataError, match="use the same weights"):
        load_reference(directory / "own.npz", other, torch.device("cpu"))


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(files, small_inception, tmp_path, name, value):
    with np.load(files[0] / "own.npz") as file:
        content = dict(file)
    content[name] = content[name].copy()
    content[name].flat[3] = value
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(DataError, match=rf"{name} in .*x\.npz holds values that are not finite"):
        load_reference(tmp_path / "x.npz", small_inception, torch.device("cpu"))


def test_files_that_are_no_reference_are_refused(tmp_path, small_inception):
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    for name, message in (("small", r"shape \[64\]"), ("other", "holds x"), ("text", "readable"), ("no", "not exist")):
        with pytest.raises(DataError, match=message):
            load_reference(tmp_path / f"{name}.npz", small_inception, torch.device("cpu"))


def test_reference_images_are_drawn_by_seed(monkeypatch):
    monkeypatch.setattr(adm, "POOL_COUNT", 10)
    features = fake(30, 4)
    first, second, other = (adm.reference_from(features, {}, seed=seed).pool_features for seed in (0, 0, 1))
    assert first.shape == (10, 24) and torch.equal(first, second) and not torch.equal(first, other)
