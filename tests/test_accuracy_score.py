"""Scores by classifiers: learned on toys that can be read, against scikit-learn and scipy."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score as top1
from sklearn.metrics import average_precision_score, recall_score

from pipeline.evaluation.accuracy_score import (
    AccuracyScore,
    Labelled,
    accuracy_score,
    attribute_accuracy,
    average_precision,
    base_rate,
    compare,
    guessing,
    most_balanced,
    scores,
)
from pipeline.stage import UserError

CPU = torch.device("cpu")
QUICK = AccuracyScore(channels=8, total_images=1200, batch_size=24, warmup_images=100)
PRECISION, ACCURACY = "cas_average_precision", "cas_accuracy"


def faces(count: int, seed: int, noise: float = 5.0) -> Labelled:
    """Images (29 x 31) with two attributes, bright and framed, below noise; some are unknown."""
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random((count, 2)) < [0.5, 0.3], 1, -1).astype(np.int8)
    images = np.full((count, 29, 31, 3), 100.0) + 20 * targets[:, 0, None, None, None]
    images[:, :4] += 30 * (targets[:, 1, None, None, None] > 0)
    images += noise * rng.normal(size=images.shape)
    targets[rng.random((count, 2)) < 0.1] = 0
    return Labelled(images.clip(0, 255).astype(np.uint8), targets)


def digits(count: int, seed: int) -> Labelled:
    """Grey images whose class is where the light is: left, middle or right. Mirrored, left would be
    right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 60, (count, 28, 30, 1))
    for image, label in zip(images, labels, strict=True):
        image[:, 10 * label : 10 * label + 10] += 100
    return Labelled(images.astype(np.uint8), labels)


def test_the_score_is_high_where_samples_teach_and_that_of_guessing_where_they_do_not():
    """Rows: real images, samples beneath noise, samples that are not what they were asked for."""
    real, test, rng = faces(240, 0), faces(300, 1), np.random.default_rng(2)
    noisy, wrong = faces(240, 3, noise=90.0), rng.permutation(real.targets)
    sets = {"real": real, "samples": noisy, "shuffled": Labelled(real.images, wrong)}
    rows = compare(sets, test, ("bright", "framed"), QUICK, CPU)
    assert [*rows] == ["real", "samples", "shuffled", "base rate"]
    found = {name: row[PRECISION].value for name, row in rows.items()}
    assert found["real"] > 0.98 and found["real"] > found["samples"] + 0.02
    assert found["samples"] > found["shuffled"] and 0.3 < found["base rate"] < 0.5
    assert abs(found["shuffled"] - found["base rate"]) < 0.25
    for row in rows.values():
        assert [*row] == [PRECISION, f"{PRECISION}/bright", f"{PRECISION}/framed"]
        assert row[PRECISION].value == pytest.approx(
            (row[f"{PRECISION}/bright"].value + row[f"{PRECISION}/framed"].value) / 2
        )


def test_classes_are_told_apart_and_not_mirrored():
    names = ("left", "middle", "right")
    row = accuracy_score(digits(240, 0), digits(150, 1), names, QUICK, CPU)
    assert [*row] == [ACCURACY, *(f"{ACCURACY}/{name}" for name in names)]
    assert all(score.value > 0.95 for score in row.values())


def test_a_score_repeats_and_is_of_its_seed():
    config, names = dataclasses.replace(QUICK, total_images=240), ("bright", "framed")
    train, test = faces(100, 0, noise=60.0), faces(120, 1, noise=60.0)
    first = accuracy_score(train, test, names, config, CPU)
    torch.rand(7)  # whatever was drawn before
    assert accuracy_score(train, test, names, config, CPU) == first
    other = dataclasses.replace(config, seed=1)
    assert accuracy_score(train, test, names, other, CPU)[PRECISION].value != first[PRECISION].value


