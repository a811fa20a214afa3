"""Reports what a VAE has learned: report.html, report.md, report.json, pictures.

    python pipeline/report_vae.py --data runs/celeba64/shards \\
        --checkpoint runs/celeba64/vae --out runs/celeba64/vae/report
    python pipeline/report_vae.py ... --likelihood.num_samples 500                a quick look

Likelihood by importance sampling with the encoder and by prior Monte Carlo, the information in the
latent, active units, probes of attributes and true factors; reconstructions, samples (the decoder's
mean and a draw), interpolations, traversals, attribute vectors. One process, on the GPU where there
is one. compare.py puts several such reports into one table.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from pipeline import stage
from pipeline.data.faces import SOMETIMES_HIDDEN
from pipeline.data.images import open_images
from pipeline.evaluation import html, latent_pictures, latents, pictures, vae_figures
from pipeline.evaluation.report import write_text
from pipeline.evaluation.vae_figures import Figures, LikelihoodSettings, Split
from pipeline.training.checkpoint import load_model, model_sha256, read_about
from pipeline.training.tracking import Tracker

MEANINGS = {
    "reconstruction": "-E log p(x|z), one z per image",
    "mse": "squared error of the mean reconstruction, pixels in [0, 1]",
    "psnr": "its PSNR in dB, mean over images",
    "negative_elbo": "-ELBO, the mean log weight of the samples below",
    "nll_importance": "-log p(x), importance sampling with the encoder: in the mean an upper bound",
    "nll_prior": "-log p(x), prior Monte Carlo: in the mean an upper bound, far above for large D",
    "nll_exact": "-log p(x) by enumeration of all bits",
    "inference_gap": "-ELBO minus -log p(x) by importance sampling",
    "effective_sample_size": "of the importance weights, at most the samples of an image, median "
    "over images; near 1 a single sample decides, and -log p(x) may be far below nll_importance",
    "elbo_bits_per_dim": "-ELBO in bits per dimension",
    "bits_per_dim": "-log P(x) by importance sampling in bits per dimension",
    "kl": "KL(q(z|x) || p(z)); with a condition p(z) is the mean of p(z|y), so not the ELBO's KL",
    "information": "I_q = KL - KL(q(z) || p(z)): what z knows of which image it came from",
    "information_ceiling": "ln N, the most that I_q can be with N images",
    "marginal_kl": "KL(q(z) || p(z)): how far all posteriors together are from the prior",
    "barber_agakov": "H(z) + E log q(z|x) under the model's own p(z) p(x|z): a lower bound on its "
    "information, another quantity than I_q",
    "active_units": "latent dimensions whose posterior mean has a variance above 0.01",
    "probe_average_precision": "linear probe of the latent: mean over attributes or classes",
    "probe_balanced_accuracy": "the same",
    "mig": "mutual information gap with the true factors, equal bins; of the drawn faces' factors "
    f"without {', '.join(SOMETIMES_HIDDEN)}, which some images do not show",
    "dci_disentanglement": "DCI with the same factors: disentanglement",
    "dci_completeness": "completeness",
    "dci_informativeness": "informativeness",
    "wasserstein_gaussian": "2-Wasserstein distance to N(0, I) of draws of q(z), as a Gaussian",
    "wasserstein_floor_gaussian": "the same for draws of N(0, I) itself",
    "wasserstein_sliced": "sliced 2-Wasserstein distance of draws of q(z) to N(0, I)",
    "wasserstein_floor_sliced": "the same for draws of N(0, I) itself",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportVAE:
    """Config of the stage."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    checkpoint: Path
    """Run directory of train_vae.py."""
    out: Path
    """Where report.json, report.md, the pictures, metrics.jsonl and tensorboard/ go; compare.py
    looks for them in report/ of the run directory."""
    split: Literal["valid", "test"] = "valid"
    """Images that are scored."""
    train_images: int = 10_000
    """At most so many training images, for probes, densities and attribute vectors."""
    likelihood: LikelihoodSettings = LikelihoodSettings()
    seed: int = 0
    """Seed of samples and pictures."""


def draw_pictures(
    config: ReportVAE, train: Split, valid: Split, train_count: int
) -> dict[str, np.ndarray]:
    """All pictures that the model allows, by name."""
    model, seed = valid.model, config.seed
    images, y = valid.batch(slice(0, min(16, len(valid.images))))
    drawn = {
        "reconstructions": latent_pictures.reconstructions(model, images, y),
        "samples": latent_pictures.samples(
            model, latent_pictures.prior_latents(model, y, seed), y, seed
        ),
        "interpolation": latent_pictures.interpolation(
            model, images[:6], images[-6:], y[:6], y[-6:]
        ),
        "traversal": latent_pictures.traversal(
            model, *valid.batch(slice(0, min(256, len(valid.images))))
        ),
    }
    learned = vae_figures.posterior_means(train, train_count)
    for name, components in (("gaussian", 1), ("mixture", 10)):
        try:
            density = latents.fit_mixture(learned, components, seed)
        except ValueError as error:
            print(f"no samples of a {name}: {error}; raise --train_images")
            continue
        z = torch.from_numpy(latents.sample_density(density, len(y), seed)).to(y)
        drawn[f"samples-{name}"] = latent_pictures.samples(model, z, y, seed)
    names = valid.images.index.attribute_names or valid.images.index.class_names
    targets = vae_figures.targets_of(train.images)[:train_count]
    if names:
        vectors = latents.attribute_vectors(learned, targets)
        # the most balanced ones: their vectors rest on many images of either kind
        order = np.argsort(np.abs(targets.mean(0)))
        order = [index for index in order if np.isfinite(vectors[index]).all()][:8]
        drawn["attributes"] = latent_pictures.attribute_rows(
            model, images[:6], y[:6], vectors[order], [names[index] for index in order]
        )
        if model.config.condition_dim:
            chosen = {names[index]: index for index in order}
            drawn["generation"] = latent_pictures.generation(model, y[:8], chosen, seed)
            drawn["manipulation"] = latent_pictures.manipulation(model, images[:8], y[:8], chosen)
    if model.config.has_plane:
        where = slice(0, min(500, len(valid.images)))
        many, labels = valid.batch(where), valid.images.labels[where]
        posteriors = latent_pictures.plane_posteriors(config.checkpoint.name, model, *many, labels)
        drawn["manifold"] = latent_pictures.manifold(model, *many)
        drawn["scatter"] = latent_pictures.posterior_scatter([posteriors])
    if (config.checkpoint / "metrics.jsonl").is_file():
        drawn["curves"] = latent_pictures.curves(config.checkpoint / "metrics.jsonl")
    return drawn


