"""Images/s of one process: webdataset with PIL, our streaming path, and the uint8 cache.

    python benchmarks/loading.py --json runs/bench/loading-cpu.json
    python benchmarks/loading.py --data runs/celeba64/shards --json runs/bench/loading-celeba.json

All read the same shards and deliver batches of 64: images (64, size, size, 3) uint8 and what is
known about them. `webdataset` goes through the tars in their order, decodes by its `pil` handler,
crops and resizes by PIL. `ours-streaming` (`--cache false`) and `ours` are the loader of the
training stages, in shuffled order. No contender has worker processes. The files are in the page
cache: a slow disk or an object store is not measured here.

Without --data the images are drawn faces, JPEG of 178x218 pixels as in CelebA, brought to 64
pixels. No figure is written unless the pixels of all images are the same in all three. `speedup` is
the median over the turns of the time of `webdataset` divided by the contender's.
"""

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from measure import CpuTimer, print_table, refuse, take_turns, version, write_json
from PIL import Image

try:
    import webdataset

    from pipeline.data.faces import draw_face, sample_face
    from pipeline.data.images import ImageSet, Recipe, open_images
    from pipeline.data.index import Index, write_index
    from pipeline.data.loader import training_batches
    from pipeline.data.shards import write_shard
except ModuleNotFoundError as error:  # a bare interpreter has what kernels and models need
    print(f"loading is left out: it needs {error.name}")
    sys.exit(0)

BATCH = 64
TARGETS = {"ours-streaming": 1.5, "ours": 50.0}  # times as fast as webdataset
CACHED = 64  # times as many batches of the cache in a turn, which would be too short


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--data", type=Path, help="image shards; default: drawn faces")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=64, help="pixels of the result")
    parser.add_argument("--images", type=int, default=512, help="compared, and drawn")
    parser.add_argument("--batches", type=int, default=4, help="of webdataset in a turn")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contender")
    arguments = parser.parse_args()
    if min(arguments.size, arguments.images, arguments.batches, arguments.rounds) < 1:
        refuse("--size, --images, --batches and --rounds must be at least 1")
    return arguments


def face_shards(root: Path, count: int) -> Path:
    """Two shards of drawn faces, encoded as CelebA's images are."""

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        face = Image.fromarray(np.asarray(draw_face(sample_face(0, number), 218)))
        encoded = io.BytesIO()
        face.crop((20, 0, 198, 218)).save(encoded, "JPEG", quality=90)
        return f"{number:06d}", {"jpg": encoded.getvalue(), "json": b"{}"}

    halves = [range(count // 2), range(count // 2, count)]
    shards = [
        write_shard(root / f"train-{i:05d}.tar", map(sample, half)) for i, half in enumerate(halves)
    ]
    write_index(root, Index(source="faces", splits={"train": tuple(shards)}))
    return root


def usual_pixels(image: Image.Image, recipe: Recipe) -> np.ndarray:
    """A centre crop and a bilinear resize, as usual."""
    width, height = image.size
    crop = recipe.crop or min(width, height)
    left, top = (width - crop) // 2, (height - crop) // 2
    square = image.crop((left, top, left + crop, top + crop))
    return np.asarray(square.resize((recipe.size, recipe.size), Image.Resampling.BILINEAR))


def usual_samples(root: Path, images: ImageSet) -> Any:
    """webdataset's pipeline of (key, pixels, metadata) in the order of the shards."""
    urls = [str(root / shard.name) for shard in images.index.shards(images.split)]
    return (
        webdataset.WebDataset(urls, shardshuffle=False)  # pyright: ignore
        .decode("pil")
        .to_tuple("__key__", "jpg;png", "json")
        .map_tuple(lambda key: key, lambda image: usual_pixels(image, images.recipe))
    )


def our_batches(images: ImageSet) -> Iterator[dict]:
    return training_batches(images.fetch, len(images), batch_size=BATCH, seed=0)


def check_same_pixels(usual: Any, count: int, *sets: ImageSet) -> None:
    """Ends the script unless the first `count` images are the same, and as many, everywhere."""
    compared = 0
    for number, (key, pixels, _) in enumerate(islice(usual, count)):
        for images in sets:
            if number >= len(images) or images.keys[number].decode() != key:
                raise SystemExit(f"image {number} is {key} in webdataset, another one in ours")
            if not np.array_equal(images[number], pixels):
                raise SystemExit(f"image {key}: the pixels differ from webdataset's")
        compared += 1
    if compared != min(count, *map(len, sets)):
        raise SystemExit(f"webdataset has {compared} images, ours {[len(s) for s in sets]}")


def consume(batches: Iterator, count: int) -> Callable[[], None]:
    """The next `count` batches."""

    def call() -> None:
        for _ in range(count):
            next(batches)

    return call


def compare(
    contenders: dict[str, tuple[Iterator, int]], case: str, rounds: int
) -> list[dict[str, Any]]:
    """A row for each contender, given its endless batches and how many make a turn."""
    timers: dict = {name: CpuTimer(consume(*way)) for name, way in contenders.items()}
    turns = take_turns(timers, rounds)
    times = {name: [ms / contenders[name][1] for ms in own] for name, own in turns.items()}
    rows = []
    for name, own in times.items():
        median = statistics.median(own)
        pairs = zip(times["webdataset"], own, strict=True)
        rows.append({
            "contender": name, "case": case, "device": "cpu", "extrapolated": False,
            "median_ms": median, "min_ms": min(own), "images_per_sec": 1e3 * BATCH / median,
            "speedup": statistics.median(theirs / ours for theirs, ours in pairs),
            "target": TARGETS.get(name),
        })  # fmt: skip
    return rows


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as work:
        root = arguments.data or face_shards(Path(work), arguments.images)
        streamed, cached = (
            open_images(root, arguments.split, arguments.size, cache=cache, progress=False)
            for cache in (False, True)
        )
        if streamed.recipe.channels != 3 or streamed.recipe.pad:
            refuse(f"{root}: only RGB images without padding are compared")
        check_same_pixels(usual_samples(root, streamed), arguments.images, streamed, cached)
        usual = iter(usual_samples(root, streamed).repeat().batched(BATCH))
        contenders = {
            "webdataset": (usual, arguments.batches),
            "ours-streaming": (our_batches(streamed), arguments.batches),
            "ours": (our_batches(cached), CACHED * arguments.batches),
        }
        source = streamed.index.source
        case = f"{source}, {len(streamed)} images to {arguments.size} px, batches of {BATCH}"
        rows = compare(contenders, case, arguments.rounds)
    missed = [
        f"{row['contender']}: {row['speedup']:.2f} times as fast, the target is {row['target']:g}"
        for row in rows
        if row["target"] and row["speedup"] < row["target"]
    ]
    print_table(case, rows, missed)
    versions = {"webdataset": version("webdataset"), "pillow": version("pillow")}
    write_json(arguments.json, rows, "cpu", **versions)


if __name__ == "__main__":
    main()
