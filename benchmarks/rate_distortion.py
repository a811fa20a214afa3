"""Bits against MSE over codebook sizes, levels and quantizers, as a table and a chart.

    python benchmarks/rate_distortion.py --data runs/celeba64/shards --out runs/bench/rate \\
        --total_images 20000 --json docs/benchmarks/rate_distortion.json

Every point is a run of pipeline/train_vqvae.py with configs/celeba64 and the flags of its row in
RUNS, in turn; runs that are done are kept, so a broken series goes on where it stopped. `--only`
takes a part of the rows. Beside the JSON lies the chart as PNG.

`bits` is what the codes of an image take when all are equally likely, the sum of h·w·log2 K;
`entropy_bits` when they are coded one by one by their frequencies on the validation split. MSE is
of validation images in [0, 1].
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import ROOT, print_table, refuse, write_json

from pipeline import stage
from pipeline.train_vqvae import TrainVQVAE
from pipeline.training.checkpoint import read_about

CONFIG = ROOT / "configs" / "celeba64" / "train_vqvae.yaml"
RUNS = {  # what each row changes in the config
    "K=512": {},
    "K=128": {"model.codebook_size": [128]},
    "K=2048": {"model.codebook_size": [2048]},
    "K=512, 1 level of 16x16": {"model.ratios": [4]},
    "K=512, 3 levels": {"model.ratios": [2, 2, 4]},
    "learned": {"model.quantizer": ["learned"]},
    "cosine": {"model.quantizer": ["cosine"]},
    "fsq": {"model.quantizer": ["fsq"]},
    "simvq": {"model.quantizer": ["simvq"]},
    "ema, rotation": {"model.gradient": "rotation"},
    "no revival": {"model.revival": 0.0},
    "level dropout 0.1": {"level_dropout": 0.1},
}


def arguments_of(changes: dict, data: Path, out: Path, images: int | None) -> list[str]:
    """The command line of a run."""
    options = {"config": CONFIG, "data": data, "out": out, **changes}
    if images is not None:
        options |= {"total_images": images}
    return [f"--{name}={value}" for name, value in options.items()]


def images_seen(out: Path) -> int:
    """Of a finished run; 0 without one."""
    return read_about(out)["images_seen"] if (out / "final" / "config.json").is_file() else 0


def figures(name: str, out: Path, config: TrainVQVAE) -> dict:
    """The row of a finished run."""
    validation = read_about(out)["validation"]
    model = config.model
    bits = entropy_bits = 0.0
    row = {"contender": name, "images_seen": images_seen(out)}
    grids = model.grids(config.image_size, config.image_size)
    for level, (height, width) in enumerate(grids):
        perplexity = validation[f"validation/level{level}/perplexity"]
        bits += height * width * math.log2(model.codebook_sizes[level])
        entropy_bits += height * width * math.log2(perplexity)
        row[f"perplexity{level}"] = perplexity
        row[f"used{level}"] = validation[f"validation/level{level}/codes_used"]
        row[f"error{level}"] = validation[f"validation/level{level}/relative_error"]
    return row | {"bits": bits, "entropy_bits": entropy_bits, "mse": validation["validation/mse"]}


def draw(rows: list[dict], path: Path) -> None:
    """The chart: one point per row, joined over the codebook sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    sizes = sorted(
        (row for row in rows if row["contender"].startswith("K=") and "," not in row["contender"]),
        key=lambda row: row["bits"],
    )
    axes.plot([r["entropy_bits"] for r in sizes], [r["mse"] for r in sizes], color="0.7", zorder=0)
    for row in rows:
        axes.scatter(row["entropy_bits"], row["mse"], s=25)
        axes.annotate(
            row["contender"], (row["entropy_bits"], row["mse"]),
            xytext=(5, 3), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_xlabel("bits per image, codes coded by their frequencies")
    axes.set_ylabel("validation MSE in [0, 1]")
    axes.set_title(f"{rows[0]['images_seen']:,} images seen")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with image shards")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--total_images", type=int, help="length of a run, if not the config's")
    parser.add_argument("--only", nargs="*", choices=RUNS, help="some of the rows")
    options = parser.parse_args()
    rows = []
    if options.only and options.json.is_file():  # the other rows stay
        known = json.loads(options.json.read_text())["rows"]
        rows = [row for row in known if row["contender"] not in options.only]
    for name, changes in RUNS.items():
        if options.only and name not in options.only:
            continue
        out = options.out / "".join(c if c.isalnum() else "-" for c in name)
        arguments = arguments_of(changes, options.data, out, options.total_images)
        config = stage.parse(TrainVQVAE, arguments)
        # a run of another length than asked for goes on, and its row says how far it came
        if images_seen(out) < config.total_images:
            command = [sys.executable, str(ROOT / "pipeline" / "train_vqvae.py"), *arguments]
            if subprocess.run(command, check=False).returncode != 0:
                refuse(f"{name}: the run ended with an error, see above")
        rows.append(figures(name, out, config))
        write_json(options.json, rows, "cuda" if torch.cuda.is_available() else "cpu")
        draw(rows, options.json.with_suffix(".png"))
    print_table(f"{options.data}", rows)


if __name__ == "__main__":
    main()
