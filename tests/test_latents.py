"""What is read from latents: against closed forms, brute force and scikit-learn's own models."""

import itertools

import numpy as np
import pytest
from scipy import integrate, linalg, stats
from sklearn.covariance import empirical_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import average_precision_score

from pipeline.data.faces import FACTOR_NAMES, factors, sample_face
from pipeline.evaluation import latents as module
from pipeline.evaluation.latents import (
    attribute_vectors,
    dci,
    fit_mixture,
    linear_probe,
    mutual_information_gap,
    sample_density,
    wasserstein_to_prior,
)

NAN = float("nan")


def every_combination(*sizes, copies=1):
    """All combinations of classes: the columns are balanced, and independent without any error."""
    return np.repeat(list(itertools.product(*map(range, sizes))), copies, axis=0).astype(np.float32)


# The mutual information gap.


def test_the_gap_is_one_for_a_copy_beside_independent_latents():
    table = every_combination(2, 3, 4, 5)
    latents = np.stack([-2.5 * table[:, 2], table[:, 3], table[:, 0] + 7, table[:, 1]], axis=1)
    found = mutual_information_gap(latents, table[:, :3])
    np.testing.assert_allclose(found.gaps, 1, rtol=1e-12)
    assert found.mean == pytest.approx(1, rel=1e-12) and found.left_out == ()


def test_the_gap_is_what_the_best_latent_knows_beyond_the_second():
    """Four classes: the second latent knows one of their two bits; then both know all."""
    table = every_combination(4, 3)
    factor, other = table[:, :1], table[:, 1:]
    half = np.hstack([other, factor, factor >= 2])
    assert mutual_information_gap(half, factor).mean == pytest.approx(1 / 2, rel=1e-12)
    twice = np.hstack([factor, other, 3 - factor])
    assert mutual_information_gap(twice, factor).mean == pytest.approx(0, abs=1e-12)


def test_the_gap_against_brute_force_entropies():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((300, 4)).astype(np.float32)
    classes = np.round(latents[:, 0] + rng.standard_normal(300)).clip(-2, 2)
    quantity = latents[:, 1] * 0.7 + rng.standard_normal(300)
    numbers = rng.permutation(300)  # whole, and too many to be classes
    truth = np.stack([classes, quantity, numbers], axis=1).astype(np.float32)
    truth[rng.uniform(size=truth.shape) < 0.2] = NAN
    found = mutual_information_gap(latents, truth)

    for column, factor in enumerate(truth.T):
        known = ~np.isnan(factor)
        information = []
        for latent in latents.T.astype(np.float64):
            low, high = latent.min(), latent.max()  # of all rows
            inside = ((latent[known] - low) / (high - low) * 20).astype(int).clip(max=19)
            value = factor[known].astype(np.float64)
            if column > 0:
                value = np.floor((value - value.min()) / np.ptp(value) * 20).clip(max=19)
            joint = np.unique(np.stack([inside, value]), axis=1, return_counts=True)[1]
            parts = [np.unique(part, return_counts=True)[1] for part in (inside, value)]
            entropies = [stats.entropy(counts) for counts in (*parts, joint)]
            information.append(entropies[0] + entropies[1] - entropies[2])
        first, second = sorted(information, reverse=True)[:2]
        assert found.gaps[column] == pytest.approx((first - second) / entropies[1], rel=1e-9)
    assert found.mean == pytest.approx(found.gaps.mean())


def test_factors_of_a_single_value_are_left_out_and_named():
    table = every_combination(2, 3, 4)
    truth = np.column_stack([np.full(24, 5.0), table[:, 1], np.full(24, NAN), table[:, 2]])
    truth[:7, 0] = NAN
    latents = table[:, ::-1]
    found = mutual_information_gap(latents, truth)
    assert found.left_out == (0, 2) and np.isnan(found.gaps[[0, 2]]).all()
    assert found.mean == pytest.approx(1, rel=1e-12)
    scores = dci(latents, truth, latents, truth, seed=0)
    assert scores.left_out == (0, 2) and np.isnan(scores.importances[:, [0, 2]]).all()
    assert np.isfinite([scores.disentanglement, scores.completeness, scores.informativeness]).all()
    with pytest.raises(ValueError, match="none of the 1 factors varies"):
        mutual_information_gap(latents, truth[:, :1])


