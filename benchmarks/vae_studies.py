"""Studies of the VAE family: one change at a time, over seeds, as a table and a chart.

    python benchmarks/vae_studies.py --study beta --data runs/demo/shards --out runs/bench/beta \\
        --json docs/benchmarks/vae_beta.json
    python benchmarks/vae_studies.py --study collapse --data runs/mnist/shards ...
    python benchmarks/vae_studies.py --study dequantization --data runs/mnist/shards ...
    python benchmarks/vae_studies.py ... --total_images 20000 --seeds 1                a quick look

    beta            rate, distortion and disentanglement (MIG, DCI) over beta: drawn faces, 32 px
    collapse        tools against posterior collapse, on MNIST of 16 pixels with an autoregressive
                    decoder that sees the whole digit, so that it can do without z
    dequantization  bits per dimension of grey MNIST digits by ways to dequantize, and by masses

Every row is a run of pipeline/train_vae.py and a report of pipeline/report_vae.py; what is done is
kept, so a broken series goes on where it stopped. A figure is the mean over the seeds, with its
standard deviation (`_sd`) where there are two or more.

What has bits per dimension is also compared with the uniformly dequantized Gaussian on the same
images: `difference` of `bits_per_dim` and `elbo_difference` of `elbo_bits_per_dim`, below 0 where
the row is better. The values of an image are averaged over the seeds before they are paired, so the
standard errors (`_se`) are over images, for these trained models.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import ROOT, print_table, refuse, write_json

from pipeline.evaluation.likelihood import bits_per_dim

FACES = {"image_size": 32, "model.latent_dim": 16, "model.variance": 0.02}
MNIST = ROOT / "configs" / "mnist"
COLLAPSING = {
    "image_size": 16, "model.context_layers": 6, "model.context_kernel": 5, "model.latent_dim": 32,
}  # fmt: skip
GREY = {"binarize": "false", "model.likelihood": "gaussian_global", "model.variance": 0.05}
REFERENCE = "gaussian, uniform"  # the row that others are compared with, image by image
STUDIES = {  # study: config, what each row changes (*_images as a share of the run), columns
    "beta": (
        ROOT / "configs" / "celeba64" / "train_vae_beta_vae.yaml",
        {
            f"beta {beta}": {**FACES, "objective.beta": beta}
            for beta in (0.5, 1.0, 4.0, 16.0)
        },
        ("kl", "reconstruction", "mse", "active_units", "mig", "dci_disentanglement",
         "dci_completeness", "dci_informativeness"),
    ),
    "collapse": (
        MNIST / "train_vae_pixel_vae.yaml",
        {
            "nothing": COLLAPSING,
            "KL warm-up": {**COLLAPSING, "kl_warmup_images": 0.25},
            "free bits": {**COLLAPSING, "objective.free_bits": 0.1},
            "context dropout": {**COLLAPSING, "model.context_dropout": 0.3},
            "small field": {**COLLAPSING, "model.context_layers": 1, "model.context_kernel": 3},
            "aggressive": {**COLLAPSING, "encoder_steps": 5, "aggressive_images": 0.25},
        },
        ("negative_elbo", "nll_importance", "effective_sample_size", "inference_gap", "kl",
         "information", "information_ceiling", "marginal_kl", "barber_agakov", "active_units",
         "probe_average_precision"),
    ),
    "dequantization": (
        MNIST / "train_vae_vae.yaml",
        {
            "gaussian, none": GREY,
            "gaussian, uniform": {**GREY, "model.dequantization": "uniform"},
            "gaussian, variational": {**GREY, "model.dequantization": "variational"},
            "categorical": {"binarize": "false", "model.likelihood": "categorical"},
            "logistic mixture": {"binarize": "false", "model.likelihood": "logistic_mixture"},
        },
        ("negative_elbo", "nll_importance", "effective_sample_size", "elbo_bits_per_dim",
         "bits_per_dim", "kl", "mse"),
    ),
}  # fmt: skip


def run(script: str, **options: object) -> None:
    """Runs a stage to its end."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(ROOT / "pipeline" / script), *flags]
    if subprocess.run(command, check=False).returncode != 0:
        refuse(f"{script} ended with an error, see above")


def report_of(out: Path, data: Path, config: Path, changes: dict, samples: int) -> dict:
    """The report of a run, which is trained where it has not ended yet."""
    if not (out / "final" / "config.json").is_file():
        run("train_vae.py", config=config, data=data, out=out, **changes)
    if not (out / "report" / "report.json").is_file():
        run("report_vae.py", data=data, checkpoint=out, out=out / "report",
            **{"likelihood.num_samples": samples})  # fmt: skip
    return json.loads((out / "report" / "report.json").read_text())


