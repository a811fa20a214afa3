"""What can be read from latents: factors, attributes, a density, and their distance to the prior.

In: arrays of latents (N, D), one row per image, beside what is known of the images. Out: figures.

    mutual_information_gap(latents, factors).mean       one latent per factor?
    dci(*train, *test, seed=0).disentanglement          one factor per latent?
    linear_probe(*train, *test).mean_balanced_accuracy  which attributes are linear in the latents?
    sample_density(fit_mixture(latents, 10, seed=0), count, seed=1)   new latents for an autoencoder
    wasserstein_to_prior(latents)                       how far is q(z) from N(0, I)?

What cannot be scored is left out of the means, is NaN in the figures per factor or attribute, and
its position is in `left_out`. Broken input is a ValueError.
"""

import warnings
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    mutual_info_score,
    r2_score,
)
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler

MAX_CLASSES = 20  # a factor of whole numbers with at most so many values is discrete
TREES, LEAF_SIZE = 50, 5  # of DCI
PENALTIES = (0.1, 1.0, 10.0)  # of the linear probe, times the number of features
EM_STEPS = 500  # of a mixture, at most; scikit-learn's 100 have been too few for ten Gaussians
HELD_OUT = 10  # one training row of so many chooses the probe's penalty and thresholds


def _check(latents: np.ndarray, targets: np.ndarray | None = None) -> None:
    """ValueError unless the latents (N, D) are finite and the targets are (N, F)."""
    if latents.ndim != 2 or not latents.size or not np.isfinite(latents).all():
        raise ValueError(f"latents must be finite and (N, D), got {latents.shape}")
    if targets is not None and (targets.ndim != 2 or len(targets) != len(latents)):
        raise ValueError(f"{len(latents)} latents do not go with labels {targets.shape}")


def _left_out(values: np.ndarray, what: str) -> tuple[int, ...]:
    """Where the values (F,) are NaN. ValueError if everywhere."""
    missing = np.isnan(values)
    if missing.all():
        raise ValueError(f"none of the {len(values)} {what} varies, so none can be scored")
    return tuple(np.flatnonzero(missing).tolist())


def _is_discrete(values: np.ndarray) -> bool:
    """Whether a factor (N,) is a class rather than a quantity."""
    distinct = np.unique(values)
    return len(distinct) <= MAX_CLASSES and bool((distinct == np.round(distinct)).all())


# The factors.


class MutualInformationGap(NamedTuple):
    mean: float
    """Over factors, in [0, 1]."""
    gaps: np.ndarray
    """(F,) float64."""
    left_out: tuple[int, ...]
    """Factors with a single value."""


def mutual_information_gap(
    latents: np.ndarray, factors: np.ndarray, bins: int = 20
) -> MutualInformationGap:
    """Of each factor, how much more one latent knows than any other (Chen et al. 2018, eq. 6):
    (I(z_first; v) - I(z_second; v)) / H(v).

    Latents, and factors that are not discrete, are cut into equal bins over their range, as by
    Locatello et al. 2019. Estimated mutual information is too large by about (bins - 1)(values - 1)
    / 2N nats, for the first latent and the second alike unless the first determines the factor.

    Args:
        latents: (N, D) with D >= 2.
        factors: (N, F), NaN where unknown; such rows count for the other factors only.
    """
    _check(latents, factors)
    if latents.shape[1] < 2:
        raise ValueError("a gap needs at least 2 latent dimensions")
    binned = [_binned(column, bins) for column in latents.T]
    gaps = np.full(factors.shape[1], np.nan)
    for index, factor in enumerate(factors.T):
        known = ~np.isnan(factor)
        if len(np.unique(factor[known])) < 2:
            continue
        labels = factor[known] if _is_discrete(factor[known]) else _binned(factor[known], bins)
        labels = np.unique(labels, return_inverse=True)[1]
        information = [mutual_info_score(labels, column[known]) for column in binned]
        second, first = np.sort(information)[-2:]
        gaps[index] = (first - second) / mutual_info_score(labels, labels)
    left_out = _left_out(gaps, "factors")
    return MutualInformationGap(float(np.nanmean(gaps)), gaps, left_out)


