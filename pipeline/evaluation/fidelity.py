"""Distances between two sets of images: features by one extractor, arithmetic by torch-fidelity.

    judge = judge_extractor(Path("runs/demo/classifier-judge"), device)
    real = extract([judge], sets.batches_of(images, indices), len(indices), "real")["judge"]
    scores(samples, real)        {"frechet": Score(...), "kid": ..., "precision": ...}

Sets are iterables of uint8 batches (B, H, W, C), whether they come from files, shards or a model.
A figure is named after its features: `inception` are the published weights and nothing else, so
only they make an FID; other weights go by the first 8 hex digits of their SHA-256.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.evaluation.extractors import Extractor
from pipeline.stage import UserError
from pipeline.training.tracking import progress_bar

MIN_IMAGES = 16  # fewer make no subset, no neighbourhood and no score
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURHOOD = 3  # nearest neighbours of precision and recall (Kynkäänniemi et al. 2019)
RESAMPLES = 20  # of the bootstrap

Batches = Iterable[np.ndarray]


def _with_channels(batch: np.ndarray, extractor: Extractor) -> np.ndarray:
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
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        for batch in batches:
            for extractor in extractors:
                tensor = torch.from_numpy(_with_channels(batch, extractor)).to(extractor.device)
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


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of features (N, F) (Heusel et al. 2017, eq. 6)."""
    a, b = (fid_features_to_statistics(torch.as_tensor(f)) for f in (features_a, features_b))
    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def frechet_from_features(
    features_a: np.ndarray, features_b: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Score:
    """Fréchet distance of features (N, F) float64, with a 95 % bootstrap interval.

    The interval is the value plus or minus 1.96 standard deviations over the resamples. Their
    percentiles would lie above the value: a resample repeats images, which adds to the bias.
    """
    value = frechet_distance(features_a, features_b)
    rng = np.random.default_rng(seed)
    values = [
        frechet_distance(*(f[rng.integers(len(f), size=len(f))] for f in (features_a, features_b)))
        for _ in range(resamples)
    ]
    margin = 1.96 * float(np.std(values, ddof=1))
    return Score(value, (max(0.0, value - margin), value + margin))


def frechet(
    generated: Mapping[str, torch.Tensor], real: Mapping[str, torch.Tensor], seed: int = 0
) -> Score:
    """Fréchet distance on the first layer of both, as `extract` returns them for one extractor;
    with an interval where features are few enough for a bootstrap to be quick."""
    layer = next(iter(generated))
    ours, theirs = generated[layer].numpy(), real[layer].numpy()
    if ours.shape[1] <= 512:
        return frechet_from_features(ours, theirs, seed=seed)
    return Score(frechet_distance(ours, theirs))


def scores(
    generated: Mapping[str, torch.Tensor], real: Mapping[str, torch.Tensor], seed: int = 0
) -> dict[str, Score]:
    """Fréchet distance, KID, precision and recall on the first layer of both, and the inception
    score where there are logits."""
    layer = next(iter(generated))
    ours, theirs = generated[layer], real[layer]
    fewest = min(len(ours), len(theirs))
    if fewest < MIN_IMAGES:
        raise UserError(f"{fewest} images are too few to score; give at least {MIN_IMAGES}")
    kid = kid_features_to_metric(
        ours, theirs, kid_subsets=KID_SUBSETS, verbose=False, rng_seed=seed,
        kid_subset_size=kid_subset_size(fewest),
    )  # fmt: skip
    # the first set is the generated one; distances in parts, for memory
    prc = prc_features_to_metric(
        ours, theirs, prc_neighborhood=NEIGHBOURHOOD, prc_batch_size=2000, save_cpu_ram=True,
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

    Samples have the short names (`fid/inception`, `frechet/judge`), reconstructions `rfid/...`;
    everything else is below `evaluation/<images>/`.
    """
    if metric == "frechet" and features == "inception":
        metric = "fid"
        if images == "reconstructions":
            return "rfid/inception"
    return (
        f"{metric}/{features}"
        if images == "samples"
        else f"evaluation/{images}/{metric}/{features}"
    )