def row_of(name: str, reports: list[dict], columns: tuple[str, ...]) -> dict:
    """Means over the seeds, and standard deviations as `<column>_sd`."""
    seen = reports[0]["protocol"]["checkpoint"]["images_seen"]
    row = {"contender": name, "seeds": len(reports), "images_seen": seen}
    for column in columns:
        figures = [report["figures"] for report in reports]
        values = [found[column]["value"] for found in figures if column in found]
        if values:
            row[column] = statistics.mean(values)
        if len(values) > 1:
            row[f"{column}_sd"] = statistics.stdev(values)
    return row


def differences(reports: list[dict], reference: list[dict]) -> dict[str, float]:
    """What these runs need more bits per dimension than the reference: the means over images of
    both bounds, and their standard errors. Nothing where a density has no bits per dimension."""
    if reports[0]["protocol"]["likelihood_of"] in (None, "density"):
        return {}
    first = reference[0]["protocol"]
    for report in [*reference, *reports]:
        protocol = report["protocol"]
        same = all(protocol[name] == first[name] for name in ("data_index_sha256", "likelihood"))
        if not same or "per_image" not in report:
            refuse(
                f"the report of {protocol['checkpoint']['path']} cannot be paired with the others: "
                "other images, other --samples, or an old version; delete it to have it made again"
            )
    found = {}
    for prefix, bound in (("elbo_", "negative_elbo"), ("", "nll_importance")):
        bits = bits_per_image(reports, bound) - bits_per_image(reference, bound)
        found[f"{prefix}difference"] = float(bits.mean())
        found[f"{prefix}difference_se"] = float(bits.std(ddof=1) / len(bits) ** 0.5)
    return found


def bits_per_image(reports: list[dict], bound: str) -> np.ndarray:
    """A bound in bits per dimension of each image (N,), the mean over the seeds."""
    protocol = reports[0]["protocol"]
    model, kind = protocol["checkpoint"]["model"], protocol["likelihood_of"]
    nats = np.mean([report["per_image"][bound] for report in reports], axis=0)
    dims = model["in_channels"] * model["image_size"] ** 2
    return np.array([bits_per_dim(value, dims, kind) for value in nats])


def draw(study: str, rows: list[dict], path: Path) -> None:
    """Rate against distortion, or the KL beside I_q and its bound; nothing for the others."""
    if study == "dequantization":
        return
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    if study == "beta":
        x, y = "kl", "reconstruction"
        axes.set(xlabel="rate: KL, nats per image", ylabel="distortion: -E log p(x|z), nats")
    else:
        x, y = "information", "nll_importance"
        axes.set(xlabel="I_q, nats", ylabel="-log p(x) by importance sampling, nats per image")
    for row in rows:
        axes.errorbar(row[x], row[y], xerr=row.get(f"{x}_sd"), yerr=row.get(f"{y}_sd"), fmt="o")
        axes.annotate(row["contender"], (row[x], row[y]), xytext=(6, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_title(f"{rows[0]['images_seen']:,} images seen, {rows[0]['seeds']} seeds")
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="directory with image shards")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--total_images", type=int, default=200_000, help="length of a run")
    parser.add_argument("--seeds", type=int, default=5, help="runs per row (default 5)")
    parser.add_argument("--samples", type=int, default=5_000, help="of the likelihood, per image")
    options = parser.parse_args()
    config, changes, columns = STUDIES[options.study]
    length = options.total_images
    rows, reports = [], {}
    for name, change in changes.items():
        reports[name] = []
        for seed in range(options.seeds):
            short = "".join(c if c.isalnum() else "-" for c in name)
            out = options.out / f"{short}-seed{seed}"
            parts = {
                key: int(share * length) for key, share in change.items() if key.endswith("_images")
            }
            settings = {**change, **parts, "total_images": length, "seed": seed}
            found = report_of(out, options.data, config, settings, options.samples)
            reports[name].append(found)
        row = row_of(name, reports[name], columns)
        if REFERENCE in reports and name != REFERENCE:
            row |= differences(reports[name], reports[REFERENCE])
        rows.append(row)
        write_json(options.json, rows, "cuda" if torch.cuda.is_available() else "cpu")
    draw(options.study, rows, options.json.with_suffix(".png"))
    print_table(f"{options.data}", rows)


if __name__ == "__main__":
    main()