@pytest.mark.parametrize("count", [1, 2, 17, 300])
def test_average_precision_is_scikit_learns(count):
    rng = np.random.default_rng(count)
    logits, positive = rng.normal(size=count), rng.random(count) < 0.3
    positive[0] = True
    weights = rng.multinomial(count, np.full(count, 1 / count), 5)
    weights[:, 0] += 1
    found = average_precision(logits, positive, np.concatenate([np.ones((1, count), int), weights]))
    expected = [average_precision_score(positive, logits, sample_weight=w) for w in weights]
    np.testing.assert_allclose(found[1:], expected, rtol=1e-12)
    assert found[0] == pytest.approx(average_precision_score(positive, logits))
    repeated = np.repeat(np.arange(count), weights[0])  # a weight is so many copies
    assert found[1] == pytest.approx(average_precision_score(positive[repeated], logits[repeated]))


def test_scores_are_scikit_learns_and_leave_unknown_targets_out():
    rng = np.random.default_rng(0)
    names, logits = ("a", "b", "c", "d"), rng.normal(size=(400, 4))
    labels = rng.integers(0, 3, 400)  # no image of d
    found = scores(logits, labels, names)
    answers = logits.argmax(1)
    recalls = recall_score(labels, answers, labels=range(3), average=None)
    assert [*found] == [ACCURACY, *(f"{ACCURACY}/{name}" for name in "abc")]
    assert found[ACCURACY].value == pytest.approx(top1(labels, answers))
    for name, recall in zip("abc", recalls, strict=True):
        assert found[f"{ACCURACY}/{name}"].value == pytest.approx(recall)

    targets = rng.integers(-1, 2, (400, 4))
    targets[:, 3] = -rng.integers(0, 2, 400)  # nothing to find
    found = scores(logits, targets, names)
    assert [*found] == [PRECISION, *(f"{PRECISION}/{name}" for name in "abc")]
    expected = [
        average_precision_score(targets[known, i] > 0, logits[known, i])
        for i, known in enumerate(targets.T[:3] != 0)
    ]
    for name, precision in zip("abc", expected, strict=True):
        assert found[f"{PRECISION}/{name}"].value == pytest.approx(precision)
    assert found[PRECISION].value == pytest.approx(np.mean(expected))


def test_intervals_are_those_of_the_binomial_and_within_0_and_1():
    labels = np.arange(900) % 2
    logits = np.stack([1 - labels, labels], 1) * np.where(np.arange(900) % 5 == 0, -1, 1)[:, None]
    for name, share, count in ((ACCURACY, 0.8, 900), (f"{ACCURACY}/b", 0.8, 450)):
        score = scores(logits, labels, ("a", "b"))[name]
        half = 1.96 * (share * (1 - share) / count) ** 0.5
        assert score.value == pytest.approx(share)
        # the spread of 200 resamples is known to 5 %
        np.testing.assert_allclose(score.interval, (share - half, share + half), atol=0.2 * half)
    perfect = scores(np.eye(2)[labels], labels, ("a", "b"))[ACCURACY]
    assert perfect.interval == (1.0, 1.0)


def test_guessing_is_the_most_frequent_class_and_the_share_of_positives():
    rng = np.random.default_rng(0)
    labels, nothing = rng.integers(0, 4, 300) // 2, np.zeros((300, 1))
    dummy = DummyClassifier(strategy="most_frequent").fit(nothing, labels)
    assert guessing(labels, ("a", "b"))[ACCURACY].value == dummy.score(nothing, labels)
    targets = np.where(rng.random((300, 2)) < [0.2, 0.7], 1, -1)
    targets[:100, 0] = 0
    found = guessing(targets, ("a", "b"))
    expected = [average_precision_score(t[t != 0] > 0, np.zeros((t != 0).sum())) for t in targets.T]
    assert found[f"{PRECISION}/a"].value == pytest.approx(expected[0])
    assert found[f"{PRECISION}/b"].value == pytest.approx(expected[1])
    assert found[PRECISION].value == pytest.approx(np.mean(expected))


