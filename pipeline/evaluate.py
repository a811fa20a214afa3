"""Scores samples and reconstructions against real images, and writes report.json and report.md.

    python pipeline/evaluate.py --data runs/demo/shards --checkpoint runs/demo/vqvae \\
        --samples runs/demo/samples --judge runs/demo/classifier-judge --out runs/demo/evaluation
    python pipeline/evaluate.py ... --inception_weights weights-inception-2015-12-05-6726825d.pth
    python pipeline/evaluate.py ... --num_images 500          a quick look

One process, on the GPU where there is one. FID needs the published Inception weights; without them
the distances are on the judge's features, and named so. Figures of different judges, counts or
recipes are not comparable: each carries its protocol.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from pipeline import stage
from pipeline.data.images import open_images
from pipeline.evaluation import extractors, fidelity, pictures
from pipeline.evaluation.judge import half_of
from pipeline.evaluation.report import write_report
from pipeline.evaluation.sets import Reconstructions, SampleFiles, batches_of, blurred, choose
from pipeline.training.checkpoint import load_model, model_sha256, read_about
from pipeline.training.tracking import Tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Config of the stage."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    checkpoint: Path
    """Run directory of train_vqvae.py, whose reconstructions are scored."""
    out: Path
    """Where report.json, report.md, the pictures, metrics.jsonl and tensorboard/ go."""
    samples: Path | None = None
    """Directory with images/*.png and samples.json; None = no samples to score."""
    judge: Path | None = None
    """Run directory of train_classifier.py; None = Inception features only."""
    inception_weights: Path | None = None
    """File with Inception weights; None = the published file, if torch.hub has it already."""
    extractor_sha256: str | None = None
    """SHA-256 of an Inception file other than the published one; its figures are not an FID."""
    split: Literal["valid", "test"] = "valid"
    """Real images to compare with."""
    num_images: int | None = None
    """Images in every set; None = as many as there are in all of them."""
    seed: int = 0
    """Seed of the choice of images, the subsets of KID and the bootstrap."""

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < fidelity.MIN_IMAGES:
            raise ValueError(
                f"num_images must be at least {fidelity.MIN_IMAGES}, got {self.num_images}"
            )


def describe(path: Path) -> dict:
    """What a report says of a trained model."""
    about = read_about(path)
    keys = ("images_seen", "validation", "half", "recipe")
    chosen = {key: about[key] for key in keys if key in about}
    return {"path": str(path), "sha256": model_sha256(path), **chosen}


def main(config: Evaluate) -> int:
    if not stage.is_rank_zero():
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = read_about(config.checkpoint)
    size = about["config"]["image_size"]
    model = load_model(config.checkpoint, "vqvae").to(device)
    scorers = extractors.find_extractors(
        config.judge, config.inception_weights, config.extractor_sha256, device
    )
    if not any(scorer.name != "judge" for scorer in scorers):
        way_out = f"for FID give --inception_weights PATH ({extractors.PUBLISHED_FILE})"
        if not scorers:
            raise stage.UserError(f"no features to score on: {way_out}, or --judge for the judge's")
        print(f"no Inception weights, scoring on the judge's features alone; {way_out}")

    # Sets of images, all with the same number. The floor is on training images that the judge has
    # not seen, because it would know the others too well.
    real, train = (open_images(config.data, split, size) for split in (config.split, "train"))
    extractors.check_recipe(real.recipe.hash, size, config.data, config.checkpoint, config.judge)
    half = read_about(config.judge)["half"] if config.judge else None
    unseen = np.flatnonzero(half_of(train.keys) != half)
    available = {config.split: len(real), "train (floor)": len(unseen)}
    samples = None
    if config.samples:
        samples = SampleFiles(config.samples, size, real.recipe.channels)
        available["samples"] = len(samples)
        if samples.protocol.get("vqvae_sha256") != model_sha256(config.checkpoint):
            raise stage.UserError(
                f"{config.samples} was not decoded by {config.checkpoint}; give the checkpoint "
                "that made the samples"
            )
    count = config.num_images or min(available.values())
    if count > min(available.values()) or count < fidelity.MIN_IMAGES:
        raise stage.UserError(f"--num_images {count} does not fit: there are {available} images")
    chosen = choose(count, np.arange(len(real)), config.seed)
    reconstructions = Reconstructions(model, real, chosen, device)
    blur_sigma = size / 32
    sets = {
        "real": batches_of(real, chosen),
        "floor": batches_of(train, choose(count, unseen, config.seed)),
        "reconstructions": reconstructions,
        "blurred": blurred(batches_of(real, chosen), blur_sigma),
    }
    if samples:
        picked = choose(count, np.arange(len(samples)), config.seed)
        sets["samples"] = batches_of(samples, picked)

    # Features once per set, then the distances to the real images.
    features = {name: fidelity.extract(scorers, batches, count, name)
                for name, batches in sets.items()}  # fmt: skip
    figures = []

    def add(images: str, metric: str, tag: str, score: fidelity.Score, scorer=None) -> None:
        figures.append({
            "tag": tag, "images": images, "metric": metric, **score._asdict(),
            "features": scorer and scorer.name, "features_sha256": scorer and scorer.sha256,
            "num_images": count, "num_reference": count,
        })  # fmt: skip

    for scorer in scorers:
        for images in [name for name in sets if name != "real"]:
            found = fidelity.scores(
                features[images][scorer.name], features["real"][scorer.name], config.seed
            )
            for metric, score in found.items():
                add(images, metric, fidelity.tag(images, metric, scorer.name), score, scorer)
    for metric, value in reconstructions.figures().items():
        tag = f"evaluation/reconstructions/{metric}"
        add("reconstructions", metric, tag, fidelity.Score(value))

    # The report.
    config.out.mkdir(parents=True, exist_ok=True)
    grids = {"reconstructions": reconstructions.grid()}
    if samples:
        grids["samples"] = pictures.grid(samples[picked[:64]], columns=8)
    tracker = Tracker(config.out, "evaluate", about["images_seen"], about["images_seen"])
    tracker.log(about["images_seen"], {figure["tag"]: figure["value"] for figure in figures})
    for title, grid in grids.items():
        tracker.image(about["images_seen"], f"evaluation/{title}", grid)
        pictures.save_png(grid, config.out / f"{title}.png")
    tracker.close()
    protocol = {
        "data": str(config.data),
        "data_index_sha256": real.index.sha256,
        "source": real.index.source,
        "split": config.split,
        "image_size": size,
        "recipe": real.recipe.hash,
        "file_format": "uint8 as in PNG files, lossless, all sets alike",
        "num_images": count,
        "seed": config.seed,
        "checkpoint": describe(config.checkpoint),
        "samples": samples.protocol if samples else None,
        "features": {scorer.name: {"sha256": scorer.sha256} for scorer in scorers},
        "kid_subsets": fidelity.KID_SUBSETS,
        "kid_subset_size": fidelity.kid_subset_size(count),
        "neighbourhood": fidelity.NEIGHBOURHOOD,
        "bootstrap_resamples": fidelity.RESAMPLES,
        "blur_sigma": blur_sigma,
        "pixels": "MSE in [0, 1] and PSNR per image, clamped, before rounding to uint8",
        "sets": {
            "reference": f"{config.split} split, drawn by the keyed permutation",
            "floor": "training split, without the half the judge was trained on",
            "reconstructions": "of the reference images themselves, so they may be below the floor",
            "blurred": "the reference images themselves",
        },
        **stage.provenance(),
    }
    if config.judge:
        protocol["features"]["judge"] |= describe(config.judge)
    write_report(config.out, protocol, figures, {title: f"{title}.png" for title in grids})
    print(f"{config.out / 'report.md'}: {count:,} images per set")
    return about["images_seen"]


if __name__ == "__main__":
    stage.run(Evaluate, main, __doc__)
