"""The arithmetic of the scores against closed forms, numpy, and torch-fidelity."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from megavar.evaluation import statistics
from megavar.evaluation.statistics import Gaussian, frechet_distance, gaussian, inception_score, precision_recall


def features(count, dimensions, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator) / dimensions**0.5
    return (torch.randn(count, dimensions, generator=generator) @ mixing).relu() + shift


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    first = Gaussian(torch.tensor([1.0, 2.0, 3.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double(), 10)
    second = Gaussian(torch.zeros(3).double(), torch.diag(torch.tensor([4.0, 4.0, 0.0])).double(), 10)
    expected = 14 + (1 - 2) ** 2 + 0 + 3**2  # |m|^2 + sum of (sigma1 - sigma2)^2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_rotated_gaussian_is_symmetric_and_zero_on_itself():
    first, second = gaussian(features(300, 12, 0)), gaussian(features(200, 12, 1))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-10)
    assert frechet_distance(first, second) > 0.01
    assert abs(frechet_distance(first, first)) < 1e-10


def test_streaming_equals_batch_even_far_from_the_origin():
    x = features(1000, 20, 2, shift=1000.0)
    streamed = gaussian(x.split([1, 7, 300, 692]))
    assert np.allclose(streamed.mean, x.double().mean(0), rtol=1e-14, atol=0)
    expected = np.cov(x.double().numpy(), rowvar=False)
    assert np.abs(streamed.covariance.numpy() - expected).max() < 1e-12 * np.abs(expected).max()


def test_frechet_distance_agrees_with_torch_fidelity():
    x, y = features(400, 24, 3), features(300, 24, 4)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
    logits = torch.eye(7).repeat(30, 1) * 1000
    assert inception_score(logits, splits=3)[0] == pytest.approx(7, rel=1e-12)
    by_class = torch.arange(210) % 7
    mean, deviation = inception_score(logits, splits=7, order=torch.argsort(by_class, stable=True))
    assert (mean, deviation) == pytest.approx((1, 0))  # sorted by class every split holds one class
    assert inception_score(torch.zeros(50, 7), splits=5) == pytest.approx((1, 0))


def test_inception_score_agrees_with_torch_fidelity_on_its_own_permutation():
    logits = 3 * torch.randn(503, 11, generator=torch.Generator().manual_seed(5))
    order = torch.from_numpy(np.random.RandomState(2020).permutation(503))
    mean, deviation = inception_score(logits, splits=10, order=order)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_identical_sets_have_precision_and_recall_one_and_distant_sets_zero():
    x = features(100, 8, 6)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x, half=True) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_precision_and_recall_of_a_half_covered_line():
    real = torch.arange(100.0)[:, None]
    generated = torch.arange(50.0)[:, None] + 0.5
    precision, recall = precision_recall(generated, real)
    assert precision == 1
    assert recall == 0.53  # the last ball, around 49.5, reaches 3 to its third neighbour 46.5, so it covers 50, 51, 52


@pytest.mark.parametrize("block", [2**26, 1000])
def test_precision_and_recall_agree_with_torch_fidelity_for_any_block_size(monkeypatch, block):
    monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", block)
    generated, real = features(150, 16, 7, shift=0.05), features(220, 16, 8)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    precision, recall = precision_recall(generated, real)
    assert 0 < precision < 1 and 0 < recall < 1
    assert precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_half_precision_distances_only_round_and_fall_back_where_they_overflow():
    generated, real = features(150, 16, 9), features(220, 16, 10)
    single, half = precision_recall(generated, real), precision_recall(generated, real, half=True)
    assert half != single  # the rounding is visible ...
    assert np.allclose(half, single, atol=0.05)  # ... and small
    overflowing = precision_recall(generated * 300, real * 300, half=True)
    assert overflowing == precision_recall(generated * 300, real * 300)


def adm_precision_recall(generated, real):
    """ADM's own steps in numpy, every operation rounded to float16."""

    def distances(u, v):
        u, v = u.numpy().astype(np.float16), v.numpy().astype(np.float16)
        squares_u, squares_v = (np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v))
        products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        return np.maximum(squares_u[:, None] - np.float16(2) * products + squares_v[None, :], np.float16(0))

    def radii(x):
        return np.partition(distances(x, x), range(4), axis=1)[:, 3]

    between = distances(real, generated)
    inside = (between <= radii(real)[:, None]).any(axis=0)
    covered = (between <= radii(generated)[None, :]).any(axis=1)
    return inside.mean(), covered.mean()


@pytest.mark.parametrize("block", [2**26, 1000])
def test_half_precision_is_that_of_adm(monkeypatch, block):
    monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", block)
    for seed in range(5):
        generated, real = features(150, 64, seed, shift=0.05), features(220, 64, seed + 50)
        assert precision_recall(generated, real, half=True) == adm_precision_recall(generated, real)


@pytest.mark.parametrize(("first", "second"), [(30, 45), (30, 200), (200, 30)])
def test_frechet_distance_of_singular_covariances_is_exact(first, second):
    """Fewer images than dimensions: the trace of the root is the nuclear norm of the product of the data matrices."""
    x, y = features(first, 120, 11).double(), features(second, 120, 12, shift=0.1).double()
    roots = [(z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + roots[0].square().sum() + roots[1].square().sum() - 2 * cross
    assert frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(float(expected), rel=1e-6)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="more than 3 generated"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(torch.zeros(9, 2))
    with pytest.raises(ValueError, match="at least 2"):
        gaussian(torch.zeros(1, 2))
    assert math.isfinite(frechet_distance(gaussian(torch.zeros(5, 2)), gaussian(torch.ones(5, 2))))