def test_what_does_not_fit_is_refused():
    train, names = faces(20, 0), ("bright", "framed")
    for sets, test, message in (
        ({"a": train, "b": faces(21, 0)}, train, "same number of images, got .*'b': 21"),
        ({"a": Labelled(train.images, train.targets[1:])}, train, "20 images have 19 targets"),
        ({"a": Labelled(train.images[:0], train.targets[:0])}, train, "0 images have 0 targets"),
        ({"a": Labelled(train.images, train.targets[:, :1])}, train, "1 attributes have 2 names"),
        ({"a": Labelled(train.images, 2 * train.targets)}, train, "must be -1, 0 or 1"),
        ({"a": train}, Labelled(train.images, np.full(20, 2)), r"classes must be in 0..1"),
        ({"a": train}, Labelled(train.images, np.full(20, -1)), r"classes must be in 0..1"),
        ({"a": train}, Labelled(train.images, np.zeros(20, int)), "both be attributes"),
        ({"a": train}, Labelled(train.images[..., :1], train.targets), "different shapes"),
        ({"a": train}, Labelled(train.images, -abs(train.targets)), "has any of the attributes"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(sets, test, names, QUICK, CPU)
    with pytest.raises(UserError, match=r"a diverged; lower --accuracy_score\.learning_rate"):
        wild = dataclasses.replace(QUICK, learning_rate=1e30, total_images=240)
        compare({"a": train}, train, names, wild, CPU)
    for name in ("total_images", "batch_size", "learning_rate"):
        with pytest.raises(ValueError, match=f"accuracy_score.{name} must be positive, got 0"):
            AccuracyScore(**{name: 0})
    with pytest.raises(
        ValueError, match=r"accuracy_score.channels must be a multiple of 8, got 12"
    ):
        AccuracyScore(channels=12)


def test_the_most_balanced_attributes_come_first_and_others_not_at_all():
    attributes = np.where(np.arange(10)[:, None] < [1, 5, 6, 3, 8], 1, -1)
    assert most_balanced(attributes, "abcde", {"a", "c", "d", "e", "z"}, 3) == ["c", "d", "e"]


def test_attribute_accuracy_is_the_share_of_right_answers_beside_that_of_unrelated_ones():
    rng, names = np.random.default_rng(0), ("a", "b")
    wanted = np.where(rng.random((500, 2)) < [0.5, 0.8], 1, -1)
    wanted[rng.random((500, 2)) < 0.2] = 0
    yes = (wanted > 0) == (rng.random((500, 2)) < 0.9)
    found = attribute_accuracy(yes, wanted, names)
    for i, name in enumerate(names):
        known = wanted[:, i] != 0
        right = (yes == (wanted > 0))[known, i]
        score = found[f"attribute_accuracy/{name}"]
        assert score.value == pytest.approx(right.mean())
        error = 1.96 * scipy.stats.sem(right)
        np.testing.assert_allclose(score.interval, (score.value - error, score.value + error))
        base = found[f"attribute_base_rate/{name}"].value
        assert base == base_rate(yes, wanted)[i]
        # answers in another order have nothing to do with what was asked for
        shuffled = [(rng.permutation(yes[:, i]) == (wanted[:, i] > 0))[known].mean()
                    for _ in range(200)]  # fmt: skip
        assert base == pytest.approx(np.mean(shuffled), abs=4 * scipy.stats.sem(shuffled))
    assert found["attribute_base_rate"].value == pytest.approx(base_rate(yes, wanted).mean())
    assert 0.8 < found["attribute_accuracy"].value < 1


def test_images_of_which_nothing_is_known_do_not_count():
    yes, wanted = np.ones((4, 2), bool), np.array([[0, 0], [1, 0], [1, 1], [-1, -1]])
    found = attribute_accuracy(yes, wanted, ("a", "b"))
    assert found["attribute_accuracy"].value == pytest.approx(2 / 3)
    assert found["attribute_accuracy/b"].value == pytest.approx(1 / 2)
