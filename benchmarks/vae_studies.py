"""Studies of the VAE family: one change at a time, over seeds, as a table and a chart.

    python benchmarks/vae_studies.py --study beta --data runs/demo/shards --out runs/bench/beta \\
        --json docs/benchmarks/vae_beta.json
    python benchmarks/vae_studies.py --study collapse --data runs/mnist/shards ...
    python benchmarks/vae_studies.py --study dequantization --data runs/mnist/shards ...
    python benchmarks/vae_studies.py ... --total_images 20000 --seeds 1                a quick look

    beta            rate, distortion and disentanglement (MIG, DCI) over beta: drawn faces, 32 px
    collapse        tools against posterior collapse, on MNIST with an autoregressive decoder that
                    models the digits without z when nothing is done
    dequantization  bits per dimension of grey MNIST digits by ways to dequantize, and by masses

Every row is a run of pipeline/train_vae.py and a report of pipeline/report_vae.py; what is done is
kept, so a broken series goes on where it stopped. A figure is the mean over the seeds, with its
standard deviation where there are two or more.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import ROOT, print_table, refuse, write_json

FACES = {"image_size": 32, "model.latent_dim": 16, "model.variance": 0.02}
MNIST = ROOT / "configs" / "mnist"
COLLAPSING = {"model.context_layers": 6, "model.context_kernel": 5, "model.latent_dim": 32}
GREY = {"binarize": "false", "model.likelihood": "gaussian_global", "model.variance": 0.05}
STUDIES = {  # study: config, what each row changes, columns
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
            "KL warm-up": {**COLLAPSING, "kl_warmup_images": 60_000},
            "free bits": {**COLLAPSING, "objective.free_bits": 0.1},
            "context dropout": {**COLLAPSING, "model.context_dropout": 0.3},
            "small field": {**COLLAPSING, "model.context_layers": 1, "model.context_kernel": 3},
            "aggressive": {**COLLAPSING, "encoder_steps": 5, "aggressive_images": 60_000},
        },
        ("negative_elbo", "nll_importance", "inference_gap", "kl", "information",
         "information_ceiling", "marginal_kl", "barber_agakov", "active_units",
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
        ("negative_elbo", "nll_importance", "bits_per_dim", "kl", "mse"),
    ),
}  # fmt: skip


def run(script: str, **options: object) -> None:
    """Runs a stage to its end."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(ROOT / "pipeline" / script), *flags]
    if subprocess.run(command, check=False).returncode != 0:
        refuse(f"{script} ended with an error, see above")


def figures_of(out: Path, data: Path, config: Path, changes: dict, samples: int) -> dict:
    """Trains a run where it has not ended yet, and reports it."""
    if not (out / "final" / "config.json").is_file():
        run("train_vae.py", config=config, data=data, out=out, **changes)
    if not (out / "report" / "report.json").is_file():
        run("report_vae.py", data=data, checkpoint=out, out=out / "report",
            **{"likelihood.num_samples": samples})  # fmt: skip
    report = json.loads((out / "report" / "report.json").read_text())
    figures = {name: figure["value"] for name, figure in report["figures"].items()}
    return figures | {"images_seen": report["protocol"]["checkpoint"]["images_seen"]}


def row_of(name: str, runs: list[dict], columns: tuple[str, ...]) -> dict:
    """Means over the seeds, and standard deviations as `<column>_sd`."""
    row = {"contender": name, "seeds": len(runs), "images_seen": runs[0]["images_seen"]}
    for column in columns:
        values = [figures[column] for figures in runs if column in figures]
        if values:
            row[column] = statistics.mean(values)
        if len(values) > 1:
            row[f"{column}_sd"] = statistics.stdev(values)
    return row


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
    parser.add_argument("--total_images", type=int, help="length of a run, if not the config's")
    parser.add_argument("--seeds", type=int, default=5, help="runs per row (default 5)")
    parser.add_argument("--samples", type=int, default=5_000, help="of the likelihood, per image")
    options = parser.parse_args()
    config, changes, columns = STUDIES[options.study]
    length = {"total_images": options.total_images} if options.total_images else {}
    rows = []
    for name, change in changes.items():
        runs = []
        for seed in range(options.seeds):
            short = "".join(c if c.isalnum() else "-" for c in name)
            out = options.out / f"{short}-seed{seed}"
            settings = {**change, **length, "seed": seed}
            runs.append(figures_of(out, options.data, config, settings, options.samples))
        rows.append(row_of(name, runs, columns))
        write_json(options.json, rows, "cuda" if torch.cuda.is_available() else "cpu")
    draw(options.study, rows, options.json.with_suffix(".png"))
    print_table(f"{options.data}", rows)


if __name__ == "__main__":
    main()
