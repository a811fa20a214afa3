"""Distances between two sets of images: features by one extractor, arithmetic by torch-fidelity.

    judge = judge_extractor(Path("runs/demo/classifier-judge"), device)
    real = extract([judge], sets.batches_of(images, indices), len(indices), "real")["judge"]
    scores(samples, real)        {"frechet": Score(...), "kid": ..., "precision": ...}
    extrapolated_frechet(samples["features"], real["features"])      without the bias of few images

Sets are iterables of uint8 batches (B, H, W, C), whether they come from files, shards or a model.
A figure is named after its features: `inception` are the published weights and nothing else, so
only they make an FID; other weights go by the first 8 hex digits of their SHA-256.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.sets import MIN_IMAGES
from pipeline.models.blocks import true_fp32
from pipeline.stage import UserError
from pipeline.training.tracking import progress_bar

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SHORT_NAMES = ("frechet", "kid", "precision", "recall", "inception_score")  # of samples, in tags
NEIGHBOURHOOD = 3  # nearest neighbours of precision and recall (Kynkäänniemi et al. 2019)
RESAMPLES = 20  # of the bootstrap
BLOCK = 2000  # images turned into float64, or compared with all others, at a time
PARTS = (1, 2, 4, 8)  # the extrapolation cuts a set into so many
DRAWS = 3  # ways to cut it; 1 for wide features
WIDE = 512  # features; of more of them a Fréchet distance takes seconds to minutes
MIN_EXTRAPOLATED = PARTS[-1] * MIN_IMAGES

Batches = Iterable[np.ndarray]
Points = list[tuple[float, float, float | None]]  # (1 / images, mean distance, standard error)


def with_channels(batch: np.ndarray, extractor: Extractor) -> np.ndarray:
    """Grey images (B, H, W, 1) repeated for an extractor of colours; others as they are."""
    if batch.shape[3] not in (1, extractor.channels):
        raise UserError(
            f"features {extractor.name} are of {extractor.channels} channels, the images have "
            f"{batch.shape[3]}; give a judge trained on these images"
        )
    return np.repeat(batch, extractor.channels // batch.shape[3], axis=3)


@torch.no_grad()
def extract(
    extractors: Sequence[Extractor], batches: Batches, total: int, description: str
) -> dict[str, dict[str, torch.Tensor]]:
    """Features of a set of images: extractor name -> layer -> (N, F) float64 on the CPU.

    Every batch is made once and shown to all extractors. `total` and `description` are for the
    progress bar.
    """
    parts = {extractor.name: [] for extractor in extractors}
    with (
        progress_bar(total, description) as bar,
        true_fp32(),
    ):
        for batch in batches:
            for extractor in extractors:
                tensor = torch.from_numpy(with_channels(batch, extractor)).to(extractor.device)
                features = extractor.module(tensor.permute(0, 3, 1, 2))
                parts[extractor.name].append([layer.double().cpu() for layer in features])
            bar.update(len(batch))
    found = {}
    for extractor in extractors:
        layers = extractor.module.get_requested_features_list()
        columns = zip(*parts[extractor.name], strict=True)
        found[extractor.name] = {
            layer: torch.cat(column) for layer, column in zip(layers, columns, strict=True)
        }
    return found


class Score(NamedTuple):
    """A figure, and its uncertainty: an interval, or the spread over subsets or splits."""

    value: float
    interval: tuple[float, float] | None = None
    spread: float | None = None


class Extrapolation(NamedTuple):
    """A distance in the limit of infinitely many images, and the line that leads there."""

    limit: Score
    points: Points
    """The limit first, at 0."""


def over_seeds(found: Sequence[Score]) -> Score:
    """Mean of a figure over runs that differ in their seed, and its standard deviation.

    Raises ValueError for fewer than 2 runs.
    """
    if len(found) < 2:
        raise ValueError(f"a spread over seeds needs at least 2 of them, got {len(found)}")
    values = [score.value for score in found]
    return Score(float(np.mean(values)), spread=float(np.std(values, ddof=1)))


def shortage(num_images: int, num_features: int) -> str | None:
    """A line of warning where there are too few images for a Fréchet distance, else None."""
    if num_images > num_features:
        return None
    return (
        f"{num_images:,} images with {num_features:,} features each have a singular covariance, so "
        f"their Fréchet distance is mostly bias; quote KID, or give more than {num_features:,}"
    )


def check(**sets: torch.Tensor) -> None:
    """Raises UserError for too few images or a feature that is not finite, ValueError for widths
    that differ; sets are features (N, F) by a name for the message."""
    for name, features in sets.items():
        if len(features) < MIN_IMAGES:
            raise UserError(
                f"{len(features)} {name} images are too few to score; give at least {MIN_IMAGES}"
            )
        if not (finite := features.sum(1).isfinite()).all():
            raise UserError(
                f"features of {name} image {int((~finite).nonzero()[0])} are not finite; look at "
                "that image and at the weights of the features"
            )
    if len(widths := {features.shape[1] for features in sets.values()}) > 1:
        raise ValueError(f"features of different widths {sorted(widths)} cannot be compared")


def _statistics(features: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean (F,) and covariance (F, F) float64, as torch-fidelity keeps them. In blocks: its own
    makes three float64 copies of the features, and means in float32 where they are float32."""
    blocks = features.split(BLOCK)
    mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(features)
    scatter = np.zeros((features.shape[1], features.shape[1]))
    for block in blocks:
        centred = (block - mean).numpy()
        scatter += centred.T @ centred
    return {"mu": mean.numpy(), "sigma": scatter / (len(features) - 1)}


