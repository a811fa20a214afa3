"""What classifiers say of conditional samples: the classification accuracy score, and how often the
judge sees what was asked for.

    rows = compare({"real": Labelled(train, targets), "samples": ...}, Labelled(valid, targets),
                   names, AccuracyScore(), device)
    rows["samples"]     {"cas_average_precision": Score(...), "cas_average_precision/Smiling": ...}

The classification accuracy score (CAS; Ravuri and Vinyals 2019, Razavi et al. 2019) is how well a
classifier does on real images that has learned from samples alone. Samples without variety, or
without what they were asked for, teach little. The judge only sees the latter.

Targets are attributes (N, A) in {-1 no, 0 unknown, +1 yes}, or classes (N,) in 0..A - 1; `names`
are those of the A attributes or classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.order import batches
from pipeline.evaluation import pictures
from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.information import Estimate, mean_with_error
from pipeline.evaluation.sets import Images, batches_of
from pipeline.models.classifier import NUM_GROUPS, Classifier, ClassifierConfig, loss
from pipeline.stage import UserError
from pipeline.training.schedule import learning_rate
from pipeline.training.tracking import progress_bar

RESAMPLES = 200  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class AccuracyScore:
    """How the classifiers of a comparison are trained, all alike. Scores by different ones are not
    comparable."""

    channels: int = 16
    """Width of the first stage, a multiple of 8."""
    total_images: int = 20_000
    """Length of each training in images; the same for any number of different images."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam; after the warm-up a cosine down to 0."""
    warmup_images: int = 1_000
    """Length of the linear warm-up."""
    seed: int = 0
    """Seed of the initial weights, the data order, the flips and the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("total_images", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"accuracy_score.{name} must be positive, got "
                                 f"{getattr(self, name)}")  # fmt: skip
        if self.channels < NUM_GROUPS or self.channels % NUM_GROUPS:
            raise ValueError(f"accuracy_score.channels must be a multiple of {NUM_GROUPS}, got "
                             f"{self.channels}")  # fmt: skip


class Labelled(NamedTuple):
    """Images by number, and what they are of."""

    images: Images
    targets: np.ndarray
    """(N, A) or (N,), see above."""


# The classification accuracy score.


def compare(
    sets: Mapping[str, Labelled],
    test: Labelled,
    names: Sequence[str],
    config: AccuracyScore,
    device: torch.device,
) -> dict[str, dict[str, Score]]:
    """Scores by set, and those of guessing (`base rate`); real training images and reconstructions
    of them belong beside samples. ValueError for sets of different sizes."""
    sizes = {name: len(labelled.targets) for name, labelled in sets.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"sets to be compared need the same number of images, got {sizes}")
    rows = {
        name: accuracy_score(labelled, test, names, config, device, name)
        for name, labelled in sets.items()
    }
    return {**rows, "base rate": guessing(test.targets, names)}


def accuracy_score(
    train: Labelled,
    test: Labelled,
    names: Sequence[str],
    config: AccuracyScore,
    device: torch.device,
    description: str = "CAS",
) -> dict[str, Score]:
    """A classifier of `train`, tested on real images `test`; see `scores`.

    The same on a CPU for the same arguments. All training images are kept in memory. Seeds the
    global generator. ValueError for targets that do not fit, UserError where training diverges.
    """
    for labelled in (train, test):
        _check(labelled, names)
    if train.targets.ndim != test.targets.ndim:
        raise ValueError("train and test targets must both be attributes, or both be classes")
    shapes = [labelled.images[np.arange(1)].shape[1:] for labelled in (train, test)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"train and test images have different shapes {shapes}")
    model = _trained(train, names, config, device, description)
    logits = predict(model, test.images, device, f"{description}: test")
    if not np.isfinite(logits).all():
        raise UserError(
            f"the classifier of {description} diverged; lower --accuracy_score.learning_rate"
        )
    return scores(logits, test.targets, names, config.seed)


def _check(labelled: Labelled, names: Sequence[str]) -> None:
    images, targets = labelled
    if len(images) != len(targets) or not len(images):
        raise ValueError(f"{len(images)} images have {len(targets)} targets; give both, as many")
    if targets.ndim == 1 and not ((targets >= 0) & (targets < len(names))).all():
        raise ValueError(f"classes must be in 0..{len(names) - 1}")
    if targets.ndim == 2 and targets.shape[1] != len(names):
        raise ValueError(f"{targets.shape[1]} attributes have {len(names)} names")
    if targets.ndim == 2 and not np.isin(targets, (-1, 0, 1)).all():
        raise ValueError("attributes must be -1, 0 or 1")


def _trained(
    train: Labelled,
    names: Sequence[str],
    config: AccuracyScore,
    device: torch.device,
    description: str,
) -> Classifier:
    """A classifier after `config.total_images` images of `train`."""
    pixels, targets = _read(train.images, f"{description}: images"), train.targets.astype(np.int64)
    kind = "classes" if targets.ndim == 1 else "attributes"
    torch.manual_seed(config.seed)
    model_config = ClassifierConfig(
        in_channels=pixels.shape[3], num_outputs=len(names), channels=config.channels, kind=kind,
        names=tuple(names),
    )  # fmt: skip
    model = Classifier(model_config).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    order = batches(len(pixels), config.batch_size, 0, 1, 0, config.seed)
    rng = np.random.default_rng(config.seed)
    with progress_bar(config.total_images, f"{description}: training") as bar:
        for seen in range(0, config.total_images, config.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    seen, config.learning_rate, "cosine", config.warmup_images, config.total_images
                )
            numbers = next(order)
            images = pictures.to_unit(pixels[numbers], device)
            if kind == "attributes":  # a face may be mirrored, a digit may not
                mirror = torch.from_numpy(rng.random(len(numbers)) < 0.5).to(device)
                images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
            total = loss(model(images), torch.from_numpy(targets[numbers]).to(device), kind)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            bar.update(len(numbers))
    return model.eval()


def _read(images: Images, description: str) -> np.ndarray:
    """All images, (N, H, W, C) uint8."""
    parts = []
    with progress_bar(len(images), description) as bar:
        for batch in batches_of(images, range(len(images))):
            parts.append(batch)
            bar.update(len(batch))
    return np.concatenate(parts)


@torch.no_grad()
def predict(
    model: Classifier, images: Images, device: torch.device, description: str
) -> np.ndarray:
    """Logits (N, A) float64 of images by number."""
    logits = []
    with progress_bar(len(images), description) as bar:
        for batch in batches_of(images, range(len(images))):
            logits.append(model(pictures.to_unit(batch, device)).double().cpu().numpy())
            bar.update(len(batch))
    return np.concatenate(logits)


def scores(
    logits: np.ndarray, targets: np.ndarray, names: Sequence[str], seed: int = 0
) -> dict[str, Score]:
    """`cas_accuracy`, top-1, of classes; `cas_average_precision`, the mean over attributes; and
    `<metric>/<name>`: the recall of a class, the average precision of an attribute.

    With 95 % intervals, 1.96 standard deviations of a bootstrap over the images. Classes and
    attributes that the known targets do not show are left out. logits (N, A).
    """
    rng, count = np.random.default_rng(seed), len(logits)
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = np.concatenate([np.ones((1, count), drawn.dtype), drawn])  # first the images as is
    values = {}
    if targets.ndim == 1:
        metric, right = "cas_accuracy", logits.argmax(1) == targets
        values[metric] = weights @ right / count
        for label in np.unique(targets):
            ours = targets == label
            found = weights[:, ours] @ right[ours] / weights[:, ours].sum(1).clip(min=1)
            values[f"{metric}/{names[label]}"] = found
    else:
        metric, found = "cas_average_precision", {}
        for column, name in enumerate(names):
            known, positive = targets[:, column] != 0, targets[:, column] > 0
            if positive.any():
                precision = average_precision(
                    logits[known, column], positive[known], weights[:, known]
                )
                found[f"{metric}/{name}"] = precision
        if not found:
            raise ValueError("no test image has any of the attributes")
        values = {metric: np.mean([*found.values()], axis=0), **found}
    return {name: _with_interval(found) for name, found in values.items()}


def _with_interval(values: np.ndarray) -> Score:
    """The first of the values, and the spread of the others."""
    value, margin = float(values[0]), 1.96 * float(values[1:].std(ddof=1))
    return Score(value, (max(0.0, value - margin), min(1.0, value + margin)))


def average_precision(logits: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,): mean over the positives of the precision at their rank, for each row of weights.

    logits (N,), positive (N,) bool, weights (R, N): how often each image counts; copies of an image
    have the same rank. Other images of equal logits rank in their order. 0 without positives.
    """
    order = np.argsort(-logits, kind="stable")
    weights = weights[:, order]
    hits = weights * positive[order]
    precision = hits.cumsum(1) / weights.cumsum(1).clip(min=1)
    return (hits * precision).sum(1) / hits.sum(1).clip(min=1)


