"""A classifier that tells sets of images apart, against ranks, closed forms and simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score

from pipeline.evaluation.two_sample import auc, classifier_auc
from pipeline.stage import UserError


def normal(count, width, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator)
    features[:, 0] += shift
    return features


@pytest.mark.parametrize("step", [None, 0.5])  # None: no two scores are equal
def test_auc_is_the_mann_whitney_statistic(step):
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.4, 1, 37), rng.normal(0, 1, 53)
    if step:
        positive, negative = (step * np.round(each / step) for each in (positive, negative))
    value, error = auc(positive, negative)
    expected = mannwhitneyu(positive, negative).statistic / (37 * 53)
    assert value == pytest.approx(expected, rel=1e-12)
    truth = np.repeat([1, 0], [37, 53])
    scores = np.concatenate([positive, negative])
    assert value == pytest.approx(roc_auc_score(truth, scores), rel=1e-12)
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = wins.mean(1).var(ddof=1) / 37 + wins.mean(0).var(ddof=1) / 53  # DeLong et al. 1988
    assert error == pytest.approx(np.sqrt(variance), rel=1e-12)


def test_error_of_the_auc_is_its_spread_over_draws():
    rng = np.random.default_rng(0)
    found = np.array([auc(rng.normal(1, 1, 60), rng.normal(0, 1, 90)) for _ in range(600)])
    assert found[:, 0].mean() == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.005)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.1)


def test_equal_sets_cannot_be_told_apart():
    found = [classifier_auc(normal(100, 8, 2 * seed), normal(120, 8, 2 * seed + 1))
             for seed in range(40)]  # fmt: skip
    values = np.array([score.value for score in found])
    assert abs(values.mean() - 0.5) < 3 * values.std() / np.sqrt(40)
    covered = np.mean([score.interval[0] < 0.5 < score.interval[1] for score in found])
    assert covered >= 0.9
    half = np.mean([score.interval[1] - score.interval[0] for score in found]) / 2
    assert 0.9 < half / (1.96 * values.std()) < 1.6  # as wide as it should be, or a little wider
    assert classifier_auc(normal(60, 4, 0), normal(60, 4, 0)).value == 0.5  # the very same images


def test_disjoint_sets_are_always_told_apart():
    assert classifier_auc(normal(50, 5, 0), normal(40, 5, 1, shift=50)) == (1, (1, 1), None)


def test_shifted_gaussians_reach_the_best_possible_auc():
    a, b = normal(1500, 6, 0, shift=1.5), normal(1500, 6, 1)
    found = classifier_auc(a, b)
    assert found.interval[0] < norm.cdf(1.5 / np.sqrt(2)) < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.06
    mirrored = classifier_auc(b, a)
    assert mirrored.value == pytest.approx(found.value, abs=0.005)


def test_originals_in_training_do_not_give_reconstructions_away():
    # With an original in training and its reconstruction in the test, a classifier that knows
    # images by heart is wrong about it, and the AUC falls far below 0.5.
    real = normal(200, 150, 0)
    near = real + 0.05 * normal(200, 150, 1)
    assert abs(classifier_auc(near, real).value - 0.5) < 0.1
    assert classifier_auc(near[torch.randperm(200)], real).value < 0.4


def test_dead_features_and_unequal_counts_do_no_harm():
    a, b = normal(40, 4, 0, shift=3), normal(90, 4, 1)
    dead = [torch.cat([each, torch.full((len(each), 1), 7.0)], 1) for each in (a, b)]
    assert classifier_auc(*dead).value == pytest.approx(classifier_auc(a, b).value, abs=1e-6)
    assert classifier_auc(a.double(), b.double()).value > 0.9
    before = a.clone()
    classifier_auc(a, b)
    assert torch.equal(a, before)


def test_few_and_broken_features_are_refused():
    with pytest.raises(UserError, match="15 generated images are too few"):
        classifier_auc(normal(15, 3, 0), normal(50, 3, 1))
    broken = normal(50, 3, 0)
    broken[3, 1] = np.nan
    with pytest.raises(UserError, match="real image 3 are not finite"):
        classifier_auc(normal(50, 3, 1), broken)
