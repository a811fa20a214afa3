"""Rejection sampling against torch.distributions and the definition of the best."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical

from pipeline.evaluation import rejection
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.stage import UserError
from pipeline.training.checkpoint import save_model

CPU = torch.device("cpu")


def classifier(kind: str) -> Classifier:
    names = ("Smiling", "Eyeglasses", "Hat")
    config = ClassifierConfig(num_outputs=3, channels=8, kind=kind, names=names)
    return Classifier(config).eval()


@torch.no_grad()
def test_scores_are_the_log_probability_of_what_was_asked_for():
    model, images = classifier("attributes"), torch.rand(5, 3, 32, 32)
    found = rejection.Selector(model, {"Hat": -1, "Smiling": 1}, None).log_prob(images)
    yes = Bernoulli(logits=model(images))
    expected = yes.log_prob(torch.ones(3))[:, 0] + yes.log_prob(torch.zeros(3))[:, 2]
    torch.testing.assert_close(found, expected)
    model = classifier("classes")
    found = rejection.Selector(model, {}, "Eyeglasses").log_prob(images)
    torch.testing.assert_close(found, Categorical(logits=model(images)).log_prob(torch.tensor(1)))


@torch.no_grad()
def test_scores_of_impossible_wishes_are_finite():
    model, images = classifier("attributes"), torch.rand(2, 3, 32, 32)
    model.head.bias.fill_(-200.0)
    found = rejection.Selector(model, {"Hat": 1}, None).log_prob(images)
    torch.testing.assert_close(found, model(images)[:, 2])  # log sigmoid(l) -> l


def test_the_selector_says_what_it_cannot_judge():
    for kind, attributes, label, message in (
        ("attributes", {"Beard": 1}, None, "does not know Beard; it knows Smiling, "),
        ("attributes", {}, "Hat", "tells attributes apart and none was asked for"),
        ("classes", {"Hat": 1}, None, "tells classes apart and none was asked for"),
        ("classes", {}, "Beard", "does not know Beard"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            rejection.Selector(classifier(kind), attributes, label)
        assert "\n" not in str(caught.value)


def test_the_judge_and_a_selector_of_other_images_are_refused(tmp_path):
    for name, about in {"judge": {"half": 1, "recipe": "r"}, "other": {"half": 0, "recipe": "q"},
                        "selector": {"half": 0, "recipe": "r"}}.items():  # fmt: skip
        save_model(tmp_path / name, "classifier", classifier("attributes"), about)
    asked = ({"Hat": 1}, None, "r", CPU)
    with pytest.raises(UserError, match=r"judge's half.*--half 0"):
        rejection.load_selector(tmp_path / "judge", *asked)
    with pytest.raises(UserError, match="recipe q, the VQ-VAE on r"):
        rejection.load_selector(tmp_path / "other", *asked)
    assert len(rejection.load_selector(tmp_path / "selector", *asked).sha256) == 64


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
