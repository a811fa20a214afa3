"""Rejection sampling against torch.distributions, the definition of the best, and Gaussians."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch.distributions import Bernoulli, Categorical

from pipeline.evaluation import rejection
from pipeline.evaluation.fidelity import frechet_distance
from pipeline.evaluation.rejection import (
    Asked,
    Selector,
    accepted,
    curves,
    log_prob,
    own_answers,
)
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.stage import UserError
from pipeline.training.checkpoint import save_model

CPU = torch.device("cpu")
NAMES = ("Smiling", "Eyeglasses", "Hat")


def selector(kind: str) -> Selector:
    config = ClassifierConfig(num_outputs=3, channels=8, kind=kind, names=NAMES)
    return Selector(Classifier(config).eval(), "")


def asked(names=(), attributes=None, classes=(), labels=None, count=1) -> Asked:
    """Images that are asked for attributes, one row each, or for classes."""
    attributes = np.zeros((count, len(names)), np.int8) if attributes is None else attributes
    labels = [-1] * len(attributes) if labels is None else labels
    return Asked(names, np.array(attributes, np.int8), classes, np.array(labels, np.int64))


@torch.no_grad()
def test_scores_are_the_log_probability_of_what_each_image_was_asked_for():
    """In the order of the priors' names, which is not the classifier's."""
    images, wanted = torch.rand(3, 3, 32, 32), [[-1, 1], [1, 0], [0, -1]]
    attributes = selector("attributes")
    targets = attributes.targets(asked(("Hat", "Smiling"), wanted))
    yes = Bernoulli(logits=attributes.model(images))
    with_it, without = yes.log_prob(torch.ones(3)), yes.log_prob(torch.zeros(3))
    expected = torch.stack([without[0, 2] + with_it[0, 0], with_it[1, 2], without[2, 0]])
    torch.testing.assert_close(attributes.log_prob(images, targets), expected)

    classes = selector("classes")
    targets = classes.targets(asked(classes=("Hat", "Smiling"), labels=[0, 1, 0], count=3))
    expected = Categorical(logits=classes.model(images)).log_prob(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(classes.log_prob(images, targets), expected)


def test_where_nothing_is_asked_the_most_probable_answers_are_scored():
    logits = 3 * torch.randn(50, 3)
    signs = torch.tensor([*itertools.product((-1, 1), repeat=3)])
    every = torch.stack([log_prob(logits, sign.expand(50, 3)) for sign in signs])
    found = log_prob(logits, own_answers(logits, "attributes"))
    torch.testing.assert_close(found, every.amax(0))
    found = log_prob(logits, own_answers(logits, "classes"))
    torch.testing.assert_close(found, logits.log_softmax(1).amax(1))


def test_scores_of_impossible_wishes_are_finite():
    logits = torch.tensor([[-200.0, 300.0]])
    found = log_prob(logits, torch.tensor([[1, -1]]))
    torch.testing.assert_close(found, torch.tensor([-500.0]))  # log sigmoid(l) -> l


def test_the_selector_says_what_it_cannot_judge():
    for kind, images, message in (
        ("attributes", asked(("Beard",), [[1]]), "does not know Beard; it knows Smiling, "),
        ("attributes", asked(classes=("Hat",), labels=[0]), "attributes apart and none was asked"),
        ("attributes", asked(("Hat",), [[1], [0]]), "attributes apart and none was asked"),
        ("classes", asked(("Hat",), [[1]]), "tells classes apart and none was asked for"),
        ("classes", asked(classes=("Hat",), labels=[0, -1], count=2), "none was asked for"),
        ("classes", asked(classes=("Hat", "Beard"), labels=[0, 1], count=2), "not know Beard"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            selector(kind).targets(images)
        assert "\n" not in str(caught.value)
    # what is left open need not be known
    known = selector("attributes").targets(asked(("Beard", "Hat"), [[0, -1]]))
    assert known.tolist() == [[0, 0, -1]]


def test_the_judge_and_a_selector_of_other_images_are_refused(tmp_path):
    for name, about in {"judge": {"half": 1, "recipe": "r"}, "other": {"half": 0, "recipe": "q"},
                        "selector": {"half": 0, "recipe": "r"}}.items():  # fmt: skip
        save_model(tmp_path / name, "classifier", selector("attributes").model, about)
    with pytest.raises(UserError, match=r"judge's half.*--half 0"):
        rejection.load_selector(tmp_path / "judge", "r", CPU)
    with pytest.raises(UserError, match="recipe q, the VQ-VAE on r"):
        rejection.load_selector(tmp_path / "other", "r", CPU)
    assert len(rejection.load_selector(tmp_path / "selector", "r", CPU).sha256) == 64


@pytest.mark.parametrize("acceptance", [1.0, 0.7, 0.5, 1 / 3, 0.1, 0.07, 1e-3])
@pytest.mark.parametrize("count", [1, 3, 7, 2000])
def test_as_many_candidates_as_the_rate_asks_for(count, acceptance):
    candidates = rejection.num_candidates(count, acceptance)
    assert candidates >= count
    assert candidates * acceptance >= count * (1 - 1e-9)  # enough
    assert (candidates - 1) * acceptance < count  # and not one more
    assert candidates == math.ceil(candidates)


def test_the_best_are_kept_in_the_order_of_their_numbers():
    log_probs = np.array([-3.0, -1.0, -2.0, -1.0, -9.0, -np.inf])
    for count in range(7):
        found = rejection.best(log_probs, count).tolist()
        # of equal ones the first
        ranked = sorted(range(6), key=lambda number: (-log_probs[number], number))
        assert found == sorted(ranked[:count])


def test_every_rate_keeps_as_many_of_its_own_candidates():
    log_probs = np.random.default_rng(0).normal(size=1003)
    kept = accepted(log_probs, (1.0, 0.5, 0.3, 0.1))
    assert [*kept] == [1.0, 0.5, 0.3, 0.1]
    assert {len(numbers) for numbers in kept.values()} == {100}
    assert kept[1.0].tolist() == list(range(100))  # nothing to choose from
    for rate, candidates in ((0.5, 200), (0.3, 334), (0.1, 1000)):
        first = log_probs[:candidates]
        assert np.sort(first[kept[rate]]).tolist() == np.sort(first)[-100:].tolist()
    for rates in ((0.0, 1.0), (1.5,)):
        with pytest.raises(ValueError, match=r"rates must be in \(0, 1\]"):
            accepted(log_probs, rates)


def points(found, what: str, series: str) -> np.ndarray:
    (curve,) = (curve for title, curve in found.items() if what in title)
    return np.array(curve["series"][series], float).T


def test_curves_of_gaussians_are_those_of_closed_form():
    """Samples N(0, 2.25 I) in d dimensions by their density, real images N(0, I). A share r of the
    samples lies where chi2_d <= q; their variance is 2.25 F_d+2(q) / F_d(q), with mean 0 and the
    same in all directions, so the distance is d (sigma - 1)^2, least near r = 0.46."""
    d, rng = 4, np.random.default_rng(0)
    samples, real = 1.5 * rng.normal(size=(8000, d)), rng.normal(size=(1000, d))
    rates = (1.0, 0.5, 0.25, 0.125)
    found = curves(
        -(samples**2).sum(1), torch.from_numpy(samples), torch.from_numpy(real), "toy", rates
    )
    x, distance, error = points(found, "Fréchet", "samples")
    quantiles = chi2.ppf(rates, d)
    sigma = 1.5 * np.sqrt(chi2.cdf(quantiles, d + 2) / chi2.cdf(quantiles, d))
    assert x.tolist() == list(rates) and (error > 0).all() and (error < 0.2).all()
    bias = 0.02  # of 1,000 images
    assert (abs(distance - d * (sigma - 1) ** 2) < 2 * error + bias).all()
    assert distance.argmin() == 1 and distance[0] == frechet_distance(samples[:1000], real)
    (_, precision, above), (_, recall, below) = (
        points(found, "Precision", name) for name in ("precision", "recall")
    )
    assert (precision[1:] > precision[0] + 0.05).all() and (np.diff(recall) < -0.01).all()
    np.testing.assert_allclose(above, 1.96 * np.sqrt(precision * (1 - precision) / 1000))
    np.testing.assert_allclose(below, 1.96 * np.sqrt(recall * (1 - recall) / 1000))
    assert all("1,000 images at every rate" in curve["note"] for curve in found.values())


def test_chance_selects_nothing():
    rng = np.random.default_rng(1)
    pool, real = torch.randn(2400, 3).double(), torch.randn(600, 3).double()
    found = curves(rng.normal(size=2400), pool, real, "toy", (1.0, 0.5, 0.25))
    for what, series in (("Fréchet", "samples"), ("Precision", "precision"),
                         ("Precision", "recall")):  # fmt: skip
        _, value, error = points(found, what, series)
        assert (abs(value[1:] - value[0]) < 2 * np.hypot(error[1:], error[0])).all(), series


def test_curves_need_enough_candidates():
    with pytest.raises(UserError, match=r"150 candidates leave 15 images at rate 0\.1.* least 160"):
        curves(np.zeros(150), torch.zeros(150, 2), torch.zeros(20, 2), "toy")
    with pytest.raises(ValueError, match="150 log_probs are of 151 features"):
        curves(np.zeros(150), torch.zeros(151, 2), torch.zeros(20, 2), "toy")
