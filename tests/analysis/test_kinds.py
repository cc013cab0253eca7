"""The mathematics of the analyses on data whose answer is known."""

import math

import numpy as np
import pytest
import torch

from megavar.analysis.kinds.convergence import Curve, smoothed, speed_up, together
from megavar.analysis.kinds.embedding_replacement import nearest_others
from megavar.analysis.kinds.expert_load import load_metrics, normalized
from megavar.analysis.kinds.exposure_bias import given_places
from megavar.analysis.kinds.latent_clusters import LatentClusters
from megavar.analysis.kinds.latent_space import by_class, chance, effective_rank
from megavar.analysis.kinds.routing_maps import as_map, map_metrics
from megavar.analysis.kinds.scale_features import separation
from megavar.analysis.kinds.teacher_probe import accuracies
from megavar.analysis.latents import PIXELS, Shown, patches
from megavar.analysis.observation import undisturbed
from megavar.analysis.sequences import means
from megavar.analysis.similarity import linear_cka
from megavar.config.analyses.latent_clusters import LatentClustersAnalysis
from megavar.config.recipes.sar import SARConfig
from megavar.errors import ConfigError
from megavar.sampling.base import Known

SMOE = (11.35, 5.61, 9.13, 5.18, 5.71, 9.23, 11.32, 6.46)
STMOE = (7.92, 7.64, 11.56, 6.91, 6.44, 7.54, 8.31, 7.67)


@pytest.mark.parametrize(("loads", "variance"), [(SMOE, 6.62), (STMOE, 2.41)])
def test_loads_of_the_paper_give_its_variance(loads, variance):
    """MEPA Table 1: whatever the number of tokens was, and with the sample variance."""
    layers = np.array([loads, loads]) * np.array([[1000.0], [3000.0]])
    metrics = load_metrics(layers)
    assert metrics["variance"] == pytest.approx(variance, abs=0.006)
    assert [metrics[f"expert_{number}"] for number in range(1, 9)] == pytest.approx(loads, abs=0.01)


def test_uneven_layers_are_seen_although_their_mean_is_even():
    counts = np.array([[20, 0], [0, 20]])
    metrics = load_metrics(counts)
    assert metrics["variance"] == 0 and metrics["unused"] == 2
    assert metrics["variance_of_a_layer"] == pytest.approx(np.var([16, 0], ddof=1))
    assert normalized(counts[0]).sum() == 16


def test_maps_of_a_router_by_scale_have_no_places():
    by_scale = [np.stack([np.full((side, side), value) for value in given]) for side, given in
                ((1, (1.0, 0.0)), (2, (0.0, 1.0)))]  # fmt: skip
    assert map_metrics(by_scale) == {"experts_used": 2.0, "scale_bits": 1.0, "spatial_deviation": 0.0}
    by_place = [np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), np.array([[[0.0, 1.0]], [[1.0, 0.0]]])]
    metrics = map_metrics(by_place)
    assert metrics["scale_bits"] == 0 and metrics["spatial_deviation"] == pytest.approx(0.5)


def test_rows_are_laid_out_row_by_row():
    rows = np.arange(12).reshape(6, 2)
    assert as_map(rows).shape == (2, 1, 6)
    assert np.array_equal(as_map(rows[:4])[0], [[0, 2], [4, 6]])


def test_scales_that_lie_apart_are_told_from_those_that_do_not():
    points = np.random.default_rng(0).normal(size=(120, 6))
    scale = np.repeat([1, 2, 3], 40)
    mixed, apart = separation(points, scale), separation(points + 20 * np.eye(6)[scale], scale)
    assert apart["explained"] > 0.95 and apart["silhouette"] > 0.7 and apart["same_scale_neighbours"] == 1
    assert mixed["explained"] < 0.1 and mixed["silhouette"] < 0.05 and mixed["same_scale_neighbours"] < 0.5