def frechet_distance(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of features (N, F) and (M, F), float32 or float64
    (Heusel et al. 2017, eq. 6)."""
    ours, theirs = (_statistics(torch.as_tensor(features)) for features in (a, b))
    return fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]


def frechet_with_interval(
    a: torch.Tensor, b: torch.Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> Score:
    """Fréchet distance of features (N, F) and (M, F), with a 95 % bootstrap interval.

    Sets of one length are resampled together, because reconstructions come with their originals.
    The interval is the value plus or minus 1.96 standard deviations over the resamples. Their
    percentiles would lie above the value: a resample repeats images, which adds to the bias.
    """
    value = frechet_distance(a, b)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = rng.integers(len(a), size=len(a))
        others = rows if len(a) == len(b) else rng.integers(len(b), size=len(b))
        values.append(frechet_distance(a[torch.from_numpy(rows)], b[torch.from_numpy(others)]))
    margin = 1.96 * float(np.std(values, ddof=1))
    return Score(value, (max(0.0, value - margin), value + margin))


def extrapolated_frechet(
    generated: torch.Tensor, real: torch.Tensor, seed: int = 0
) -> Extrapolation:
    """Fréchet distance of features (N, F) and (M, F) in the limit of infinitely many images.

    The bias of a Fréchet distance goes with 1/n (Chong & Forsyth 2020, section 3), so the distance
    of all images and the mean distances of 2, 4 and 8 disjoint parts lie on a line in 1/n, whose
    value at 0 is the limit. Its standard error is that of the mean over the 8 parts, which are
    independent, together with how far the limit moves without them: where parts have fewer images
    than features, the line bends. A t distribution of 7 degrees of freedom makes it a 95 %
    interval. The error is 2 to 3 times too wide where the limit is 0.

    Sets of one length are cut alike, because reconstructions come with their originals. Raises
    UserError for fewer than MIN_EXTRAPOLATED images.
    """
    check(generated=generated, real=real)
    if (fewest := min(len(generated), len(real))) < MIN_EXTRAPOLATED:
        raise UserError(f"{fewest} images are too few to extrapolate; give {MIN_EXTRAPOLATED}")
    whole = frechet_distance(generated, real)
    points: Points = [(1 / len(generated), whole, None)]
    error, draws = 0.0, DRAWS if generated.shape[1] <= WIDE else 1
    for parts in PARTS[1:]:
        distances = np.empty((draws, parts))
        for draw in range(draws):
            cut = (_parts(features, parts, (seed, draw)) for features in (generated, real))
            distances[draw] = list(map(frechet_distance, *cut))
        error = float(np.sqrt(distances.var(1, ddof=1).mean() / parts))
        points.append((parts / len(generated), float(distances.mean()), error))
    limit = _limit(points)
    error = math.hypot(error, limit - _limit(points[:-1]))
    margin = error * float(t.ppf(0.975, PARTS[-1] - 1))
    return Extrapolation(
        Score(limit, (limit - margin, limit + margin)), [(0.0, limit, error), *points]
    )


def _limit(points: Points) -> float:
    """The value at 0 of a line through the points (1 / images, distance), by least squares. Beside
    what they share, the variance of the distances grows with 1 / images."""
    x, y, _ = zip(*points, strict=True)
    return float(np.polynomial.Polynomial.fit(x, y, 1, w=np.power(x, -0.5))(0.0))


def _parts(features: torch.Tensor, parts: int, seed: tuple[int, int]) -> list[torch.Tensor]:
    """Disjoint random parts of equal size; what is left over goes unused."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    return [features[rows] for rows in order.split(len(features) // parts)[:parts]]


def frechet(
    generated: Mapping[str, torch.Tensor], real: Mapping[str, torch.Tensor], seed: int = 0
) -> Score:
    """Fréchet distance on the first layer of both, as `extract` returns them for one extractor;
    with an interval where features are few enough for a bootstrap to be quick."""
    layer = next(iter(generated))
    ours, theirs = generated[layer], real[layer]
    check(generated=ours, real=theirs)
    if ours.shape[1] <= WIDE:
        return frechet_with_interval(ours, theirs, seed=seed)
    return Score(frechet_distance(ours, theirs))


def scores(
    generated: Mapping[str, torch.Tensor], real: Mapping[str, torch.Tensor], seed: int = 0
) -> dict[str, Score]:
    """Fréchet distance, KID, precision and recall on the first layer of both, and the inception
    score where there are logits. Features (N, F) and (M, F), float32 or float64.

    Raises UserError for fewer than MIN_IMAGES images or features that are not finite.
    """
    layer = next(iter(generated))
    ours, theirs = generated[layer], real[layer]
    check(generated=ours, real=theirs)
    # float64: a difference of means of cubes
    kid = kid_features_to_metric(
        ours.double(), theirs.double(), kid_subsets=KID_SUBSETS, verbose=False, rng_seed=seed,
        kid_subset_size=kid_subset_size(min(len(ours), len(theirs))),
    )  # fmt: skip
    # the first set is the generated one; distances in parts, for memory
    prc = prc_features_to_metric(
        ours, theirs, prc_neighborhood=NEIGHBOURHOOD, prc_batch_size=BLOCK, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    found = {
        "frechet": frechet(generated, real, seed),
        "kid": Score(kid["kernel_inception_distance_mean"],
                     spread=kid["kernel_inception_distance_std"]),
        "precision": Score(prc["precision"]),
        "recall": Score(prc["recall"]),
    }  # fmt: skip
    if "logits_unbiased" in generated:
        score = isc_features_to_metric(generated["logits_unbiased"], rng_seed=seed)
        found["inception_score"] = Score(
            score["inception_score_mean"], spread=score["inception_score_std"]
        )
    return found


def kid_subset_size(num_images: int) -> int:
    """The usual 1,000, or half of the images where there are fewer than 2,000."""
    return min(KID_SUBSET_SIZE, num_images // 2)


def tag(images: str, metric: str, features: str) -> str:
    """The metric tag of a figure; the only place that writes `fid`.

    The usual distances of samples have short names (`fid/inception`, `frechet/judge`), FID of
    reconstructions is `rfid/inception`; everything else is below `evaluation/<images>/`.
    """
    short = images == "samples" and metric in SHORT_NAMES
    if metric == "frechet" and features == "inception":
        metric = "fid"
        if images == "reconstructions":
            return "rfid/inception"
    return f"{metric}/{features}" if short else f"evaluation/{images}/{metric}/{features}"
