"""What trained models are compared by, and the table: VAEs and VQ-VAEs on one protocol.

Of each model the same sets of images are made and scored against the same real ones: decoder means,
clamped and rounded to uint8 as in files. What cannot be had of a model is left out and becomes a
dash in the table.

    reconstructions   decoded at the posterior's mean; of a VQ-VAE from its codes
    samples           z from the model's own prior, N(0, I) or p(z|y) with y of the scored images;
                      of a VQ-VAE the files that sample_prior.py made with its priors
    gaussian, mixture z from a density fitted to posterior means of training images (ex post, Ghosh
                      et al. 2020, section 4), y of training images drawn independently of z
    interpolations    half-way on the line between the means (and y) of two random images; of a
                      VQ-VAE between the latents of all levels before they are quantized
"""

import math
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.images import ImageSet
from pipeline.evaluation import fidelity, latents, levels, pictures, vae_figures
from pipeline.evaluation.code_likelihood import fit_log_scale, image_nats, knows_y
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.information import mean_with_error
from pipeline.evaluation.latent_pictures import prior_latents
from pipeline.evaluation.report import SETS as REFERENCES
from pipeline.evaluation.sets import BATCH_SIZE, batches_of
from pipeline.models.priors.prior import Prior
from pipeline.models.vae.vae import VAE
from pipeline.models.vqvae import VQVAE

SETS = ("reconstructions", "samples", "gaussian", "mixture", "interpolations")
COMPONENTS = 10  # of the mixture
SHOWN = 16  # images of each set in the picture
FIT_IMAGES = 200  # training images for the scale of a VQ-VAE's logistic, one number
TIMED_BATCHES = 3  # of the sampling speed, after one that does not count

Figures = dict[str, dict[str, Any]]  # tag -> value, interval, spread as in fidelity.Score


class Data(NamedTuple):
    """The images that all models are compared on."""

    train: ImageSet
    num_train: int
    """The first so many training images, for densities, probes and the logistic's scale."""
    real: ImageSet
    chosen: np.ndarray
    """(n,) indices of the real images that are compared with."""
    seed: int
    device: torch.device


class Material(NamedTuple):
    """What is scored of a model."""

    sets: Mapping[str, Iterable[np.ndarray]]
    """Names in SETS -> n images as uint8 batches (B, H, W, C)."""
    probed: Iterable[tuple[str, np.ndarray, np.ndarray]]
    """What linear probes read: name, features of the training images and of the real ones."""


# A VAE.


@torch.no_grad()
def decoded(model: VAE, z: torch.Tensor, y: torch.Tensor) -> Iterator[np.ndarray]:
    """The decoder's means for z (N, D) and y (N, E), uint8 batches."""
    if model.config.posterior == "bernoulli":
        z = z.clamp(0, 1)  # a fitted density knows nothing of bits and their probabilities
    for batch in zip(z.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True):
        yield pictures.to_uint8(model.decode_mean(*batch))


def vae_material(model: VAE, binarized: bool, data: Data) -> Material:
    """The sets of a VAE or AE, and its posterior means for the probe."""
    rng, count = np.random.default_rng(data.seed), len(data.chosen)
    train, real = (
        vae_figures.Split(model, images, binarized, data.device)
        for images in (data.train, data.real)
    )
    learned = vae_figures.posterior_means(train, data.num_train)
    means = vae_figures.posterior_means(real, len(data.real))[data.chosen]
    z, y = (
        torch.from_numpy(means).to(data.device),
        vae_figures.conditions(model, data.real, data.chosen),
    )
    sets = {
        "reconstructions": decoded(model, z, y),
        "samples": decoded(model, prior_latents(model, y, data.seed), y),
    }
    y_train = vae_figures.conditions(model, data.train, rng.integers(data.num_train, size=count))
    for name, components in (("gaussian", 1), ("mixture", COMPONENTS)):
        try:
            density = latents.fit_mixture(learned, components, data.seed)
        except ValueError as error:
            print(f"no samples of a {name}: {error}; raise --train_images")
            continue
        drawn = latents.sample_density(density, count, data.seed)
        sets[name] = decoded(model, torch.from_numpy(drawn).to(data.device), y_train)
    other = torch.from_numpy(levels.partners(count, data.seed))
    sets["interpolations"] = decoded(model, z.lerp(z[other], 0.5), y.lerp(y[other], 0.5))
    return Material(sets, [("latent", learned, means)])


