"""What a classifier learns and how well: the halves of the data, its task, its validation figures.

Two classifiers are used, each on its own half of the training split: a selector may choose
samples, the judge only measures.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from pipeline.data.images import ImageSet
from pipeline.models.classifier import loss
from pipeline.stage import UserError


def half_of(keys: np.ndarray) -> np.ndarray:
    """The half (0 or 1) each sample belongs to: keys (N,) bytes -> (N,) int64.

    The first bit of the key's SHA-256, so it depends neither on the order nor on other samples.
    """
    return np.array([hashlib.sha256(bytes(key)).digest()[0] >> 7 for key in keys], np.int64)


class Task(NamedTuple):
    """What the outputs of a classifier stand for in a data set."""

    kind: Literal["attributes", "classes"]
    names: tuple[str, ...]
    columns: np.ndarray  # columns of `attributes` in use; empty for classes
    skipped: tuple[str, ...]  # attributes that are constant in the training half


def find_task(images: ImageSet, half: int, data: Path) -> tuple[Task, np.ndarray]:
    """The task of a classifier on a half of `images`, and the indices of its training images.

    Attributes where there are any that vary over the half, else classes; UserError without both.
    """
    chosen = np.flatnonzero(half_of(images.keys) == half)
    names, attributes = images.index.attribute_names, images.attributes[chosen]
    varies = np.atleast_1d((attributes > 0).any(0) & (attributes < 0).any(0))
    skipped = tuple(name for name, use in zip(names, varies, strict=True) if not use)
    if varies.any():
        used = tuple(name for name, use in zip(names, varies, strict=True) if use)
        return Task("attributes", used, np.flatnonzero(varies), skipped), chosen
    labelled = chosen[images.labels[chosen] >= 0]
    if len(np.unique(images.labels[labelled])) > 1:
        return Task("classes", images.index.class_names, np.empty(0, np.int64), skipped), labelled
    raise UserError(
        f"{data} has neither attributes nor classes that vary, so there is nothing to classify; "
        "evaluate with --inception_weights instead of a judge"
    )


def targets_of(images: ImageSet, task: Task) -> np.ndarray:
    """(N, A) int8 attributes in {-1 no, 0 unknown, +1 yes}, or (N,) int64 classes, -1 unknown."""
    return images.labels if task.kind == "classes" else images.attributes[:, task.columns]


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean over the positives of the precision at their rank; scores (N,), positive (N,) bool."""
    ranked = positive[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean()) if ranked.any() else float("nan")


def figures(
    logits: torch.Tensor, targets: np.ndarray, task: Task
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Validation figures by metric tag, and what they are means of, by name of the output.

    Per output: accuracy (classes: recall), that of the most frequent answer, average precision.
    Unknown targets do not count; logits (N, A), targets as from `targets_of`.
    """
    if task.kind == "classes":
        logits, targets = logits[torch.as_tensor(targets >= 0)], targets[targets >= 0]
        answers = logits.argmax(1).numpy()
        overall = float((answers == targets).mean())
    per_output = {}
    for column, name in enumerate(task.names):
        scores = logits[:, column].numpy()
        if task.kind == "classes":
            truth = targets == column
            right = answers[truth] == column
        else:
            known = targets[:, column] != 0
            scores, truth = scores[known], targets[known, column] > 0
            right = (scores > 0) == truth
        per_output[name] = {
            "accuracy": float(right.mean()) if right.size else float("nan"),
            "most_frequent": float(max(truth.mean(), 1 - truth.mean())) if truth.size else 0.0,
            "average_precision": average_precision(scores, truth),
        }
    if task.kind == "attributes":
        overall = float(np.nanmean([output["accuracy"] for output in per_output.values()]))
    precisions = [output["average_precision"] for output in per_output.values()]
    values = {
        "classifier/validation_loss": float(loss(logits, torch.as_tensor(targets), task.kind)),
        "classifier/validation_accuracy": overall,
        "classifier/validation_average_precision": float(np.nanmean(precisions)),
    }
    return values, per_output
