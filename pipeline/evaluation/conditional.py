"""What samples show of what they were asked for: the joint between a set of samples and the data
that its attributes or classes come from.

    asked = asked_of(samples)                       None where nothing was asked
    attributes(judge, asked, samples, ...)          what the judge sees of it
    curves(selector, asked, samples, ...)           distances over the acceptance rate
    classification(asked, samples, ...)             what a classifier learns from it
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.images import ImageSet
from pipeline.evaluation import accuracy_score, pictures, rejection
from pipeline.evaluation.accuracy_score import AccuracyScore, Labelled
from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.rejection import Selector
from pipeline.evaluation.sets import (
    BATCH_SIZE,
    Choice,
    Generated,
    Images,
    SampleFiles,
    ShardImages,
    choose,
)
from pipeline.image_model import Asked
from pipeline.models.classifier import Classifier
from pipeline.stage import UserError

Rows = dict[str, dict[str, Score]]  # set of images -> metric -> score


class Data(NamedTuple):
    """Real images, which tell what they show."""

    reference: Choice
    """Of `real`."""
    real: ImageSet
    train: ImageSet


def asked_of(samples: Choice) -> Asked | None:
    """What each of the images was asked for; None where nobody asked, or knows."""
    images = samples.images
    if isinstance(images, Generated):
        asked = images.asked.of(samples.numbers)
    elif isinstance(images, SampleFiles | ShardImages):
        shards = images.shards if isinstance(images, SampleFiles) else images.images
        names, classes = shards.index.attribute_names, shards.index.class_names
        asked = Asked(names, shards.attributes, classes, shards.labels).of(samples.numbers)
    else:
        return None
    return asked if (asked.attributes != 0).any() or (asked.labels >= 0).any() else None


def columns_of(names: list[str], among: list[str] | tuple[str, ...]) -> list[int]:
    return [list(among).index(name) for name in names]


def attributes(
    judge: Classifier, asked: Asked, samples: Images, name: str, data: Data, device: torch.device
) -> Rows:
    """The judge's answers to what `samples` were asked for, and to real images: of the attributes
    asked for, those nearest to half yes, half no in the training split.

    Args:
        asked: of `samples`, which go by `name`.

    Raises UserError where the judge tells no attribute that was asked for.
    """
    known = data.real.index.attribute_names
    often = (asked.attributes != 0).sum(0) >= 2
    usable = {own for own, use in zip(asked.attribute_names, often, strict=True) if use}
    names = accuracy_score.most_balanced(
        data.train.attributes, known, usable & set(judge.config.names)
    )
    if not names:
        raise UserError("the judge tells no attribute that was asked for of two images at least")
    truth = data.real.attributes[data.reference.numbers][:, columns_of(names, known)]
    wanted = asked.attributes[:, columns_of(names, list(asked.attribute_names))]
    rows = {}
    for row, images, targets in ((name, samples, wanted), ("held-out real", data.reference, truth)):
        told = np.flatnonzero((targets != 0).sum(0) >= 2)
        if len(told):
            answers = accuracy_score.predict(judge, images, device, f"judge: {row}")
            yes = answers[:, columns_of(names, judge.config.names)] > 0
            scores = accuracy_score.attribute_accuracy(
                yes[:, told], targets[:, told], [names[column] for column in told]
            )
            rows[row] = dict(
                sorted(scores.items(), key=lambda score: "/" in score[0])
            )  # means first
    return rows


def curves(
    selector: Selector, asked: Asked, samples: Images,
    features: Mapping[str, tuple[torch.Tensor, torch.Tensor]], device: torch.device, seed: int,
) -> dict:  # fmt: skip
    """Distances over the acceptance rate, see rejection.curves; features by name: of `samples` and
    of real images."""
    targets, log_probs = selector.targets(asked), []
    for start in range(0, len(samples), BATCH_SIZE):
        numbers = np.arange(start, min(start + BATCH_SIZE, len(samples)))
        images = pictures.to_unit(samples[numbers], device)
        log_probs.append(selector.log_prob(images, targets[numbers]).double().cpu().numpy())
    scores, found = np.concatenate(log_probs), {}
    for name, (own, real) in features.items():
        found |= rejection.curves(scores, own, real, name, seed=seed)
    return found


def classification(
    asked: Asked, samples: Images, name: str, data: Data,
    reconstruct: Callable[[Images], Images], config: AccuracyScore, device: torch.device, seed: int,
) -> Rows:  # fmt: skip
    """The classification accuracy score of samples, of as many real training images and of their
    reconstructions; by classes where each sample has one, else by the attributes nearest to half
    yes, half no.

    Raises UserError where all samples were asked for the same, which teaches nothing.
    """
    real, train = data.real, data.train
    known, classes = list(real.index.attribute_names), list(real.index.class_names)
    if classes and (asked.labels >= 0).all():
        names, truth, training = classes, real.labels, train.labels
        wanted = np.array([classes.index(asked.class_names[int(label)]) for label in asked.labels])
        varies = len(set(wanted)) > 1
    else:
        both = (asked.attributes.max(0) > 0) & (asked.attributes.min(0) < 0)
        usable = {own for own, use in zip(asked.attribute_names, both, strict=True) if use}
        names = accuracy_score.most_balanced(train.attributes, known, usable)
        columns = columns_of(names, known)
        truth, training = real.attributes[:, columns], train.attributes[:, columns]
        wanted = asked.attributes[:, columns_of(names, list(asked.attribute_names))]
        varies = bool(names)
    if not varies:
        raise UserError(
            "all samples were asked for the same, from which nothing can be learned; "
            "sample_prior.py --conditions asks as the data does"
        )
    images = Choice(ShardImages(train), choose(len(samples), np.arange(len(train)), seed))
    targets = training[images.numbers]
    sets = {
        "real training": Labelled(images, targets),
        "their reconstructions": Labelled(reconstruct(images), targets),
        name: Labelled(samples, wanted),
    }
    held_out = Labelled(data.reference, truth[data.reference.numbers])
    return accuracy_score.compare(sets, held_out, names, config, device)
