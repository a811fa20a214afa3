"""Arithmetic coding of validation codes under their priors: equal after decoding, and the size.

    python benchmarks/lossless.py --checkpoint runs/celeba64 --json docs/benchmarks/lossless.json
    python benchmarks/lossless.py --checkpoint runs/a/vqvae --codes runs/a/codes \\
        --priors runs/b/prior-level0 runs/b/prior-level1 --json runs/bench/lossless.json
    python benchmarks/lossless.py ... --device cuda --num_images 1000 --file codes.bin

The file is decoded by the engine that samples, front by front, from its bytes alone. Refused unless
all codes come back and the file, without its header of constant size, is within 0.1 % of the
negative log-likelihood by the parallel forward pass, plus the 8 bytes that a range coder may need
to end. Class and attributes are unknown on both sides.

Rows of the same images: `ours`; `fixed length`, the sum of h·w·log2 K; and with shards beside the
checkpoint (or --data) PNG, which keeps every pixel. `overhead` is the size against the likelihood,
header included. Seconds include the priors' forward passes.
"""

import argparse
import io
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from measure import print_table, refuse, write_json
from PIL import Image

from pipeline.data.codes import open_codes
from pipeline.data.images import open_images
from pipeline.evaluation import lossless
from pipeline.evaluation.code_likelihood import code_nats
from pipeline.image_model import ImageModel, load_model
from pipeline.stage import UserError
from pipeline.training.tracking import progress_bar

TOLERANCE, LAST_WORDS = 1e-3, 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run tree, or its vqvae/")
    parser.add_argument("--priors", type=Path, nargs="+", help="coarse to fine; default: beside it")
    parser.add_argument("--codes", type=Path, help="code shards; default: beside it")
    parser.add_argument("--data", type=Path, help="image shards; default: beside it, if there")
    parser.add_argument("--num_images", type=int, default=100, help="first of the valid split")
    parser.add_argument("--batch_size", type=int, default=100, help="images coded side by side")
    parser.add_argument("--file", type=Path, help="where the coded file is to stay")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser.parse_args()


def read_codes(model: ImageModel, root: Path, count: int) -> tuple[list[torch.Tensor], dict]:
    """The first validation codes, per level (N, h, w), and their origin; refuses those of another
    checkpoint."""
    codes = open_codes(root, "valid")
    origin = codes.index.codes or {}
    if origin["checkpoint_sha256"] != model.sha256:
        refuse(f"{root} holds codes of another checkpoint")
    if not 1 <= count <= len(codes):
        refuse(f"--num_images must be in 1..{len(codes)}, the validation codes of {root}")
    first = codes.fetch(np.arange(count))
    levels = [torch.from_numpy(first[f"level{level}"]) for level in range(len(model.grids))]
    return [level.to(model.device) for level in levels], origin


def png_bytes(data: Path, origin: dict, count: int) -> int:
    """Of the first validation images as PNG, cropped and resized as the model sees them."""
    images = open_images(data, "valid", origin["image_size"], cache=False, progress=False)
    if images.index.sha256 != origin["data_index_sha256"]:
        refuse(f"{data} does not hold the images of these codes; give --data")
    total = 0
    for pixels in images[:count]:
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "PNG", optimize=True)
        total += len(buffer.getvalue())
    return total


def coded(model: ImageModel, codes: list[torch.Tensor], options: argparse.Namespace) -> dict:
    """The row of the coded file; ends the script where the codes do not come back."""
    priors = [model.prior(level).model for level in range(len(model.grids))]
    count, num_codes = len(codes[0]), sum(level.numel() for level in codes)
    nats = 0.0
    for start in range(0, count, options.batch_size):
        part = [level[start : start + options.batch_size] for level in codes]
        nats += float(code_nats(priors, part).sum())
    nll_bytes = nats / math.log(2) / 8

    began = time.perf_counter()
    with progress_bar(num_codes, "encode", unit="codes") as bar:
        data = lossless.encode(priors, codes, batch_size=options.batch_size, progress=bar.update)
    encoded = time.perf_counter()
    with progress_bar(num_codes, "decode", unit="codes") as bar:
        back = lossless.decode(priors, data, progress=bar.update)
    decoded = time.perf_counter()
    if not all(torch.equal(*pair) for pair in zip(codes, back, strict=True)):
        refuse("the decoded codes are not those that were coded")
    payload = len(data) - lossless.HEADER.size
    if abs(payload - nll_bytes) > TOLERANCE * nll_bytes + LAST_WORDS:
        refuse(f"{payload} bytes, but the likelihood says {nll_bytes:.1f}")
    if options.file is not None:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_bytes(data)
    return {
        "bytes": len(data),
        "header_bytes": lossless.HEADER.size,
        "nll_bytes": nll_bytes,
        "overhead": len(data) / nll_bytes - 1,
        "encode_sec": encoded - began,
        "decode_sec": decoded - encoded,
        "decode_images_per_sec": count / (decoded - encoded),
    }


def main() -> None:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: no CUDA device here")
    tree, count = options.checkpoint, options.num_images
    if not (tree / "vqvae").is_dir():
        tree = tree.parent
    try:
        model = load_model(options.checkpoint, priors=options.priors, device=options.device)
        codes, origin = read_codes(model, options.codes or tree / "codes", count)
        rows = {"ours": coded(model, codes, options)}
        fixed = lossless.fixed_length_bits(model.grids, model.vqvae.config.codebook_sizes)
        rows["fixed length"] = {"bytes": math.ceil(count * fixed / 8)}
        if options.data is not None or (tree / "shards").is_dir():
            png = png_bytes(options.data or tree / "shards", origin, count)
            rows["PNG of the pixels"] = {"bytes": png}
    except (UserError, ValueError) as error:
        refuse(str(error))
    case = f"{count} validation images, {model.image_size} px"
    common = {"case": case, "device": options.device, "extrapolated": False}
    document = [
        {"contender": name, **common, "bits_per_image": 8 * row["bytes"] / count, **row}
        for name, row in rows.items()
    ]
    print_table(case, document)
    write_json(
        options.json, document, options.device, batch_size=options.batch_size, codes=origin,
        checkpoint_sha256=model.sha256,
        prior_sha256=[prior.sha256 for _, prior in sorted(model.priors.items())],
    )  # fmt: skip


if __name__ == "__main__":
    main()