@torch.no_grad()
def sampling_speed(model: VAE, y: torch.Tensor) -> float:
    """Images per second from the prior to uint8, in batches of BATCH_SIZE."""
    y = y[torch.arange(BATCH_SIZE) % len(y)]

    def sample() -> None:
        pictures.to_uint8(model.decode_mean(model.prior(y).draw(1)[0][0], y))

    sample()
    start = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        sample()
    return TIMED_BATCHES * BATCH_SIZE / (time.perf_counter() - start)


# A VQ-VAE.


def vqvae_material(model: VQVAE, samples: Iterable[np.ndarray] | None, data: Data) -> Material:
    """The sets of a VQ-VAE, and the vectors of each level's codes for the probes, made when it is
    their turn.

    Args:
        samples: n images of its priors as uint8 batches, None where there are none.
    """
    sets: dict[str, Iterable[np.ndarray]] = {
        "reconstructions": reconstructed(model, data),
        "interpolations": between(model, data),
    }
    if samples is not None:
        sets["samples"] = samples
    learned = np.arange(data.num_train)
    train_codes = levels.encode(model, data.train, learned, data.device, "train codes")
    codes = levels.encode(model, data.real, data.chosen, data.device, "codes")
    probed = (
        (f"level{level}", embedded(model, train_codes, level), embedded(model, codes, level))
        for level in range(model.config.num_levels)
    )
    return Material(sets, probed)


@torch.no_grad()
def reconstructed(model: VQVAE, data: Data) -> Iterator[np.ndarray]:
    """Reconstructions of the real images, uint8 batches."""
    for originals in batches_of(data.real, data.chosen):
        batch = pictures.to_unit(originals, data.device)
        yield pictures.to_uint8(model(batch).reconstructions)


@torch.no_grad()
def mean_squared_error(model: VQVAE, data: Data) -> float:
    """Of the reconstructions in [0, 1], clamped, before they are rounded, as report_vae.py's."""
    errors = []
    for originals in batches_of(data.real, data.chosen):
        batch = pictures.to_unit(originals, data.device)
        reconstructions = model(batch).reconstructions.float().clamp(0, 1)
        errors.append((reconstructions - batch).square().mean((1, 2, 3)).double())
    return float(torch.cat(errors).mean())


@torch.no_grad()
def embedded(model: VQVAE, codes: levels.Codes, level: int) -> np.ndarray:
    """The codebook vectors of a level's codes (N, h, w), flattened: (N, D·h·w) float32."""
    quantizer: Any = model.quantizers[level]
    device, own = next(model.parameters()).device, codes[level]
    vectors = np.empty((len(own), model.config.code_dim * own[0].size), np.float32)
    for start in range(0, len(own), BATCH_SIZE):
        batch = torch.from_numpy(own[start : start + BATCH_SIZE].astype(np.int64)).to(device)
        vectors[start : start + BATCH_SIZE] = quantizer.lookup(batch).flatten(1).cpu().numpy()
    return vectors