def test_the_drawn_faces_are_classes_and_quantities_as_they_were_drawn():
    table = np.array([list(factors(sample_face(0, i)).values()) for i in range(400)], np.float32)
    discrete = {
        name for name, v in zip(FACTOR_NAMES, table.T, strict=True) if module._is_discrete(v)
    }
    whole = {name for name, v in factors(sample_face(0, 0)).items()
             if isinstance(getattr(sample_face(0, 0), name), int)}  # fmt: skip
    assert discrete == whole and len(whole) == 13
    found = mutual_information_gap(3 * table[:, ::4] + 1, table[:, ::4])
    assert found.gaps.min() > 0.5 and found.left_out == ()


# DCI.


def halves(*columns):
    """Even rows to train on, odd rows to test on."""
    table = np.column_stack(columns)
    return table[::2], table[1::2]


def score(latents, truth):
    (train, test), (train_truth, test_truth) = halves(latents), halves(truth)
    return dci(train, train_truth, test, test_truth, seed=0)


def drawn_factors(count=1200):
    rng = np.random.default_rng(1)
    return rng, np.column_stack([rng.integers(0, 4, count), rng.uniform(0, 3, count)])


def test_dci_of_copies_is_near_one_and_of_their_rotation_far_below():
    rng, truth = drawn_factors()
    noise = rng.standard_normal((len(truth), 2))
    copies = np.column_stack([noise[:, 0], truth[:, 1], noise[:, 1], 2 * truth[:, 0]])
    found = score(copies, truth)
    for value in (found.disentanglement, found.completeness, found.informativeness):
        assert 0.97 < value <= 1
    assert (found.importances.argmax(0) == (3, 1)).all()
    np.testing.assert_allclose(found.importances.sum(0), 1)

    standard = (truth - truth.mean(0)) / truth.std(0)
    turn = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    turned = score(np.column_stack([standard @ turn, noise]), truth)
    assert turned.disentanglement < 0.5 and turned.completeness < 0.6
    assert turned.informativeness > 0.7  # nothing is lost, only mixed


