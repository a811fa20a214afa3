"""Does a model repeat its training images? Nearest training neighbours, and a rate of duplicates.

    blocks = features.split(10_000)                              of all training images
    near = nearest([samples, mirrored_samples], blocks)          by features, mirror images too
    held = nearest([held_out, mirrored_held_out], blocks)
    duplicates(near.distances[:, 0], held.distances[:, 0])       rates beside each other
    picture(sample_images, training_images, near)
    exact_copies([sample_batches, mirrored_batches], training_batches)      pixel by pixel

Distances are Euclidean, as for precision and recall and as in the data-copying test of Meehan et
al. (2020), which also asks whether samples lie closer to the training set than held-out images do.
A similarity with a fixed threshold (Somepalli et al. 2023: 0.5) needs features made for finding
copies; here held-out images set the threshold, whatever the features.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors

from pipeline.evaluation import pictures
from pipeline.evaluation.fidelity import Score, check

NEIGHBOURS = 7
RATE = 0.01  # of held-out images that count as duplicates


class Neighbours(NamedTuple):
    """The nearest training images of N images, nearest first."""

    indices: np.ndarray
    """(N, k) int64, numbers of training images."""
    distances: np.ndarray
    """(N, k) float64, Euclidean."""


class Duplicates(NamedTuple):
    """Shares of images closer to the training set than `threshold`, with 95 % intervals."""

    threshold: float
    samples: Score
    held_out: Score


def nearest(
    views: Sequence[torch.Tensor], training: Iterable[torch.Tensor], count: int = NEIGHBOURS
) -> Neighbours:
    """The `count` training images that come closest to any view of each image.

    Args:
        views: features (N, F) of the images, then of their mirror images, if those count.
        training: features of all training images in blocks (M_b, F), in order. Memory is that of
            a block; the distances within it are never all there at once.

    Raises ValueError where there are fewer than `count` training images, UserError for fewer than
    fidelity.MIN_IMAGES images or features that are not finite.
    """
    check(**{f"view {number}": view for number, view in enumerate(views)})
    found = Neighbours(np.empty((len(views[0]), 0), np.int64), np.empty((len(views[0]), 0)))
    seen = 0
    for block in training:
        search = NearestNeighbors(n_neighbors=min(count, len(block)), algorithm="brute")
        search.fit(block.numpy())
        for view in views:
            distances, indices = search.kneighbors(view.numpy())
            found = _closest(found, Neighbours(indices + seen, distances), count)
        seen += len(block)
    if seen < count:
        raise ValueError(f"{seen} training images have no {count} nearest ones")
    return found


def _closest(a: Neighbours, b: Neighbours, count: int) -> Neighbours:
    """The nearest of both, each training image once."""
    indices, distances = (np.hstack(pair) for pair in zip(a, b, strict=True))
    for _ in range(2):  # by distance, then what came up before at the end
        order = distances.argsort(axis=1, kind="stable")
        indices, distances = (np.take_along_axis(each, order, 1) for each in (indices, distances))
        repeated = np.tril(indices[:, :, None] == indices[:, None, :], -1).any(2)
        distances = np.where(repeated, np.inf, distances)
    return Neighbours(indices[:, :count], distances[:, :count])


def duplicates(samples: np.ndarray, held_out: np.ndarray, seed: int = 0) -> Duplicates:
    """Rates of duplicates, from distances (N,) and (M,) to the nearest training image.

    One half of the held-out images, drawn by `seed`, sets the threshold: the distance within which
    RATE of them lie (the smallest one, where they are fewer than 1 / RATE). The rate of the other
    half is what real images that are no copies have.
    """
    order = np.random.default_rng(seed).permutation(len(held_out))
    calibration, others = np.array_split(held_out[order], 2)
    threshold = float(np.quantile(calibration, RATE, method="lower"))
    return Duplicates(threshold, *(_share(each <= threshold) for each in (samples, others)))


def exact_copies(views: Iterable[Iterable[np.ndarray]], training: Iterable[np.ndarray]) -> Score:
    """The share of images one of whose views equals a training image pixel by pixel, with a 95 %
    interval. Views, all in one order, and training images are batches (B, H, W, C) uint8."""
    known = {_digest(image) for batch in training for image in batch}
    equal = [[_digest(image) in known for batch in view for image in batch] for view in views]
    return _share(np.any(equal, axis=0))


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _share(chosen: np.ndarray) -> Score:
    """The share of True in (N,) bool, with Wilson's 95 % interval."""
    interval = binomtest(int(chosen.sum()), len(chosen)).proportion_ci(0.95, method="wilson")
    return Score(float(chosen.mean()), (float(interval.low), float(interval.high)))


def picture(samples: Any, training: Any, neighbours: Neighbours, rows: int = 8) -> np.ndarray:
    """The samples that lie closest to the training set, closest first, each with its nearest
    training images to its right: one (H', W', 3) uint8.

    `samples` and `training` give images (B, H, W, C) uint8 for numbers (B,), as `sets.Images`.
    """
    chosen = neighbours.distances[:, 0].argsort(kind="stable")[:rows]
    indices = neighbours.indices[chosen]
    found = training[indices.reshape(-1)]
    lines = np.concatenate(
        [samples[chosen][:, None], found.reshape(*indices.shape, *found.shape[1:])], axis=1
    )
    return pictures.grid(lines.reshape(-1, *found.shape[1:]), columns=lines.shape[1])