def markdown(report: dict) -> str:
    """The report as Markdown, from the JSON alone."""
    protocol = report["protocol"]
    lines = [
        f"# {protocol['checkpoint']['path']}", "",
        "Nats are per image, sums over pixels and latent dimensions; ± is one standard error.", "",
        "| figure | value | n | meaning |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, meaning in MEANINGS.items():
        if name in report["figures"]:
            found = report["figures"][name]
            error = found["standard_error"]
            value = f"{found['value']:.5g}" + ("" if error is None else f" ± {error:.2g}")
            meaning = meaning.replace("|", "\\|")  # of a table otherwise
            lines.append(f"| {name} | {value} | {found['count']:,} | {meaning} |")
    lines += [
        "",
        "With a nonlinear decoder the true posterior is not Gaussian, and a larger ELBO need not "
        "mean more information in z.",
    ]
    for title, path in report["pictures"].items():
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    lines += ["", "## Protocol", "", "```json", json.dumps(protocol, indent=2), "```"]
    return "\n".join(lines) + "\n"


def main(config: ReportVAE) -> int:
    if not stage.is_rank_zero():
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = read_about(config.checkpoint)
    model = load_model(config.checkpoint, "vae").to(device)
    trained_with = about["config"]
    sets = [
        open_images(config.data, split, trained_with["image_size"])
        for split in ("train", config.split)
    ]
    if about["recipe"] != sets[1].recipe.hash:
        raise stage.UserError(
            f"{config.checkpoint} was trained on recipe {about['recipe']}, {config.data} has "
            f"{sets[1].recipe.hash}; give the shards it was trained on"
        )
    train, valid = (Split(model, images, trained_with["binarize"], device) for images in sets)
    train_count = min(config.train_images, len(train.images))

    likelihood_of, per_image = None, {}
    figures: Figures = vae_figures.reconstruction_figures(valid, config.seed)
    if model.config.has_density:
        try:
            likelihood_of = vae_figures.density_kind(valid)
            found, per_image = vae_figures.likelihood_figures(valid, config.likelihood, config.seed)
            figures |= found
        except ValueError as error:
            print(f"no likelihood: {error}")
        figures |= vae_figures.information_figures(valid, config.seed)
        if (count := len(valid.images)) < 2_000:
            print(f"I_q rests on {count:,} images: it is at most {math.log(count):.2f} nats")
    figures |= vae_figures.latent_figures(train, valid, train_count, config.seed)
    drawn = draw_pictures(config, train, valid, train_count)

    protocol = {
        "data": str(config.data),
        "data_index_sha256": valid.images.index.sha256,
        "split": config.split,
        "recipe": valid.images.recipe.hash,
        "binarized": trained_with["binarize"],
        "train_images": train_count,
        "likelihood": stage.to_dict(config.likelihood),
        "likelihood_of": likelihood_of,
        "seed": config.seed,
        "checkpoint": {
            "path": str(config.checkpoint),
            "sha256": model_sha256(config.checkpoint),
            "images_seen": about["images_seen"],
            "model": about["model"],
            "objective": trained_with["objective"],
        },
        **stage.provenance(),
    }
    report = {
        "protocol": protocol,
        "figures": figures,
        "per_image": per_image,
        "pictures": {name: f"{name}.png" for name in drawn},
    }
    for name, picture in drawn.items():
        pictures.save_png(picture, config.out / f"{name}.png")
    stage.write_json(config.out / "report.json", report)
    write_text(config.out / "report.md", markdown(report))
    html.write_vae_page(config.out, MEANINGS)
    tracker = Tracker(config.out, "report", about["images_seen"], about["images_seen"], anew=True)
    tags = {f"evaluation/{name}": found["value"] for name, found in figures.items()}
    tracker.log(about["images_seen"], tags)
    for name, picture in drawn.items():
        tracker.image(about["images_seen"], f"evaluation/{name}", picture)
    tracker.close()
    print(f"{config.out / 'report.html'}: {len(figures)} figures, {len(drawn)} pictures")
    return about["images_seen"]


if __name__ == "__main__":
    stage.run(ReportVAE, main, __doc__)