def test_disentanglement_is_of_latents_and_completeness_of_factors():
    """One latent for both factors; then two latents for each."""
    rng, truth = drawn_factors()
    noise = rng.standard_normal((len(truth), 3))
    both = score(np.column_stack([10 * truth[:, 0] + truth[:, 1], noise]), truth)
    assert both.disentanglement < 0.1 and both.completeness > 0.9

    bits = np.column_stack([truth[:, 0] % 2, truth[:, 0] // 2])
    steps = np.floor(truth[:, 1] * 2)
    parts = np.column_stack([bits, steps % 2 + 0.1 * noise[:, 0], steps // 2])
    several = score(parts, np.column_stack([truth[:, 0], steps]))
    assert several.disentanglement > 0.95 and several.completeness < 0.75


def test_dci_against_the_equations_written_as_sums():
    rng, truth = drawn_factors(300)
    third = rng.integers(0, 3, len(truth))  # in no latent
    latents = np.column_stack([truth.sum(1), truth[:, 0] * truth[:, 1], rng.uniform(size=300)])
    found = score(latents, np.column_stack([truth, third]))
    weights, (dimensions, count) = found.importances, found.importances.shape
    expected = 0.0
    for i in range(dimensions):
        share = weights[i] / weights[i].sum()
        own = 1 + sum(p * np.log(p) / np.log(count) for p in share if p > 0)
        expected += weights[i].sum() / weights.sum() * own
    assert found.disentanglement == pytest.approx(expected)
    for j in range(count):
        share = weights[:, j] / weights[:, j].sum()
        own = 1 + sum(p * np.log(p) / np.log(dimensions) for p in share if p > 0)
        assert found.factor_completeness[j] == pytest.approx(own)
    assert found.completeness == pytest.approx(found.factor_completeness.mean())
    assert found.informativeness == pytest.approx(found.factor_informativeness.mean())
    assert found.factor_informativeness[2] < 0.1 < 0.5 < found.factor_informativeness[:2].min()


def test_constant_latents_tell_nothing():
    _, truth = drawn_factors(200)
    found = score(np.ones((200, 3)), truth)
    assert found.disentanglement == 0 and found.completeness == pytest.approx(0, abs=1e-12)
    assert found.informativeness <= 1e-9
    assert mutual_information_gap(np.ones((200, 3)), truth).mean == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unit", [1, 0.5])  # a class, and a quantity
@pytest.mark.parametrize("sizes", [(2, 3, 4), (3, 3, 3, 3)])
def test_importances_are_shares_also_of_a_factor_that_no_latent_separates(sizes, unit):
    """The last factor is independent of the latents exactly: all gain in the trees is rounding."""
    table = every_combination(*sizes)
    latents, truth = table[:, :-1], table[:, [0, -1]] * unit
    found = dci(latents, truth, latents, truth, seed=0)
    assert found.importances.min() >= 0
    assert set(np.round(found.importances.sum(0), 9)) <= {0, 1}
    for value in (found.disentanglement, found.completeness, *found.factor_completeness):
        assert -1e-12 <= value <= 1 + 1e-12
    assert found.factor_informativeness[0] > 0.99 and found.factor_informativeness[1] < 0.1


def test_dci_does_not_see_rows_without_the_factor():
    rng, truth = drawn_factors(300)
    latents = truth + 0.3 * rng.standard_normal(truth.shape)
    expected = score(latents[:200], truth[:200])
    hidden = truth.copy()
    hidden[200:] = NAN
    found = score(latents, hidden)
    np.testing.assert_array_equal(found.importances, expected.importances)
    np.testing.assert_array_equal(found.factor_informativeness, expected.factor_informativeness)


# The linear probe.


def signs(values):
    return np.where(values > 0, 1, -1).astype(np.int8)


def test_the_probe_is_perfect_where_attributes_are_linear():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3000, 5)) * (1, 100, 1e-3, 1, 1) + (0, 9, 0, 0, -4)
    which = features[:, :3] / (1, 100, 1e-3) - (0, 0.09, 1.2)
    clear = (np.abs(which) > 0.3).all(1)
    features, labels = features[clear], signs(which[clear])
    found = linear_probe(features[:900], labels[:900], features[900:], labels[900:])
    assert (found.balanced_accuracy[:2] == 1).all()  # and the rare one, off the middle:
    assert found.balanced_accuracy[2] > 0.95
    assert (found.average_precision > 0.999).all()
    np.testing.assert_allclose(found.positives, (labels[900:] > 0).mean(0))
    assert found.mean_balanced_accuracy == pytest.approx(found.balanced_accuracy.mean())
    assert found.mean_average_precision == pytest.approx(found.average_precision.mean())


@pytest.mark.parametrize("dimensions", [4, 700])
def test_the_probe_is_at_chance_on_random_labels(dimensions):
    """Also where the features outnumber the rows and fit all of them, and for rare attributes."""
    rng = np.random.default_rng(1)
    features = rng.standard_normal((4600, dimensions)).astype(np.float32)
    labels = signs(rng.uniform(size=(4600, 6)) - (0.5, 0.5, 0.5, 0.9, 0.9, 0.9))
    found = linear_probe(features[:600], labels[:600], features[600:], labels[600:])
    error = 0.5 * np.sqrt(1 / 400 + 1 / 3600)  # of a balanced accuracy of the rare ones
    assert (np.abs(found.balanced_accuracy - 0.5) < 3.5 * error).all()
    np.testing.assert_allclose(found.average_precision, found.positives, atol=0.035)


@pytest.mark.parametrize("dimensions", [5, 150])
def test_the_probe_is_discriminant_analysis_with_a_shrunken_covariance(dimensions, monkeypatch):
    """Penalty a on n balanced rows: (n S + a I) is n / (1 - s) times the covariance shrunken by s,
    where a = n s / (1 - s) mean(diagonal of S)."""
    monkeypatch.setattr(module, "PENALTIES", (0.5,))
    rng = np.random.default_rng(2)
    held = np.arange(400) % 10 == 9
    labels = np.empty((400, 1), np.int8)
    for rows in (held, ~held):
        labels[rows, 0] = signs(np.arange(rows.sum()) % 2 - 0.5)
    features = rng.standard_normal((400, dimensions)) * rng.uniform(0.5, 2, dimensions)
    features[:, :4] += 0.3 * labels
    found = linear_probe(features[:100], labels[:100], features[100:], labels[100:])

    features = (features - features[:100].mean(0)) / features[:100].std(0)
    side, held[100:] = labels[:, 0] > 0, False
    fitted = ~held & (np.arange(400) < 100)
    sides = [features[fitted & rows] for rows in (side, ~side)]
    variance = np.mean([empirical_covariance(rows).trace() / dimensions for rows in sides])
    ratio = 0.5 * dimensions / (90 * variance)
    analysis = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=ratio / (1 + ratio), priors=[0.5, 0.5]
    ).fit(features[fitted], side[fitted])
    scores = features @ analysis.coef_[0]
    above = scores > (scores[held & side].mean() + scores[held & ~side].mean()) / 2
    recalls = [(above == side)[100:][rows[100:]].mean() for rows in (side, ~side)]
    assert found.balanced_accuracy[0] == pytest.approx(np.mean(recalls), rel=1e-12)
    expected = average_precision_score(side[100:], scores[100:])
    assert found.average_precision[0] == pytest.approx(expected, rel=1e-9)
    assert 0.6 < expected < 0.99, "too easy or too hard to tell one classifier from another"


def test_the_probe_chooses_a_penalty_that_suits_the_features():
    """Many features of noise beside one that tells: the smallest penalty fits the noise."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((1000, 200))
    labels = signs(features[:, :1] + rng.standard_normal((1000, 1)))
    parts = (features[:250], labels[:250], features[250:], labels[250:])
    precision = {}
    for penalties in [(1e-4,), (10.0,), (1e-4, 10.0)]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PENALTIES", penalties)
            precision[penalties] = linear_probe(*parts).mean_average_precision
    assert precision[(1e-4, 10.0)] == precision[(10.0,)] > precision[(1e-4,)] + 0.02


def test_the_probe_drops_unknown_rows_and_names_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(module, "PENALTIES", (1.0,))  # attributes share the choice of one
    rng = np.random.default_rng(4)
    features, directions = rng.standard_normal((600, 3)), rng.standard_normal((3, 5))
    hidden = rng.uniform(size=600) < 0.4
    # far out on both sides: taken for zeros, these rows would turn the fit away from its direction
    features[hidden] += 9 * rng.choice([-1, 1], (hidden.sum(), 1)) * directions[:, 3]
    truth = signs(features @ directions + 0.5 * rng.standard_normal((600, 5)))
    truth[:, 1] = 1  # constant
    truth[400:, 2] = -1  # constant in the test rows
    unknown, lies = truth.copy(), truth.copy()
    unknown[hidden, 3], lies[hidden, 3] = 0, -truth[hidden, 3]

    def probe(labels):
        return linear_probe(features[:400], labels[:400], features[400:], labels[400:])

    found = probe(unknown)
    assert found.left_out == (1, 2)
    for values in found[:3]:
        assert np.isnan(values[[1, 2]]).all() and np.isfinite(values[[0, 3, 4]]).all()
    for column in (0, 3, 4):  # as if the other attributes were not there
        alone = probe(unknown[:, [column]])
        assert alone.average_precision[0] == pytest.approx(found.average_precision[column])
    assert found.balanced_accuracy[3] > 0.8 > probe(lies).balanced_accuracy[3]
    with pytest.raises(ValueError, match="none of the 2 attributes varies"):
        probe(truth[:, 1:3])
    with pytest.raises(ValueError, match="none of the 5 attributes varies"):
        linear_probe(features[:5], truth[:5], features[400:], truth[400:])


def test_attribute_vectors_are_differences_of_means():
    latents = np.array([[1, 2], [3, 4], [5, 9], [100, 100]], np.float32)
    attributes = np.array([[1, -1, 1], [-1, -1, 1], [1, -1, 0], [0, 0, -1]])
    found = attribute_vectors(latents, attributes)
    np.testing.assert_allclose(found, [[0, 1.5], [NAN, NAN], [-98, -97]])


# Densities and the distance to the prior.


def correlated(count, seed=0):
    """Draws of a Gaussian, its mean and covariance."""
    rng = np.random.default_rng(seed)
    mean, root = np.array([3.0, -1, 0.5]), np.array([[2.0, 0, 0], [1, 0.5, 0], [-1, 0.2, 0.1]])
    return rng.standard_normal((count, 3)) @ root.T + mean, mean, root @ root.T


def test_a_gaussian_has_the_moments_of_the_latents_and_their_density():
    latents = correlated(400)[0]
    density = fit_mixture(latents.astype(np.float32), 1, seed=0)
    own_mean, own_covariance = latents.mean(0), np.cov(latents.T, ddof=0)
    expected = stats.multivariate_normal(own_mean, own_covariance).logpdf(latents)
    np.testing.assert_allclose(density.score_samples(latents), expected, rtol=1e-3)
    samples = sample_density(density, 20_000, seed=0)
    assert samples.shape == (20_000, 3) and samples.dtype == np.float32
    deviations = np.sqrt(np.diag(own_covariance))
    assert (np.abs(samples.mean(0) - own_mean) < 4 * deviations / np.sqrt(20_000)).all()
    scale = np.outer(deviations, deviations)
    assert (np.abs(np.cov(samples.T) - own_covariance) < 4 * scale * np.sqrt(2 / 20_000)).all()
    np.testing.assert_array_equal(samples, sample_density(density, 20_000, seed=0))
    assert (samples != sample_density(density, 20_000, seed=1)).any(1).all()
    assert density.random_state == 0, "sampling changed the density"


def two_clusters():
    rng = np.random.default_rng(5)
    return np.concatenate([rng.standard_normal((300, 2)) - 20, rng.standard_normal((100, 2)) + 20])


def test_any_part_of_the_samples_has_all_components_in_their_shares():
    density = fit_mixture(two_clusters(), components=2, seed=0)
    assert sorted(density.weights_) == pytest.approx([0.25, 0.75])
    samples = sample_density(density, 4000, seed=0)
    for part in np.split(samples[:, 0] > 0, 4):
        assert part.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 1000))
    inside = np.minimum(np.abs(samples - 20), np.abs(samples + 20))
    assert inside.max() < 6, "samples lie in the clusters, not between them"


def test_a_density_does_not_depend_on_the_scale_of_the_latents():
    latents = two_clusters()
    density, small = (fit_mixture(scale * latents, 2, seed=0) for scale in (1, 2.0**-12))
    np.testing.assert_allclose(
        sample_density(small, 50, seed=3) * 2.0**12, sample_density(density, 50, seed=3), rtol=1e-5
    )


@pytest.mark.parametrize("steps", [1, 500])
def test_a_mixture_that_has_not_converged_is_told_in_a_line(steps, monkeypatch, capsys, recwarn):
    monkeypatch.setattr(module, "EM_STEPS", steps)
    density = fit_mixture(correlated(400)[0], 3, seed=0)  # of one Gaussian: slow
    told = "a mixture of 3 Gaussians has not converged in 1 steps of EM\n"
    assert capsys.readouterr().out == (told if steps == 1 else "") and not recwarn.list
    assert np.isfinite(sample_density(density, 10, seed=0)).all()


def test_too_few_latents_for_a_density_are_refused():
    latents = correlated(39)[0]
    with pytest.raises(ValueError, match="40 latents, got 39"):
        fit_mixture(latents, components=10, seed=0)
    with pytest.raises(ValueError, match="n_components"):
        fit_mixture(latents, components=0, seed=0)
    with pytest.raises(ValueError, match="4 latents, got 3"):
        fit_mixture(latents[:3], 1, seed=0)


def with_moments(mean, covariance, count=500):
    """Latents (count, D) of exactly this mean and covariance."""
    draws = np.random.default_rng(6).standard_normal((count, len(mean)))
    draws -= draws.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(draws.T)), draws.T)
    return (linalg.sqrtm(np.asarray(covariance)) @ white).T + mean


def test_the_gaussian_distance_in_closed_form():
    translated = with_moments([3.0, -4.0], np.eye(2))
    assert wasserstein_to_prior(translated).gaussian == pytest.approx(5)
    scaled = with_moments([0.0, 0, 1], np.diag([4.0, 0.25, 9]))
    assert wasserstein_to_prior(scaled).gaussian == pytest.approx(np.sqrt(1 + 0.25 + 4 + 1))
    _, mean, covariance = correlated(1)
    root = np.real(linalg.sqrtm(covariance))
    expected = np.sqrt(mean @ mean + np.trace(covariance + np.eye(3) - 2 * root))
    assert wasserstein_to_prior(with_moments(mean, covariance)).gaussian == pytest.approx(expected)
    assert wasserstein_to_prior(with_moments(np.zeros(3), np.eye(3))).gaussian < 1e-6
    line = np.outer(
        with_moments([0.0, 0], np.eye(2))[:, 0], [1.0, 2, 3, -1, 0.5]
    )  # four of no variance
    length = np.sqrt(1 + 4 + 9 + 1 + 0.25)
    assert wasserstein_to_prior(line).gaussian == pytest.approx(np.sqrt((length - 1) ** 2 + 4))


def test_the_sliced_distance_of_few_latents_against_integration():
    """One dimension: the integral of (latent - quantile)^2 over probabilities, latents sorted."""
    latents = np.array([0.3, -1.7, 2.5, 0.3, -0.1])
    expected = 0.0
    for rank, latent in enumerate(sorted(latents)):
        ends = stats.norm.ppf([rank / 5, (rank + 1) / 5])
        expected += integrate.quad(lambda q, x=latent: (x - q) ** 2 * stats.norm.pdf(q), *ends)[0]
    found = wasserstein_to_prior(latents[:, None])
    assert found.sliced == pytest.approx(np.sqrt(expected), rel=1e-7)


def test_the_sliced_distance_of_a_translation():
    """A centred set moved by t along u adds (t·u)^2 to the square, and the squares along all axes
    add up to |t|^2."""
    centred = with_moments(np.zeros(4), np.eye(4))
    base = wasserstein_to_prior(centred).sliced
    grown = [wasserstein_to_prior(centred + 3 * axis).sliced ** 2 - base**2 for axis in np.eye(4)]
    assert sum(grown) == pytest.approx(9, rel=1e-9)
    # and |t|^2 / D each, with the spread of 500 squared cosines: variance 1/16 in 4 dimensions
    np.testing.assert_allclose(grown, 9 / 4, atol=4 * 9 * np.sqrt(1 / 16 / 500))


def test_the_sliced_distance_sees_what_two_moments_do_not():
    corners = every_combination(2, 2, copies=250) * 2.0 - 1
    draws = with_moments(np.zeros(2), np.eye(2), 1000)
    found, floor = wasserstein_to_prior(corners), wasserstein_to_prior(draws)
    assert found.gaussian < 0.01 and floor.sliced < 0.1 < 0.2 < found.sliced
    assert wasserstein_to_prior(corners) == found
    assert wasserstein_to_prior(corners, seed=1).sliced != found.sliced


# Hostile input.


def test_broken_latents_are_refused():
    good, labels = np.zeros((4, 2)), np.ones((4, 3))
    for bad in (np.zeros(4), np.zeros((0, 2)), np.array([[0, NAN]] * 4), np.full((4, 2), np.inf)):
        for call in (
            lambda z: mutual_information_gap(z, labels),
            lambda z: dci(good, labels, z, labels, seed=0),
            lambda z: linear_probe(z, labels, good, labels),
            lambda z: attribute_vectors(z, labels),
            lambda latents: fit_mixture(latents, 1, seed=0),
            wasserstein_to_prior,
        ):
            with pytest.raises(ValueError, match="latents must be finite"):
                call(bad)
    for rows in (labels[:3], labels[:, 0]):
        with pytest.raises(ValueError, match="4 latents do not go with labels"):
            mutual_information_gap(good, rows)
    for call in (lambda z, t: mutual_information_gap(z, t), lambda z, t: dci(z, t, z, t, seed=0)):
        with pytest.raises(ValueError, match="at least 2"):
            call(good[:, :1], every_combination(2, 2))
    with pytest.raises(ValueError, match="2 varying factors"):
        dci(good, every_combination(4), good, every_combination(4), seed=0)
    with pytest.raises(ValueError, match="at least 2 latents"):
        wasserstein_to_prior(good[:1])