def _binned(values: np.ndarray, bins: int) -> np.ndarray:
    """Numbers of equal bins over the range of values (N,)."""
    values = values.astype(np.float64)  # float32 could not tell the edges of a narrow range
    return np.digitize(values, np.histogram_bin_edges(values, bins)[1:-1])


class DCI(NamedTuple):
    disentanglement: float
    """Whether each latent serves one factor, in [0, 1]."""
    completeness: float
    """Whether each factor is served by one latent, in [0, 1]."""
    informativeness: float
    """Mean over factors of how well they are predicted; 0 is a constant guess, 1 is perfect."""
    factor_completeness: np.ndarray
    """(F,) float64."""
    factor_informativeness: np.ndarray
    """(F,) float64."""
    importances: np.ndarray
    """(D, F) float64: each column sums to 1, or is 0 where no latent separates anything."""
    left_out: tuple[int, ...]
    """Factors with a single value in either split."""


def dci(
    train_latents: np.ndarray,
    train_factors: np.ndarray,
    test_latents: np.ndarray,
    test_factors: np.ndarray,
    seed: int,
) -> DCI:
    """Disentanglement, completeness, informativeness (Eastwood & Williams 2018, section 2).

    The importances R (D, F) are those of extremely randomized trees, far faster than the
    gradient-boosted ones of Locatello et al. 2019. Every split may use any latent: among a random
    part of them, scikit-learn's default for classes, most splits of a copied factor find noise.

    Informativeness is on the test split: R^2, and for classes its like, 1 - error / error of the
    best constant, since the paper's errors too are relative to those of a constant. A factor that
    cannot be predicted has all latents alike as its importances, which lowers disentanglement.

    Args:
        train_latents, test_latents: (N, D) with D >= 2.
        train_factors, test_factors: (N, F), NaN where unknown. At least 2 of them must vary.
    """
    _check(train_latents, train_factors)
    _check(test_latents, test_factors)
    importances = np.full((train_latents.shape[1], train_factors.shape[1]), np.nan)
    informativeness = np.full(train_factors.shape[1], np.nan)
    for index, (target, truth) in enumerate(zip(train_factors.T, test_factors.T, strict=True)):
        known, seen = ~np.isnan(target), ~np.isnan(truth)
        if min(len(np.unique(target[known])), len(np.unique(truth[seen]))) > 1:
            importances[:, index], informativeness[index] = _predicted(
                train_latents[known], target[known], test_latents[seen], truth[seen], seed
            )
    left_out = _left_out(informativeness, "factors")
    scored = np.delete(importances, left_out, axis=1)
    if min(scored.shape) < 2:
        raise ValueError(f"DCI needs at least 2 latents and 2 varying factors, got {scored.shape}")
    completeness = np.full(len(informativeness), np.nan)
    completeness[~np.isnan(informativeness)] = _concentration(scored.T)
    return DCI(
        disentanglement=float(_concentration(scored) @ scored.sum(1) / max(scored.sum(), 1e-12)),
        completeness=float(np.nanmean(completeness)),
        informativeness=float(np.nanmean(informativeness)),
        factor_completeness=completeness,
        factor_informativeness=informativeness,
        importances=importances,
        left_out=left_out,
    )


def _predicted(
    latents: np.ndarray, target: np.ndarray, test: np.ndarray, truth: np.ndarray, seed: int
) -> tuple[np.ndarray, float]:
    """The importances (D,) of latents for one factor, and its informativeness."""
    discrete = _is_discrete(np.concatenate([target, truth]))
    trees: Any = ExtraTreesClassifier if discrete else ExtraTreesRegressor
    forest = trees(TREES, max_features=None, min_samples_leaf=LEAF_SIZE, random_state=seed)
    forest.fit(latents, target)
    # Where no latent separates anything, these are rounding errors divided by their sum.
    with np.errstate(invalid="ignore"):
        importances = np.nan_to_num(forest.feature_importances_).clip(min=0)
    importances = importances / (importances.sum() or 1.0)
    predicted = forest.predict(test)
    if not discrete:
        return importances, float(r2_score(truth, predicted))
    constant = np.unique(truth, return_counts=True)[1].max() / len(truth)
    return importances, 1 - (1 - accuracy_score(truth, predicted)) / (1 - constant)


