"""Can a classifier tell two sets of images apart? The area under its ROC curve, on given features.

    classifier_auc(samples, real)            0.5: cannot tell them apart, 1: always right
    classifier_auc(reconstructions, real)    real images of the same numbers, in the same order
    classifier_auc(floor, real)              real against real: what 0.5 looks like here

A two-sample test by a classifier (Lopez-Paz & Oquab 2017) with a logistic regression.
"""

import math

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

from pipeline.evaluation.fidelity import Score, check

FOLDS = 5
REGULARISATION = 0.01  # scikit-learn's C, of standardised features


def classifier_auc(generated: torch.Tensor, real: torch.Tensor, seed: int = 0) -> Score:
    """How well a classifier tells features (N, F) from (M, F): AUC with a 95 % interval.

    Every image is scored once, by a classifier that saw neither it nor the image of the same
    number in the other set: a reconstruction in training would give its original away, and the
    AUC of good reconstructions would fall below 0.5.

    Raises UserError for fewer than fidelity.MIN_IMAGES images or features that are not finite.
    """
    check(generated=generated, real=real)
    features = torch.cat([generated, real])
    std, mean = torch.std_mean(features, dim=0)
    features.sub_(mean).div_(std.where(std > 0, 1))  # in place; of all images, not fold by fold
    numbers = np.concatenate([np.arange(len(generated)), np.arange(len(real))])
    is_generated = np.arange(len(features)) < len(generated)
    model = LogisticRegression(C=REGULARISATION, max_iter=1000)
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    scores = np.asarray(cross_val_predict(
        model, features.numpy(), is_generated, groups=numbers, cv=folds, method="decision_function"
    ))  # fmt: skip
    value, error = auc(scores[: len(generated)], scores[len(generated) :])
    # The folds' classifiers share training images, so their scores vary together: the variance is
    # larger by (1 / folds + test / training) / (1 / folds) (Nadeau & Bengio 2003, section 3), which
    # is a little much near 0.5 and too much near 1.
    margin = 1.96 * error * math.sqrt(1 + FOLDS / (FOLDS - 1))
    return Score(value, (max(0.0, value - margin), min(1.0, value + margin)))


def auc(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """P(positive > negative) + P(equal) / 2 of scores (N,) and (M,), and its standard error
    (DeLong et al. 1988), scores being independent."""
    ranks = rankdata(np.concatenate([positive, negative]))
    # for each score the share of the other side that it beats, or that beats it
    beats = (ranks[: len(positive)] - rankdata(positive)) / len(negative)
    beaten = 1 - (ranks[len(positive) :] - rankdata(negative)) / len(positive)
    variance = beats.var(ddof=1) / len(positive) + beaten.var(ddof=1) / len(negative)
    return float(beats.mean()), float(np.sqrt(variance))