def guessing(targets: np.ndarray, names: Sequence[str]) -> dict[str, Score]:
    """What `scores` come to without looking: the share of the most frequent class, or that of the
    positives, which is the average precision of a random order of many images."""
    if targets.ndim == 1:
        return {"cas_accuracy": Score(float(np.bincount(targets).max() / len(targets)))}
    metric, known = "cas_average_precision", (targets != 0).sum(0)
    shares = {
        f"{metric}/{name}": float((targets[:, column] > 0).sum() / known[column])
        for column, name in enumerate(names)
        if (targets[:, column] > 0).any()
    }
    mean = float(np.mean([*shares.values()]))
    return {name: Score(value) for name, value in {metric: mean, **shares}.items()}


# Attributes as the judge sees them.


def most_balanced(
    attributes: np.ndarray, names: Sequence[str], usable: set[str], count: int = 10
) -> list[str]:
    """The usable attributes nearest to half yes, half no; attributes (N, A)."""
    far = dict(zip(names, abs((attributes > 0).mean(0) - 0.5), strict=True))
    return sorted((name for name in names if name in usable), key=far.__getitem__)[:count]


def agreement(yes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether the judge's yes (N, k) is what the attributes (N, k) say: 1, 0, or NaN = unknown."""
    return np.where(wanted == 0, np.nan, yes == (wanted > 0))


def base_rate(yes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(k,): what the agreement of independent answers and attributes of these frequencies is."""
    answered, true = yes.mean(0), (wanted > 0).sum(0) / (wanted != 0).sum(0)
    return answered * true + (1 - answered) * (1 - true)


def accuracies(agreements: np.ndarray) -> list[Estimate]:
    """For each attribute, and last for their mean, from agreements (N, k). The mean's error is that
    of the images' means, as the answers to one image go together."""
    known = ~np.isnan(agreements)
    means = np.nanmean(agreements[known.any(1)], axis=1)
    columns = [values[is_known] for values, is_known in zip(agreements.T, known.T, strict=True)]
    return [mean_with_error(torch.from_numpy(values)) for values in [*columns, means]]


def attribute_accuracy(
    yes: np.ndarray, wanted: np.ndarray, names: Sequence[str]
) -> dict[str, Score]:
    """`attribute_accuracy`, the mean over attributes, `attribute_accuracy/<name>`, and what both
    would be of answers that have nothing to do with what was asked for, `attribute_base_rate`.

    With 95 % intervals over the images. yes (N, k) bool: the judge's answers; wanted (N, k) in
    {-1, 0 = not asked, +1}, each attribute asked of two images at least.
    """
    base = base_rate(yes, wanted)
    found = {}
    for name, share, rate in zip(
        [*(f"/{name}" for name in names), ""], accuracies(agreement(yes, wanted)),
        [*base, base.mean()], strict=True,
    ):  # fmt: skip
        value, margin = share.value, 1.96 * share.standard_error
        interval = (max(0.0, value - margin), min(1.0, value + margin))
        found[f"attribute_accuracy{name}"] = Score(value, interval)
        found[f"attribute_base_rate{name}"] = Score(float(rate))
    return found