def _concentration(weights: np.ndarray) -> np.ndarray:
    """1 - the entropy of each row of (n, k) in units of log k: 1 all in one place, 0 all alike or
    nothing at all."""
    weights = np.where(weights.any(1, keepdims=True), weights, 1.0)
    return 1 - stats.entropy(weights, base=weights.shape[1], axis=1)


# The attributes.


class Probe(NamedTuple):
    balanced_accuracy: np.ndarray
    """(A,) float64; 0.5 by chance."""
    average_precision: np.ndarray
    """(A,) float64; `positives` by chance."""
    positives: np.ndarray
    """(A,) float64: share of the known test rows that have the attribute."""
    left_out: tuple[int, ...]
    """Attributes that lack one side among the rows for fitting, choosing or testing."""

    @property
    def mean_balanced_accuracy(self) -> float:
        return float(np.nanmean(self.balanced_accuracy))

    @property
    def mean_average_precision(self) -> float:
        return float(np.nanmean(self.average_precision))


def linear_probe(
    train_features: np.ndarray,
    train_attributes: np.ndarray,
    test_features: np.ndarray,
    test_attributes: np.ndarray,
) -> Probe:
    """How well each attribute is predicted by a linear function of the features.

    Least squares on -1 and +1 with a ridge penalty: the direction is that of linear discriminant
    analysis with a shrunken covariance, and one factorisation serves all attributes that are known
    in the same rows. A logistic regression would iterate for each of them over all features, which
    for the embedded codes of a level are thousands. Every tenth training row takes no part in the
    fit. These choose the penalty, by the least squared error, and the thresholds, half-way between
    the mean scores of both sides: scores of fitted rows lean towards their labels, and most of all
    towards the rare ones. The penalty is in units of D, where a priori the features explain half of
    what is to be explained.

    Args:
        train_features, test_features: (N, D) floating, standardised here by the training rows.
            The arithmetic is in their type; per penalty it takes N·D·min(N, D) multiplications
            and min(N, D)^2 numbers of memory, so large features had better be float32.
        train_attributes, test_attributes: (N, A) in {-1, 0, +1}, 0 unknown: not used.
    """
    _check(train_features, train_attributes)
    _check(test_features, test_attributes)
    scaler = StandardScaler().fit(train_features)
    train = np.asarray(scaler.transform(train_features))
    test = np.asarray(scaler.transform(test_features))
    choosing = np.arange(len(train)) % HELD_OUT == HELD_OUT - 1
    usable = np.logical_and.reduce([
        (rows > 0).any(0) & (rows < 0).any(0)
        for rows in (train_attributes[~choosing], train_attributes[choosing], test_attributes)
    ])  # fmt: skip
    known_alike: dict[bytes, list[int]] = {}
    for column in np.flatnonzero(usable).tolist():
        known_alike.setdefault((train_attributes[:, column] != 0).tobytes(), []).append(column)

    accuracy, precision, positives = np.full((3, train_attributes.shape[1]), np.nan)
    for columns in known_alike.values():
        known = train_attributes[:, columns[0]] != 0
        ridge, thresholds = _fitted(
            *(train[known & ~choosing], train_attributes[known & ~choosing][:, columns]),
            *(train[known & choosing], train_attributes[known & choosing][:, columns]),
        )
        scores = ridge.predict(test).reshape(-1, len(columns)) - thresholds
        for column, score in zip(columns, scores.T, strict=True):
            seen = test_attributes[:, column] != 0
            truth = test_attributes[seen, column] > 0
            accuracy[column] = balanced_accuracy_score(truth, score[seen] > 0)
            precision[column] = average_precision_score(truth, score[seen])
            positives[column] = truth.mean()
    return Probe(accuracy, precision, positives, _left_out(accuracy, "attributes"))


def _fitted(
    features: np.ndarray, signs: np.ndarray, held_features: np.ndarray, held_signs: np.ndarray
) -> tuple[Ridge, np.ndarray]:
    """The regression of the best penalty, and the threshold (A,) of each attribute's score."""
    fits = [
        Ridge(penalty * features.shape[1], solver="cholesky").fit(features, signs)
        for penalty in PENALTIES
    ]
    scores = [ridge.predict(held_features).reshape(held_signs.shape) for ridge in fits]
    best = int(np.argmin([np.square(score - held_signs).mean() for score in scores]))
    means = [scores[best].mean(0, where=side) for side in (held_signs > 0, held_signs < 0)]
    return fits[best], (means[0] + means[1]) / 2


