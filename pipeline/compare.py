"""Puts trained models side by side: comparison.html, .md and .json, and a picture of each run.

    python pipeline/compare.py --data runs/celeba64/shards --judge runs/celeba64/classifier-judge \\
        --runs '[runs/celeba64/ae, runs/celeba64/vae, runs/celeba64/vqvae]' \\
        --out runs/celeba64/comparison
    python pipeline/compare.py ... --runs+=runs/celeba64/{ae,vae,vqvae}      the same, from bash
    python pipeline/compare.py ... --num_images 500 --train_images 2000      a quick look

Runs are those of train_vae.py and train_vqvae.py on the same images. Several seeds of a model,
vae-seed0, vae-seed1 ..., are rows of their own and one row of means. What other stages know of a
run is read where they leave it: <run>/report (report_vae.py), and beside a VQ-VAE its prior-level0,
prior-level1 ... and samples; where that is missing there is a dash, and a line says what makes it.
All else is measured here, and kept in <out>/<run>.json: a second call measures only what is new.
One process, on the GPU where there is one.
"""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from pipeline import stage
from pipeline.data.images import open_images
from pipeline.evaluation import comparison, extractors, fidelity, html, latent_pictures, pictures
from pipeline.evaluation.comparison import Data, Figures
from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.judge import half_of
from pipeline.evaluation.report import write_text
from pipeline.evaluation.sets import SampleFiles, batches_of, blurred, choose
from pipeline.evaluation.vae_figures import Split
from pipeline.training.checkpoint import final_directory, load_model, model_sha256, read_about