def test_cka_is_that_of_gram_matrices():
    """Feature form against Kornblith's Eq. 4 on Gram matrices; blind to rotation and scale."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(30, 5)), random.normal(size=(30, 7))
    centre = np.eye(30) - 1 / 30
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))
    rotation = np.linalg.qr(random.normal(size=(5, 5)))[0]
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1)


def test_speed_up():
    steps = np.arange(1.0, 101)
    slow, fast = Curve(steps, steps, 100 - steps), Curve(steps, steps, 100 - 2 * steps)
    assert smoothed(slow.values)[-1] == pytest.approx(2)  # the mean of the last five
    assert speed_up(fast, slow) == pytest.approx(2, abs=0.05)
    assert math.isinf(speed_up(slow, fast))


def test_runs_of_a_name_are_their_mean_with_its_standard_error():
    one, two = (Curve(np.array(steps), np.array(steps) / 10, np.array(values)) for steps, values in
                (([10, 20, 30], [9.0, 5, 4]), ([20, 30, 40], [7.0, 8, 1])))  # fmt: skip
    mean = together([one, two])
    assert mean.steps.tolist() == [20, 30] and mean.epochs.tolist() == [2, 3] and mean.values.tolist() == [6, 6]
    assert mean.errors == pytest.approx([1, 2])  # half the difference of two values
    assert together([one]) is one


def test_probes_find_classes_where_there_are_any():
    """Nearest neighbours by direction, whatever the length; a linear probe also where directions say nothing."""
    random = np.random.default_rng(0)
    labels = np.arange(300) % 3
    directions = random.uniform(0.1, 10, (300, 1)) * (np.eye(3)[labels] + 0.1 * random.normal(size=(300, 3)))
    features = np.concatenate([directions, directions], 1)
    assert accuracies(features[:200], labels[:200], features[200:], labels[200:], 20)["knn"] == 1
    lengths = (10 + 5 * (labels == 2) + random.normal(size=300))[:, None] * (1 + 1e-3 * random.normal(size=(300, 3)))
    found = accuracies(lengths[:200], labels[:200] == 2, lengths[200:], labels[200:] == 2, 20)
    assert found["probe"] > 0.95 > 0.8 > found["knn"]
    nothing = accuracies(features[:200], labels[:200], features[200:], random.permutation(labels[200:]), 20)
    assert max(nothing.values()) < 0.6


def test_both_contexts_have_as_many_true_tokens():
    """reAR section 3.1: floor(r N), at the front or anywhere, other places for every sample."""
    samples = torch.arange(200)
    front, anywhere = (given_places(protocol, 0.45, samples, 9, seed=1) for protocol in ("perfect", "imperfect"))
    assert front.sum(1).unique().tolist() == anywhere.sum(1).unique().tolist() == [4]
    assert bool(front[:, :4].all()) and len(anywhere.unique(dim=0)) > 50
    assert (anywhere.double().mean(0) - 4 / 9).abs().max() < 0.15
    assert torch.equal(given_places("imperfect", 0.45, samples[7:9], 9, seed=1), anywhere[7:9])
    assert given_places("perfect", 1.0, samples, 10, 0).all()
    assert given_places("imperfect", 0.3, samples, 10, 0).sum() == 600
    drawn = Known(torch.arange(4)[None], torch.tensor([[True, False, True, False]])).put(torch.tensor([[9, 9]]), 2)
    assert drawn.tolist() == [[2, 9]]


def test_replacements_are_the_nearest_other_codes():
    vectors = torch.randn(13, 3, generator=torch.Generator().manual_seed(2))
    found = nearest_others(vectors, at_once=4)
    for number, vector in enumerate(vectors):
        cosines = [-2.0 if other == number else float(torch.cosine_similarity(vector, vectors[other], dim=0))
                   for other in range(13)]  # fmt: skip
        assert int(found[number]) == int(np.argmax(cosines))


def test_perplexity_is_over_all_tokens():
    parts = [(2, {"surprise": torch.tensor(3.0), "ctr": torch.tensor(1.0)}),
             (1, {"surprise": torch.tensor(0.0), "ctr": torch.tensor(0.5)})]  # fmt: skip
    assert means(parts) == {"ctr": pytest.approx(0.5), "perplexity": pytest.approx(math.e)}


def test_runs_are_compared_at_the_same_scales_and_without_noise():
    """Random lists of scales are functions of the step: at its last one every run would be shown others."""
    disturbed = SARConfig(tokenizer_weights="x", student_weight=0.5, scale_lists={"name": "flexvar"}, noise={})
    assert disturbed.noise is not None
    plain = undisturbed(disturbed)
    assert plain == SARConfig(tokenizer_weights="x", student_weight=0.5)
def test_latents_by_class_are_told_from_those_that_are_not():
    """Chance is what unrelated classes give; ten directions of unequal size count as fewer."""
    random = np.random.default_rng(0)
    labels, noise = np.arange(120) % 4, random.normal(size=(120, 6))
    apart, mixed = by_class(noise + 30 * np.eye(6)[labels], labels, 0), by_class(noise, labels, 0)
    assert apart["nmi"] == pytest.approx(1) == apart["ami"] and abs(mixed["ami"]) < 0.05
    assert apart["neighbours"] == 1 and apart["silhouette"] > 0.8
    assert mixed["nmi"] < 0.1 and mixed["silhouette"] < 0.05
    assert mixed["neighbours"] == pytest.approx(chance(labels), abs=0.06)
    assert effective_rank(random.normal(size=(20000, 10))) == pytest.approx(10, rel=0.01)
    assert effective_rank(random.normal(size=(500, 1)) * np.ones((1, 10))) == pytest.approx(1)


def test_clusters_find_the_halves_of_images_whatever_their_brightness():
    """The left halves point one way, the right halves another; lengths say nothing. The larger half is cluster 0."""
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, :, 6:] = 200
    pixels = patches(images, 16, "here")
    assert pixels.shape == (5, 16, 12) and pixels[0, 3, 0] > 0.5 and pixels[0, 2, 0] == -1
    directions = np.where(np.arange(16)[:, None] % 4 == 3, [[1.0, 0.0]], [[0.0, 1.0]])
    vectors = directions * np.random.default_rng(0).uniform(1, 9, (5, 16, 1))
    analysis = LatentClusters(LatentClustersAnalysis(clusters=2))
    found = analysis.clustered(vectors)
    assert np.array_equal(found, np.tile(np.arange(16) % 4 == 3, (5, 1)).astype(int))
    measured = analysis.measured(vectors, found, Shown(images, np.arange(5) % 2, {PIXELS: pixels}))
    assert measured == {"silhouette": pytest.approx(1), "colours": pytest.approx(1), "nmi": pytest.approx(0, abs=1e-9)}
    with pytest.raises(ConfigError, match="no square map"):
        patches(images, 15, "here")