def attribute_vectors(latents: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """The mean latent with each attribute minus the mean latent without it: (A, D) float64.

    Args:
        attributes: (N, A) in {-1, 0, +1}, 0 unknown. A row of NaN where a side is empty.
    """
    _check(latents, attributes)
    values = latents.astype(np.float64)
    vectors = np.full((attributes.shape[1], latents.shape[1]), np.nan)
    for index, signs in enumerate(attributes.T):
        if (signs > 0).any() and (signs < 0).any():
            vectors[index] = values[signs > 0].mean(0) - values[signs < 0].mean(0)
    return vectors


# The density.


def fit_mixture(latents: np.ndarray, components: int, seed: int) -> GaussianMixture:
    """A mixture of Gaussians of full covariance by EM, the ex-post density of Ghosh et al. 2020
    (section 4), who use 10. Its `score_samples(latents)` are log densities (N,) in nats.

    ValueError below components · (D + 1) latents, where a covariance could be singular. A mixture
    that has not converged is said to be so in a printed line, and is of use all the same.
    """
    _check(latents)
    values = latents.astype(np.float64)
    least = components * (latents.shape[1] + 1)
    if len(latents) < least:
        raise ValueError(
            f"{components} Gaussians in {latents.shape[1]} dimensions need at least {least} "
            f"latents, got {len(latents)}"
        )
    # relative to the latents: an autoencoder's have no scale of their own
    floor = max(1e-6 * float(values.var(0).mean()), 1e-12)
    density = GaussianMixture(components, reg_covar=floor, max_iter=EM_STEPS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below
        density.fit(values)
    if not density.converged_:
        print(f"a mixture of {components} Gaussians has not converged in {EM_STEPS} steps of EM")
    return density


def sample_density(density: GaussianMixture, count: int, seed: int) -> np.ndarray:
    """New latents (count, D) float32."""
    samples, _ = copy(density).set_params(random_state=seed).sample(count)
    # scikit-learn returns one component after the other, so a part would lack some
    return np.random.default_rng(seed).permutation(samples).astype(np.float32)


class PriorDistance(NamedTuple):
    gaussian: float
    """2-Wasserstein distance of the Gaussian with the latents' mean and covariance."""
    sliced: float
    """Sliced 2-Wasserstein distance of the latents themselves."""


def wasserstein_to_prior(
    latents: np.ndarray, projections: int = 500, seed: int = 0
) -> PriorDistance:
    """Distances of latents (N, D) to N(0, I), in units of the latents.

    `gaussian` is |m|^2 + tr(S + I - 2 S^1/2), rooted (Gelbrich 1990): a lower bound that sees mean
    and covariance alone. `sliced` (Bonneel et al. 2015) also sees their shape: it is the root mean
    square, over random directions, of the exact distance of the projected latents to N(0, 1).
    Of N(t, I) the first is |t| and the second |t| / sqrt(D). Both are above 0 for N draws from the
    prior, so print those of such draws beside.
    """
    _check(latents)
    values = latents.astype(np.float64)
    count, dimensions = values.shape
    if count < 2:
        raise ValueError("a covariance needs at least 2 latents")
    variances = np.linalg.eigvalsh(np.atleast_2d(np.cov(values.T))).clip(min=0)
    gaussian = np.square(values.mean(0)).sum() + np.square(np.sqrt(variances) - 1).sum()

    directions = np.random.default_rng(seed).standard_normal((dimensions, projections))
    projected = np.sort(values @ (directions / np.linalg.norm(directions, axis=0)), axis=0)
    # The i-th smallest of N goes to the i-th N-th of N(0, 1): E|x - q|^2 = E x^2 - 2 E x q + 1,
    # and the integral of q over an interval is the difference of the density at its ends.
    edges = stats.norm.pdf(stats.norm.ppf(np.linspace(0, 1, count + 1)))
    coupled = (edges[:-1] - edges[1:]) @ projected
    sliced = np.square(projected).mean(0) - 2 * coupled + 1
    return PriorDistance(float(np.sqrt(gaussian)), float(np.sqrt(sliced.mean())))