def continuous_latents(model: VQVAE, images: torch.Tensor) -> list[torch.Tensor]:
    """Per level what is about to be quantized, (B, D, h, w), coarse to fine."""
    found: list[torch.Tensor] = []
    hooks = [
        quantizer.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        for quantizer in model.quantizers
    ]
    try:
        model.encode(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def between(model: VQVAE, data: Data) -> Iterator[np.ndarray]:
    """Images half-way between pairs of images, uint8 batches: the mean of their latents at each
    level, quantized and decoded."""
    quantizers: Any = model.quantizers
    other = data.chosen[levels.partners(len(data.chosen), data.seed)]
    for pair in zip(batches_of(data.real, data.chosen), batches_of(data.real, other), strict=True):
        ends = [continuous_latents(model, pictures.to_unit(each, data.device)) for each in pair]
        mixed = [
            quantizer((a + b) / 2).quantized
            for quantizer, a, b in zip(quantizers, *ends, strict=True)
        ]
        yield pictures.to_uint8(model.decode(mixed))


def vqvae_likelihood(model: VQVAE, priors: Sequence[Prior], data: Data) -> dict[str, Score]:
    """-log p(x|z_q(x)) of the real images and the scale of its logistic; with priors the length of
    the codes and the bound, class and attributes hidden, and the bound given these where a prior
    knows them. See code_likelihood.py."""
    learned = np.arange(min(FIT_IMAGES, data.num_train))
    log_scale = fit_log_scale(model, data.train, learned, data.device)
    pixels, codes, given = image_nats(model, priors, log_scale, data.real, data.chosen, data.device)
    figures = {"pixel_nats": pixels}
    if priors:
        nats_per_bit = data.real.recipe.channels * data.real.recipe.size**2 * math.log(2)
        figures |= {
            "code_length_nats": codes,
            "code_length_bits_per_dimension": codes / nats_per_bit,
            "bound": pixels + codes,
            "bits_per_dim": (pixels + codes) / nats_per_bit,
        }
    if knows_y(priors):
        figures["bound_given_y"] = pixels + given
    scores = {"logistic_log_scale": Score(log_scale)}
    for tag, values in figures.items():
        mean, error = mean_with_error(values)
        scores[tag] = Score(mean, (mean - 1.96 * error, mean + 1.96 * error))
    return scores


# Any model.


def measure(
    model: VAE | VQVAE,
    material: Material,
    data: Data,
    scorers: Sequence[Extractor],
    real_features: Mapping[str, Any],
    priors: Sequence[Prior] = (),
) -> tuple[Figures, np.ndarray]:
    """All that takes the model, and a picture (H', W', 3) uint8: a row of real images, then one of
    each set, in the order of SETS.

    Args:
        real_features: of the chosen images, as `fidelity.extract` returns them.
        priors: of a VQ-VAE's codes, coarse to fine; none where it has none.
    """
    scores: dict[str, Score] = {}
    rows = [data.real[data.chosen[:SHOWN]]]
    for name in [name for name in SETS if name in material.sets]:
        images = np.concatenate(list(material.sets[name]))
        scores |= distances(name, images, scorers, real_features, data.seed)
        rows.append(images[:SHOWN])
    scores["parameters"] = Score(sum(each.numel() for each in model.parameters()))
    if isinstance(model, VAE):
        y = vae_figures.conditions(model, data.real, data.chosen)
        scores["sampling_images_per_sec"] = Score(sampling_speed(model, y))
    else:
        scores["mse"] = Score(mean_squared_error(model, data))
        scores |= vqvae_likelihood(model, priors, data)
    targets = [vae_figures.targets_of(images) for images in (data.train, data.real)]
    targets = targets[0][: data.num_train], targets[1][data.chosen]
    for name, learned, features in material.probed if targets[0].shape[1] else ():
        try:
            probe = latents.linear_probe(learned, targets[0], features, targets[1])
        except ValueError as error:
            print(f"no linear probe of {name}: {error}")
            continue
        scores[f"probe/{name}/average_precision"] = Score(probe.mean_average_precision)
        scores[f"probe/{name}/balanced_accuracy"] = Score(probe.mean_balanced_accuracy)
    figures = {tag: score._asdict() for tag, score in scores.items()}
    return figures, pictures.grid(np.concatenate(rows), columns=len(rows[0]))


def distances(
    name: str,
    images: np.ndarray,
    scorers: Sequence[Extractor],
    real_features: Mapping[str, Any],
    seed: int,
) -> dict[str, Score]:
    """Fréchet distance and the like of a set of images (n, H, W, C) to the real ones, by tag."""
    batches = batches_of(images, np.arange(len(images)))
    features = fidelity.extract(scorers, batches, len(images), name)
    return {
        fidelity.tag(name, metric, scorer.name): score
        for scorer in scorers
        for metric, score in fidelity.scores(
            features[scorer.name], real_features[scorer.name], seed
        ).items()
    }


# The table.


ESTIMATED_WITH = ("likelihood_images", "likelihood_samples")
ESTIMATED = (*ESTIMATED_WITH, "negative_elbo", "bound", "bits_per_dim", "inference_gap")


def with_seeds(rows: Mapping[str, Figures]) -> dict[str, Figures]:
    """The rows, and after runs whose names differ in `-seed<number>` alone a row of their means,
    whose spread is the standard deviation over the seeds; of figures that all of them have, and of
    likelihoods if they were estimated alike."""
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(re.sub(r"-seed\d+", "", name), []).append(name)
    table: dict[str, Figures] = {}
    for group, names in groups.items():
        table |= {name: rows[name] for name in names}
        if len(names) > 1:
            values = {
                tag: [rows[name][tag]["value"] for name in names]
                for tag in rows[names[0]]
                if all(tag in rows[name] for name in names)
            }
            if any(len(set(values.get(tag, ()))) > 1 for tag in ESTIMATED_WITH):
                values = {tag: found for tag, found in values.items() if tag not in ESTIMATED}
            table[f"{group}, {len(names)} seeds"] = {
                tag: _over_seeds(found) for tag, found in values.items()
            }
    return table


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return Score(statistics.mean(values), spread=statistics.stdev(values))._asdict()


NOTES = {
    "sets": "Samples are from the model's own prior, N(0, I) or p(z|y) with y of the real images "
    "(a VQ-VAE's: its priors over codes); gaussian and mixture from a density fitted to posterior "
    "means of training images, y independent of z; interpolations are half-way on the line between "
    "the means of two images (a VQ-VAE's: between latents before they are quantized). All are the "
    "decoder's means, rounded to 8 bits.",
    "distances": "A set as good as real images would score as the floor does, reconstructions may "
    "be below it. [ ] is a 95 % bootstrap interval of "
    "one run, ± the spread over subsets of one run (KID) or the standard deviation over seeds.",
    "likelihood": "Nats are per image. The bound is on -log p(x), or on -log p(x|y) of a "
    "conditional VAE: importance-weighted for a VAE; for a VQ-VAE -log p(x|z_q) - log p(codes), "
    "with a discretized logistic of one scale fitted to training images. Where its priors know the "
    "class or attributes y, the bound is that with y hidden from them, on -log p(x), and beside it "
    "stands the bound on -log p(x|y), y the image's own. Nats of a density and of a mass are not "
    "comparable, bits/dim are. The code length is that of the codes alone, y hidden, without the "
    "pixels: no bits/dim. Priors are those of their best validation, so that on split valid they "
    "look a little better than they are. [ ] is a 95 % interval of the mean over images. "
    "The bound of a VAE is over so many images, by so many samples each; one of binarized pixels "
    "has no MSE and no bits/dim here, since these are of other images.",
    "latent": "I_q is at most ln N, its ceiling. The probe is linear, mean over attributes (or "
    "classes): of the posterior mean, or of a level's quantized vectors, level 0 the coarsest.",
    "cost": "Parameters are those of encoder and decoder, without a VQ-VAE's priors and the codes "
    "that a moving average places. Sampling is from the prior to the decoder's mean, where this "
    "table was made; training as the run's own metrics say, median, on whatever machine that was.",
}
COLUMNS = {  # table -> tag -> title
    "likelihood": {
        "negative_elbo": "-ELBO, nats",
        "bound": "bound, nats",
        "bound_given_y": "VQ-VAE given y, nats",
        "likelihood_images": "images",
        "likelihood_samples": "samples",
        "inference_gap": "inference gap",
        "bits_per_dim": "bound, bits/dim",
        "code_length_nats": "code length, nats",
        "code_length_bits_per_dimension": "code length, bits per dimension",
    },
    "latent": {
        "mse": "MSE",
        "kl": "KL",
        "active_units": "active units",
        "information": "I_q",
        "information_ceiling": "ceiling",
        "marginal_kl": "KL(q(z) to p(z))",
        "barber_agakov": "Barber-Agakov",
    },
    "cost": {
        "parameters": "parameters",
        "sampling_images_per_sec": "sampling images/s",
        "training_images_per_sec": "training images/s",
    },
}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, from the JSON alone."""
    protocol, rows = report["protocol"], report["rows"]
    lines = [
        "# Comparison", "",
        f"{protocol['num_images']:,} images in every set, against as many of the "
        f"{protocol['split']} split. {NOTES['sets']} {NOTES['distances']}", "",
    ]  # fmt: skip
    for features, about in protocol["features"].items():
        lines += [f"## Features: {features} ({about['sha256'][:8]})", ""]
        for metric in ("frechet", "kid"):
            lines += [*_distance_table(report, metric, features), ""]
    probes = {
        tag: f"probe {tag.split('/')[1]}, {tag.split('/')[2].replace('_', ' ')}"
        for tag in sorted({tag for figures in rows.values() for tag in figures})
        if tag.startswith("probe/")
    }
    for name, titles in COLUMNS.items():
        titles = titles | (probes if name == "latent" else {})
        lines += [f"## {name.capitalize()}", "", NOTES[name], "", *_table("run", titles, rows), ""]
    lines += ["## Images", "", f"Rows: real images, then, where there are any, {', '.join(SETS)}."]
    for name, path in report["pictures"].items():
        lines += ["", f"![{name}]({path})"]
    lines += ["", "## Protocol", "", "| key | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in protocol.items()]
    return "\n".join(lines) + "\n"


def _distance_table(report: Mapping[str, Any], metric: str, features: str) -> list[str]:
    """Floor, ceiling and runs down, the sets of images across."""
    title = {"frechet": "Fréchet", "kid": "KID"}[metric]
    if (metric, features) == ("frechet", "inception"):
        title = "FID"
    table = {}
    for name in ("floor", "blurred"):  # the same whatever they are compared with
        figure = report["references"][fidelity.tag(name, metric, features)]
        table[REFERENCES[name]] = dict.fromkeys(SETS, figure)
    tags = {images: fidelity.tag(images, metric, features) for images in SETS}
    for name, figures in report["rows"].items():
        table[name] = {images: figures.get(tag) for images, tag in tags.items()}
    titles = {images: images for images in SETS} | {"mixture": f"mixture of {COMPONENTS}"}
    return _table(title, titles, table)


def _table(first: str, titles: Mapping[str, str], rows: Mapping[str, Mapping]) -> list[str]:
    """Rows down, the figures whose tags are in `titles` across."""
    lines = [f"| {first} | {' | '.join(titles.values())} |", "|---" * (len(titles) + 1) + "|"]
    for name, figures in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(figures.get(tag)) for tag in titles)} |")
    return lines


def _cell(figure: Mapping[str, Any] | None) -> str:
    """The value with its interval or spread; a dash for none."""
    if figure is None:
        return "-"
    if figure["interval"] is not None:
        low, high = figure["interval"]
        return f"{_number(figure['value'])} [{_number(low)}, {_number(high)}]"
    spread = "" if figure["spread"] is None else f" ± {_number(figure['spread'])}"
    return _number(figure["value"]) + spread


def _number(value: float) -> str:
    """Four digits; all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
