"""Classifier-based rejection sampling (Razavi et al. 2019, section 3.3): of many candidates keep
those in which a classifier sees most surely what was asked for.

The classifier is the selector, trained on the other half of the images than the judge, so that
nothing is tuned on its own yardstick. The share that is kept, the acceptance rate, trades variety
for fidelity.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.image_model import Asked
from pipeline.models.classifier import Classifier
from pipeline.stage import UserError
from pipeline.training.checkpoint import load_model, model_sha256, read_about

SELECTOR_HALF = 0
RATES = (1.0, 0.75, 0.5, 0.25, 0.1)


def log_prob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats (B,) of a classifier's logits (B, A): log p of the class, targets (B,) int64, or the sum
    of log p over the attributes asked for, targets (B, A) in {-1, 0, +1}."""
    if targets.dim() == 1:
        return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return (F.logsigmoid(logits * targets) * (targets != 0)).sum(1)


def own_answers(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """The answers a classifier is surest of, as targets of `log_prob`: for images of which nothing
    was asked."""
    return logits.argmax(1) if kind == "classes" else torch.where(logits > 0, 1, -1)


class Selector(NamedTuple):
    """A classifier that scores images by the log-probability of what they were asked for."""

    model: Classifier
    sha256: str

    def targets(self, asked: Asked) -> torch.Tensor:
        """What was asked for, as `log_prob` takes it: in the order of the classifier's outputs.

        Raises UserError for names the classifier does not know, and where nothing was asked that it
        could judge by.
        """
        names, kind = self.model.config.names, self.model.config.kind
        used = asked.labels >= 0 if kind == "classes" else (asked.attributes != 0).any(1)
        if not used.all():
            raise UserError(
                f"the selector tells {kind} apart and none was asked for; ask for some of "
                f"{', '.join(names)}"
            )
        if kind == "classes":
            wanted = {label: asked.class_names[label] for label in set(asked.labels.tolist())}
        else:
            columns = np.flatnonzero((asked.attributes != 0).any(0)).tolist()
            wanted = {column: asked.attribute_names[column] for column in columns}
        if unknown := [name for name in wanted.values() if name not in names]:
            raise UserError(f"the selector does not know {unknown[0]}; it knows {', '.join(names)}")
        number = {theirs: names.index(name) for theirs, name in wanted.items()}
        if kind == "classes":
            return torch.tensor([number[label] for label in asked.labels.tolist()])
        targets = torch.zeros(len(asked.attributes), len(names))
        targets[:, [*number.values()]] = torch.from_numpy(asked.attributes[:, [*number]]).float()
        return targets

    @torch.no_grad()
    def log_prob(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] and what they were asked for, from `targets` -> (B,)."""
        logits = self.model(images).float()
        return log_prob(logits, targets.to(logits.device))


def load_selector(path: Path, recipe: str, device: torch.device) -> Selector:
    """The selector of a run directory of train_classifier.py.

    Raises UserError for a classifier of the judge's half or of images of another recipe.
    """
    model, about = load_model(path, "classifier"), read_about(path)
    if about["half"] != SELECTOR_HALF:
        raise UserError(
            f"{path} was trained on the judge's half of the images; train a selector with "
            f"train_classifier.py --half {SELECTOR_HALF}, another --seed and other --channels"
        )
    if about["recipe"] != recipe:
        raise UserError(
            f"{path} was trained on images of recipe {about['recipe']}, the VQ-VAE on {recipe}; "
            "train a selector on the VQ-VAE's shards with its --image_size"
        )
    return Selector(model.to(device), model_sha256(path))


def num_candidates(num_images: int, acceptance: float) -> int:
    """How many to draw so that this share of them is `num_images`."""
    return math.ceil(round(num_images / acceptance, 6))


def best(log_probs: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the `count` candidates with the highest log_probs (N,), in ascending order; of
    equal ones the first."""
    return np.sort(np.argsort(-log_probs, kind="stable")[:count])


def accepted(log_probs: np.ndarray, rates: Sequence[float] = RATES) -> dict[float, np.ndarray]:
    """Numbers of the candidates kept at each acceptance rate, of log_probs (N,).

    As many at every rate, N times the smallest: the best of so many first candidates that they are
    this share of them.
    """
    if not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"rates must be in (0, 1], got {rates}")
    count = int(len(log_probs) * min(rates) + 1e-6)
    return {rate: best(log_probs[: num_candidates(count, rate)], count) for rate in rates}


def curves(
    log_probs: np.ndarray,
    features: torch.Tensor,
    reference: torch.Tensor,
    name: str,
    rates: Sequence[float] = RATES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """What acceptance trades: Fréchet distance, precision and recall over the rate, by title.

    Errors are half a 95 % interval: of the Fréchet distance by a bootstrap (None where features are
    too wide for it), of precision and recall by the binomial's normal approximation, given the
    other set.

    Args:
        log_probs: of a pool of candidates, (N,); best by these are kept, see `accepted`.
        features: of the pool, (N, F); reference: of real images, (M, F); both on the CPU.
        name: of the features.
    """
    # late: slow to import, and no need of those who only sample
    from torch_fidelity.metric_prc import prc_features_to_metric

    from pipeline.evaluation import fidelity

    if len(log_probs) != len(features):
        raise ValueError(f"{len(log_probs)} log_probs are of {len(features)} features")
    kept = accepted(log_probs, rates)
    count = len(next(iter(kept.values())))
    if count < fidelity.MIN_IMAGES:
        raise UserError(
            f"{len(log_probs)} candidates leave {count} images at rate {min(rates)}; draw more, at "
            f"least {num_candidates(fidelity.MIN_IMAGES, min(rates))}"
        )
    distances, shares = [], {"precision": [], "recall": []}
    for rate, numbers in kept.items():
        chosen = features[numbers]
        distance = fidelity.frechet({name: chosen}, {name: reference}, seed)
        error = distance.interval and distance.interval[1] - distance.value
        distances.append([rate, distance.value, error])
        found = prc_features_to_metric(
            chosen, reference, prc_neighborhood=fidelity.NEIGHBOURHOOD,
            prc_batch_size=fidelity.BLOCK, save_cpu_ram=True, verbose=False,
        )  # fmt: skip
        for metric, trials in (("precision", count), ("recall", len(reference))):
            share = found[metric]
            error = 1.96 * math.sqrt(share * (1 - share) / trials)
            shares[metric].append([rate, share, error])
    note = (
        f"{count:,} images at every rate, the best by the selector's log-probability of the first "
        f"{count:,} / rate candidates; {len(reference):,} real images"
    )
    about = {"x": "acceptance rate", "note": note}
    series = {"Fréchet distance": {"samples": distances}, "Precision and recall": shares}
    return {
        f"{y} by acceptance rate ({name})": {**about, "y": y, "series": points}
        for y, points in series.items()
    }
