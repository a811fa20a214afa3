"""How well the peers learn: the usual VQ-VAE-2 trained on the same shards as ours.

    python benchmarks/peers.py --data runs/celeba64/shards --quantizer published \\
        --total_images 160000 --batch_size 64 --json runs/bench/peers-published.json
    python benchmarks/peers.py --data runs/celeba64/shards --quantizer vector-quantize-pytorch \\
        --total_images 160000 --batch_size 64 --json runs/bench/peers-vector-quantize-pytorch.json

Network and loop of benchmarks/usual.py, with its own quantizer as published or with that of
vector-quantize-pytorch; Adam at a constant 3e-4. The images and their order are those of
pipeline/train_vqvae.py with the same seed and batch size. After so many images each image of the
validation split is reconstructed once: the mean squared error of its pixels in [0, 1], clamped, and
per level, coarse to fine, the effective codes (perplexity) and the codes used.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from measure import Absent, print_table, refuse, write_json
from usual import OneHotQuantizer, UsualStep, UsualVQVAE, VectorQuantizePytorch, to_usual

from pipeline.data.images import ImageSet, open_images
from pipeline.data.loader import training_batches
from pipeline.evaluation import pictures
from pipeline.models.quantizers import usage
from pipeline.stage import UserError
from pipeline.training.tracking import progress_bar

QUANTIZERS = {"published": OneHotQuantizer, "vector-quantize-pytorch": VectorQuantizePytorch}
CODES = 512


@torch.no_grad()
def reconstructed(model: UsualVQVAE, images: torch.Tensor):
    """Images (B, H, W, C) uint8 -> reconstructions (B, C, H, W) in [0, 1], clamped, and the codes
    per level (B, h, w), coarse to fine."""
    top, bottom, _, codes_top, codes_bottom = model.encode(to_usual(images))
    return ((model.decode(top, bottom) + 1) / 2).clamp(0, 1), (codes_top, codes_bottom)


def validate(
    model: UsualVQVAE, images: ImageSet, batch_size: int, device: str
) -> tuple[dict, np.ndarray]:
    """The figures, and the reconstructions (N, H, W, C) uint8."""
    model.eval()
    error, counts, sheets = 0.0, torch.zeros(2, CODES, dtype=torch.int64), []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[slice(start, start + batch_size)]).to(device)
        found, codes = reconstructed(model, batch)
        error += float((found - pictures.to_unit(batch, device)).double().square().sum())
        for level, level_codes in enumerate(codes):
            counts[level] += level_codes.flatten().bincount(minlength=CODES).cpu()
        sheets.append(pictures.to_uint8(found))
    model.train()
    reconstructions = np.concatenate(sheets)
    figures: dict = {"mse": error / reconstructions.size}
    for level, level_counts in enumerate(counts):
        perplexity, _, used = usage(level_counts)
        figures[f"level{level}/perplexity"], figures[f"level{level}/codes_used"] = perplexity, used
    return figures, reconstructions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with image shards")
    parser.add_argument("--quantizer", required=True, choices=QUANTIZERS)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--reconstructions", type=Path, help="npy file for those of the last row")
    parser.add_argument("--total_images", type=int, default=160_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument(
        "--validate_at", type=int, nargs="*", default=[20_000, 60_000, 100_000, 160_000],
        help="images seen; the end besides",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    try:
        train = open_images(arguments.data, "train", arguments.image_size)
        valid = open_images(arguments.data, "valid", arguments.image_size)
        torch.manual_seed(arguments.seed)
        model = UsualVQVAE(QUANTIZERS[arguments.quantizer], train.recipe.channels, size=CODES)
    except (UserError, Absent) as error:
        refuse(f"error: {error}")
    model.to(arguments.device).train()
    step = UsualStep(model)
    batches = training_batches(
        train.fetch, len(train), batch_size=arguments.batch_size, seed=arguments.seed
    )
    rows, reconstructions, seconds = [], None, 0.0
    with progress_bar(arguments.total_images, arguments.quantizer) as bar:
        while step.images_seen < arguments.total_images:
            start, before = time.perf_counter(), step.images_seen
            step(to_usual(next(batches)["images"].to(arguments.device)))
            seconds += time.perf_counter() - start
            bar.update(arguments.batch_size)
            ends = step.images_seen >= arguments.total_images
            if ends or any(before < point <= step.images_seen for point in arguments.validate_at):
                figures, reconstructions = validate(
                    model, valid, arguments.batch_size, arguments.device
                )
                row = {"contender": arguments.quantizer, "images_seen": step.images_seen}
                rows.append(row | figures | {"images_per_sec": step.images_seen / seconds})
                # after every row, so that a run cut short leaves what it found
                write_json(
                    arguments.json, rows, arguments.device,
                    data_index_sha256=train.index.sha256, recipe=train.recipe.hash,
                    validation_images=len(valid),
                )  # fmt: skip
                bar.set_postfix(mse=f"{figures['mse']:.4g}", refresh=False)
    print_table(f"{arguments.data}, {len(valid)} validation images", rows)
    if arguments.reconstructions is not None and reconstructions is not None:
        arguments.reconstructions.parent.mkdir(parents=True, exist_ok=True)
        np.save(arguments.reconstructions, reconstructions)


if __name__ == "__main__":
    main()
