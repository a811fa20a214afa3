"""Reports what each level of a VQ-VAE carries: levels.json, levels.md and levels.png.

    python pipeline/report_levels.py --data runs/demo/shards --checkpoint runs/demo/vqvae \\
        --judge runs/demo/classifier-judge --out runs/demo/levels
    python pipeline/report_levels.py --config configs/celeba64/report_levels.yaml \\
        --data runs/celeba64/shards --checkpoint runs/celeba64/vqvae --out runs/celeba64/levels
    python pipeline/report_levels.py ... --num_images 500 --prior.total_images 4000    a quick look

Of each level: MSE and Fréchet distance of reconstructions with its codes taken from another image,
or replaced by the mean quantized vector per position; and the nats of its codes by a small prior,
with and without the coarser levels. One process, on the GPU where there is one. Without a judge
and Inception weights there is no Fréchet distance.
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
from pipeline.evaluation import extractors, fidelity, levels, pictures
from pipeline.evaluation.sets import batches_of, choose
from pipeline.training.checkpoint import load_model, model_sha256, read_about
from pipeline.training.tracking import Tracker

COLUMNS = 8  # images in the picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportLevels:
    """Config of the stage."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    checkpoint: Path
    """Run directory of train_vqvae.py, or its final/."""
    out: Path
    """Where levels.json, levels.md, levels.png, metrics.jsonl and tensorboard/ go."""
    judge: Path | None = None
    """Run directory of train_classifier.py, for Fréchet distances on its features."""
    inception_weights: Path | None = None
    """File with Inception weights; None = the published file, if torch.hub has it already."""
    extractor_sha256: str | None = None
    """SHA-256 of an Inception file other than the published one; its figures are not an FID."""
    split: Literal["valid", "test"] = "valid"
    """Images that are scored, and codes that the priors are validated on."""
    num_images: int | None = None
    """Images of that split; None = all."""
    train_images: int | None = 8_000
    """At most so many training images, for the means and the priors; None = all."""
    prior: levels.SmallPriors = levels.SmallPriors()
    seed: int = 0
    """Seed of the choice of images, the shuffling, the bootstrap and the priors."""

    def __post_init__(self) -> None:
        for name in ("num_images", "train_images"):
            count = getattr(self, name)
            if count is not None and count < fidelity.MIN_IMAGES:
                raise ValueError(f"{name} must be at least {fidelity.MIN_IMAGES}, got {count}")


def main(config: ReportLevels) -> int:
    if not stage.is_rank_zero():
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = read_about(config.checkpoint)
    model = load_model(config.checkpoint, "vqvae").to(device)
    scorers, _ = extractors.find_extractors(
        config.judge, config.inception_weights, config.extractor_sha256, device
    )
    if not scorers:
        print("MSE only: for Fréchet distances give --judge PATH or --inception_weights PATH")

    # Data: images to score, and training images for everything that is learned from images.
    size = about["config"]["image_size"]
    real, train = (open_images(config.data, split, size) for split in (config.split, "train"))
    extractors.check_recipe(real.recipe.hash, size, config.data, config.checkpoint, config.judge)
    count = config.num_images or len(real)
    train_count = min(config.train_images or len(train), len(train))
    if not fidelity.MIN_IMAGES <= count <= len(real) or train_count < fidelity.MIN_IMAGES:
        raise stage.UserError(
            f"--num_images {count} does not fit: {config.data} has {len(real)} images in "
            f"{config.split} and {len(train)} in train, at least {fidelity.MIN_IMAGES} are needed"
        )
    chosen = choose(count, np.arange(len(real)), config.seed)
    learned = choose(train_count, np.arange(len(train)), config.seed)

    # Codes, once for everything below.
    codes = levels.encode(model, real, chosen, device, f"{config.split} codes")
    train_codes = levels.encode(model, train, learned, device, "train codes")

    # Images without a level.
    means = levels.mean_quantized(model, train_codes, device)
    sources = levels.partners(count, config.seed)
    originals = fidelity.extract(scorers, batches_of(real, chosen), count, "real")
    ablations, shown = [], [real[chosen[:COLUMNS]]]
    for name, row in levels.treatments(len(codes)).items():
        ablated = levels.Ablated(model, real, chosen, codes, sources, means, row, device)
        features = fidelity.extract(scorers, ablated, count, name)
        distances = {
            scorer: fidelity.frechet(features[scorer], originals[scorer], config.seed)
            for scorer in features
        }
        ablations.append({
            "row": name, "treatments": list(row), "mse": ablated.mse(),
            "frechet": {scorer: {"value": score.value, "interval": score.interval}
                        for scorer, score in distances.items()},
        })  # fmt: skip
        shown.append(pictures.to_uint8(ablated.decode(np.arange(COLUMNS))))

    # The length of the codes.
    code_lengths = levels.code_lengths(
        config.prior, model.config.codebook_sizes, train_codes, codes, config.seed, device
    )

    # The report.
    prior = stage.to_dict(config.prior)
    for name in ("codebook_size", "coarser_codebook_sizes", "num_classes", "num_attributes"):
        del prior["model"][name]  # facts of the codes, which differ between the priors
    protocol = {
        "data": str(config.data),
        "data_index_sha256": real.index.sha256,
        "source": real.index.source,
        "split": config.split,
        "image_size": size,
        "recipe": real.recipe.hash,
        "num_images": count,
        "train_images": train_count,
        "seed": config.seed,
        "checkpoint": {
            "path": str(config.checkpoint),
            "sha256": model_sha256(config.checkpoint),
            "images_seen": about["images_seen"],
        },
        "features": {scorer.name: {"sha256": scorer.sha256} for scorer in scorers},
        "shuffling": "one cycle through all images in random order, the same for every level",
        "mean": "quantized vectors at each position, mean over the training images",
        "pixels": "MSE in [0, 1] per image, clamped, before rounding to uint8; features of uint8",
        "prior": prior,
        "nats": "validation of the averaged weights, the best of the training and the last",
        **stage.provenance(),
    }
    report = {
        "protocol": protocol,
        "ablations": ablations,
        "code_lengths": code_lengths,
        "picture": "levels.png",
    }
    stage.write_json(config.out / "levels.json", report)
    temporary = config.out / ".levels.md"
    temporary.write_text(levels.markdown(report))
    temporary.replace(config.out / "levels.md")
    grid = pictures.grid(np.concatenate(shown), columns=COLUMNS)
    pictures.save_png(grid, config.out / report["picture"], scale=2)
    tracker = Tracker(config.out, "levels", about["images_seen"], about["images_seen"], anew=True)
    tracker.log(about["images_seen"], levels.tags(report))
    tracker.image(about["images_seen"], "evaluation/levels", grid)
    tracker.close()
    print(f"{config.out / 'levels.md'}: {len(codes)} levels, {count:,} images")
    return about["images_seen"]


if __name__ == "__main__":
    stage.run(ReportLevels, main, __doc__)