VERSION = 2  # of the figures, to be raised with every change that alters one
OWN_FILES = ("comparison", "references", "scatter", "status")  # in --out, so no names of runs
FROM_REPORT = {  # figure of report_vae.py -> of the table
    "mse": "mse",
    "negative_elbo": "negative_elbo",
    "nll_importance": "bound",
    "bits_per_dim": "bits_per_dim",
    "inference_gap": "inference_gap",
    "kl": "kl",
    "marginal_kl": "marginal_kl",
    "barber_agakov": "barber_agakov",
    "information": "information",
    "information_ceiling": "information_ceiling",
    "active_units": "active_units",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Config of the stage."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    runs: list[Path]
    """Run directories of train_vae.py and train_vqvae.py, in the order of the rows."""
    out: Path
    """Where comparison.html, .md and .json, and a figures file and a picture per run go."""
    judge: Path | None = None
    """Run directory of train_classifier.py; None = Inception features only."""
    inception_weights: Path | None = None
    """File with Inception weights; None = the published file, if torch.hub has it already."""
    extractor_sha256: str | None = None
    """SHA-256 of an Inception file other than the published one; its figures are not an FID."""
    split: Literal["valid", "test"] = "valid"
    """Real images to compare with."""
    num_images: int | None = None
    """Images in every set; None = as many as there are real ones."""
    train_images: int = 10_000
    """At most so many training images, for the densities of the latents and the probes. Fewer where
    memory is short: the probe of a level holds code_dim values of every code of every image."""
    seed: int = 0
    """Seed of the choice of images, the samples, the subsets of KID and the bootstrap."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs needs at least one run directory")
        for name in ("num_images", "train_images"):
            count = getattr(self, name)
            if count is not None and count < fidelity.MIN_IMAGES:
                raise ValueError(f"{name} must be at least {fidelity.MIN_IMAGES}, got {count}")


def named(paths: list[Path]) -> dict[str, Path]:
    """Run directories by the names of their rows: the directory's, with its parent's before it
    where that alone is not unique."""
    runs = [final_directory(path).resolve().parent for path in paths]
    short = [run.name for run in runs] + list(OWN_FILES)
    names = [
        run.name if short.count(run.name) == 1 else f"{run.parent.name}-{run.name}" for run in runs
    ]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise stage.UserError(f"--runs has {repeated[0]} twice; name every run once")
    return dict(zip(names, runs, strict=True))


def kept(path: Path, key: dict[str, Any], measure: Callable[[], Figures]) -> Figures:
    """The figures in `path` if they were measured under this key; else measures and keeps them."""
    if path.is_file():
        document = json.loads(path.read_text())
        if document.get("key") == key:
            return document["figures"]
    figures = measure()
    stage.write_json(path, {"key": key, "figures": figures, **stage.provenance()})
    return figures


def figure(value: float, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    return Score(value, interval)._asdict()


def from_metrics(run: Path) -> Figures:
    """The speed of the training."""
    path, tag = run / "metrics.jsonl", "throughput/images_per_sec"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    speeds = [line[tag] for line in lines if tag in line]
    return {"training_images_per_sec": figure(statistics.median(speeds))} if speeds else {}


def from_report(name: str, run: Path, sha256: str, config: Compare) -> Figures:
    """What report_vae.py knows of a run."""
    path, protocol = run / "report" / "report.json", {}
    if path.is_file():
        report = json.loads(path.read_text())
        protocol = report["protocol"]
    made_of = (protocol.get("checkpoint", {}).get("sha256"), protocol.get("split"))
    if made_of != (sha256, config.split):  # the checkpoint knows its data
        print(
            f"{name}: no likelihood and information of this checkpoint: python "
            f"pipeline/report_vae.py --data {config.data} --checkpoint {run} --out {path.parent} "
            f"--split {config.split}"
        )
        return {}
    figures = {}
    for theirs, ours in FROM_REPORT.items():
        if found := report["figures"].get(theirs):
            value, error = found["value"], found["standard_error"]
            interval = None if error is None else (value - 1.96 * error, value + 1.96 * error)
            figures[ours] = figure(value, interval)
    if "bound" in figures:  # of how many images, by how many samples of each
        figures["likelihood_images"] = figure(report["figures"]["nll_importance"]["count"])
        figures["likelihood_samples"] = figure(protocol["likelihood"]["num_samples"])
    if protocol["binarized"]:  # of other pixels than the other runs' figures
        for name in ("mse", "bits_per_dim"):
            figures.pop(name, None)
    return figures


def find_priors(name: str, run: Path, sha256: str, num_levels: int) -> list[Path]:
    """The priors beside a VQ-VAE, coarse to fine; none unless each level has one of its codes."""
    paths = [run.parent / f"prior-level{level}" for level in range(num_levels)]
    try:
        for level, path in enumerate(paths):
            about = read_about(path)
            if about["codes"]["checkpoint_sha256"] != sha256 or about["level"] != level:
                raise stage.UserError(f"{path} is of other codes; train it on this checkpoint's")
    except stage.UserError as error:
        print(f"{name}: no code length: {error}")
        return []
    return paths


def find_samples(
    name: str, run: Path, sha256: str, size: int, channels: int, count: int
) -> SampleFiles | None:
    """The images beside a VQ-VAE, if they are its own, of all kinds and enough."""
    path = run.parent / "samples"
    try:
        found = SampleFiles(path, size, channels)
        if found.protocol.get("vqvae_sha256") != sha256:
            raise stage.UserError(f"{path} was not decoded by {run}")
        if found.protocol.get("attributes") or found.protocol.get("label"):
            raise stage.UserError(f"{path} was asked for attributes or a class")
        if found.protocol.get("codes") or found.protocol.get("selector"):
            raise stage.UserError(f"{path} was drawn around given codes, or chosen by a classifier")
        if len(found) < count:
            raise stage.UserError(f"{path} has {len(found)} images, fewer than {count}")
    except stage.UserError as error:
        print(
            f"{name}: no samples: {error}; python pipeline/sample_prior.py --checkpoint {run} "
            f"--out {path} --num_images {count} makes them"
        )
        return None
    return found


def measure(
    run: Path,
    priors: list[Path],
    samples: SampleFiles | None,
    data: Data,
    scorers: list[extractors.Extractor],
    real_features: Callable[[], dict[str, Any]],
    picture: Path,
) -> Figures:
    """All that takes the model itself; writes its picture."""
    model, about = load_model(run).to(data.device), read_about(run)
    if about["kind"] == "vae":
        material = comparison.vae_material(model, about["config"]["binarize"], data)
    else:
        drawn = None
        if samples:
            picked = choose(len(data.chosen), np.arange(len(samples)), data.seed)
            drawn = batches_of(samples, picked)
        material = comparison.vqvae_material(model, drawn, data)
    loaded = [load_model(path, "prior").to(data.device) for path in priors]
    figures, grid = comparison.measure(model, material, data, scorers, real_features(), loaded)
    pictures.save_png(grid, picture)
    return figures


def in_plane(about: dict[str, Any]) -> bool:
    """True for a VAE or AE whose latent can be drawn on paper."""
    model = about["model"]
    flat = about["kind"] == "vae" and model["latent_dim"] == 2 and not model["top_dim"]
    return flat and model["posterior"] != "bernoulli"


def plane(name: str, run: Path, data: Data) -> latent_pictures.Posteriors:
    """The posteriors of the first real images, to be drawn beside those of other runs."""
    model = load_model(run, "vae").to(data.device)
    split = Split(model, data.real, read_about(run)["config"]["binarize"], data.device)
    many = slice(0, min(500, len(data.real)))
    return latent_pictures.plane_posteriors(name, model, *split.batch(many), data.real.labels[many])


def main(config: Compare) -> None:
    if not stage.is_rank_zero():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = named(config.runs)
    abouts = {name: read_about(run) for name, run in runs.items()}
    for name, about in abouts.items():
        if about["kind"] not in ("vae", "vqvae"):
            raise stage.UserError(f"{runs[name]} holds a {about['kind']}, expected vae or vqvae")
    sizes = {about["config"]["image_size"] for about in abouts.values()}
    if len(sizes) > 1:
        raise stage.UserError(f"the runs have images of {sorted(sizes)} pixels; give those of one")
    size = sizes.pop()
    scorers, _ = extractors.find_extractors(
        config.judge, config.inception_weights, config.extractor_sha256, device
    )
    if not scorers:
        raise stage.UserError("no features to score on: give --judge PATH or --inception_weights")

    # Images: all sets have the same number, the floor those that the judge has not seen.
    real, train = (open_images(config.data, split, size) for split in (config.split, "train"))
    for run in runs.values():
        extractors.check_recipe(real.recipe.hash, size, config.data, run, config.judge)
    half = read_about(config.judge)["half"] if config.judge else None
    unseen = np.flatnonzero(half_of(train.keys) != half)
    available = {config.split: len(real), "train (floor)": len(unseen)}
    count = config.num_images or min(available.values())
    if not fidelity.MIN_IMAGES <= count <= min(available.values()):
        raise stage.UserError(f"--num_images {count} does not fit: there are {available} images")
    chosen = choose(count, np.arange(len(real)), config.seed)
    data = Data(train, min(config.train_images, len(train)), real, chosen, config.seed, device)
    blur_sigma = size / 32
    protocol = {
        "version": VERSION,
        "data_index_sha256": real.index.sha256,
        "recipe": real.recipe.hash,
        "split": config.split,
        "num_images": count,
        "train_images": data.num_train,
        "seed": config.seed,
        "features": {scorer.name: {"sha256": scorer.sha256} for scorer in scorers},
        "mixture_components": comparison.COMPONENTS,
        "blur_sigma": blur_sigma,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }

    @functools.cache
    def real_features() -> dict[str, Any]:
        return fidelity.extract(scorers, batches_of(real, chosen), count, "real")

    def measure_references() -> Figures:
        floor = train[choose(count, unseen, config.seed)]
        blurry = np.concatenate(list(blurred(batches_of(real, chosen), blur_sigma)))
        scores = {}
        for name, images in (("floor", floor), ("blurred", blurry)):
            scores |= comparison.distances(name, images, scorers, real_features(), config.seed)
        return {tag: score._asdict() for tag, score in scores.items()}

    references = kept(config.out / "references.json", protocol, measure_references)

    rows = {}
    for name, run in runs.items():
        about, sha256, priors, samples = abouts[name], model_sha256(run), [], None
        if about["kind"] == "vqvae":
            priors = find_priors(name, run, sha256, len(about["model"]["ratios"]))
            samples = find_samples(name, run, sha256, size, real.recipe.channels, count)
        key = {**protocol, "checkpoint": sha256, "priors": [], "samples": None}
        if priors:
            key["priors"] = [model_sha256(path) for path in priors]
        if samples:
            key["samples"] = samples.protocol
        measured = functools.partial(
            measure, run, priors, samples, data, scorers, real_features, config.out / f"{name}.png"
        )
        rows[name] = kept(config.out / f"{name}.json", key, measured) | from_metrics(run)
        if about["kind"] == "vae":
            rows[name] |= from_report(name, run, sha256, config)
        elif samples and "images_per_sec" in samples.note:
            rows[name]["sampling_images_per_sec"] = figure(samples.note["images_per_sec"])

    drawn = {name: f"{name}.png" for name in runs}
    planes = [plane(name, runs[name], data) for name, about in abouts.items() if in_plane(about)]
    if planes:
        pictures.save_png(latent_pictures.posterior_scatter(planes), config.out / "scatter.png")
        drawn["scatter"] = "scatter.png"

    report = {
        "protocol": {**protocol, "data": str(config.data), **stage.provenance()},
        "runs": {
            name: {"path": str(path), "kind": abouts[name]["kind"], "sha256": model_sha256(path),
                   "images_seen": abouts[name]["images_seen"]}
            for name, path in zip(runs, config.runs, strict=True)
        },
        "references": references,
        "rows": comparison.with_seeds(rows),
        "pictures": drawn,
    }  # fmt: skip
    stage.write_json(config.out / "comparison.json", report)
    write_text(config.out / "comparison.md", comparison.markdown(report))
    html.write_comparison_page(config.out)
    print(f"{config.out / 'comparison.html'}: {len(runs)} runs, {count:,} images per set")


if __name__ == "__main__":
    stage.run(Compare, main, __doc__)
