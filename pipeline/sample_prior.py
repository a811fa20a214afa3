"""Draws images: codes level by level, coarse to fine, from the priors, then the decoder.

    python pipeline/sample_prior.py --checkpoint runs/demo/vqvae --out runs/demo/samples
    python pipeline/sample_prior.py --checkpoint runs/demo/vqvae --out runs/demo/smiling \\
        --attributes Smiling=1,Eyeglasses=0 --num_images 32 --temperature '[0.9, 0.8]' --seed 7
    torchrun --nproc_per_node 2 pipeline/sample_prior.py ...      images are dealt to the processes

The codes of image n depend on the seed and n alone, not on the batch size or the number of
processes; its pixels may differ by rounding. Writes
<out>/images/000000.png ..., <out>/samples.png (a grid), <out>/samples.json (how they were made) and
<out>/shards, code shards of the images; with --format tar these hold the PNGs, too, and there is no
folder of images. A restart with the same options goes on with what is there (<out>/drawn).

Given codes, of extract_codes.py or the shards of another call; image n gets those of sample n:

    ... --codes runs/demo/codes --keep_levels 1          new bottom levels for a fixed top
    ... --codes runs/demo/codes --keep_rows 0.5          the upper half stays
    ... --codes runs/demo/codes --mask mask.png          what is white stays
    ... --codes runs/demo/codes --mask mask.png --resample 16

A drawn code knows the given codes before it in its level's order, and the coarser levels. Codes
later in the order do not inform a clamped sample: what is drawn in a hole may not fit what lies
below it. --resample R draws R fillings of each level and picks one by the likelihood of the later
given codes: the more, the nearer to a sample that knows them, at R times the work.

Rejection sampling (Razavi et al. 2019, section 3.3): of num_images / acceptance candidates keep
those in which the selector, a classifier trained with --half 0, sees most surely what was asked
for. The files are named by the numbers of the candidates:

    ... --attributes Smiling=1 --selector runs/demo/classifier-selector --acceptance 0.25

Conditions of a data set: image n is asked for all attributes, or the class, of one image of its
training split, each of which has its turn before one comes again; evaluate.py then tells what a
classifier learns from the samples:

    ... --conditions runs/demo/shards --num_images 2000 --format tar
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from pipeline import stage
from pipeline.data.codes import CodeSet, npy_bytes, open_codes
from pipeline.data.images import open_images
from pipeline.data.index import Index, read_index, write_index
from pipeline.data.order import stream
from pipeline.data.shards import ShardInfo, ShardReader, sync, verify_shard, write_shard
from pipeline.evaluation import pictures, rejection
from pipeline.failpoint import failpoint
from pipeline.image_model import Asked, Given, ImageModel, Precision, Sampling, load_model
from pipeline.training.checkpoint import lock
from pipeline.training.control import on_rank_zero
from pipeline.training.distributed import make_accelerator
from pipeline.training.tracking import progress_bar

SHARD_SIZE = 256  # images per tar
FOLDERS = ("drawn", "images", "shards")  # in --out
SPLIT = "train"  # of the shards: samples are something to train on, and no real images to test on
# options that change nothing about the images, but for rounding
FREE = ("out", "checkpoint", "priors", "batch_size", "columns", "method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplePrior(Sampling):
    """Config of the stage."""

    checkpoint: Path
    """Run directory of train_vqvae.py, or its final/."""
    out: Path
    """Directory for the images."""
    priors: list[Path] | None = None
    """Run directories of the priors, coarse to fine; None = prior-level0, prior-level1 ... beside
    the checkpoint."""
    num_images: int = 64
    """How many images."""
    batch_size: int = 64
    """Images sampled together, in each process."""
    precision: Precision = "fp32"
    """Of the priors' weights. bf16 is faster on a GPU, and picks another code now and then."""
    format: Literal["png", "tar"] = "png"
    """png: a folder of files, as evaluate.py reads it; tar: image shards, as train_classifier.py
    does."""
    columns: int = 8
    """Columns of the grid, which has as many rows at most."""
    conditions: Path | None = None
    """Directory with image shards: each image is asked for what an image of their training split
    has, so that together they have it as often as the data. With a selector, what is easily met is
    kept more often than it is there."""
    codes: Path | None = None
    """Directory with code shards of which a part stays; None = all is drawn."""
    split: Literal["train", "valid", "test"] | None = None
    """Split of the given codes; None = valid, or the first there is."""
    keep_levels: int = 0
    """So many of the coarsest levels stay as given."""
    keep_rows: float = 0.0
    """This share of the rows, from the top, stays as given, in all levels; in [0, 1)."""
    mask: Path | None = None
    """PNG of the images' size: codes whose whole place is white stay as given, in all levels."""
    resample: int = 1
    """Fillings per level, of which one is picked by the likelihood of the later given codes."""
    selector: Path | None = None
    """Run directory of train_classifier.py --half 0, for rejection sampling."""
    acceptance: float = 1.0
    """Share of the candidates that the selector keeps, in (0, 1]; less = surer, less varied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_images", "batch_size", "columns", "resample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_levels < 0:
            raise ValueError(f"keep_levels must be at least 0, got {self.keep_levels}")
        if not 0 <= self.keep_rows < 1:
            raise ValueError(f"keep_rows must be in [0, 1), got {self.keep_rows}")
        if not 0 < self.acceptance <= 1:
            raise ValueError(f"acceptance must be in (0, 1], got {self.acceptance}")
        keeps = self.keep_levels > 0 or self.keep_rows > 0 or self.mask is not None
        if keeps != (self.codes is not None):
            raise ValueError("codes and one of keep_levels, keep_rows and mask go together")
        if self.resample > 1 and self.codes is None:
            raise ValueError("resample is for given codes; give codes and what of them stays")
        if (self.acceptance < 1) != (self.selector is not None):
            raise ValueError("selector and an acceptance below 1 go together")
        if self.conditions is not None and (super().asks or self.codes is not None):
            raise ValueError("conditions go without attributes, label and codes")
        if self.selector is not None and not self.asks:
            raise ValueError("selector needs attributes, a label or conditions to judge by")

    @property
    def asks(self) -> bool:
        return super().asks or self.conditions is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenCodes:
    """Codes to start from, and which of them stay."""

    codes: CodeSet
    keep: list[torch.Tensor]
    """Per level (h, w) bool."""

    def of(self, numbers: np.ndarray) -> Given:
        """Those of images `numbers` (B,)."""
        return Given(codes_of(self.codes, numbers), self.keep)


def codes_of(codes: CodeSet, numbers: np.ndarray) -> list[torch.Tensor]:
    """Codes of samples `numbers` (B,), per level (B, h, w) int64."""
    batch = codes.fetch(numbers)
    return [torch.from_numpy(batch[f"level{i}"]) for i in range(len(codes.levels))]


def read_mask(path: Path, size: int) -> np.ndarray:
    """(size, size) bool: where the PNG is white."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != (size, size):
                raise ValueError(f"{image.width}x{image.height} pixels, needed {size}x{size}")
            return np.asarray(image.convert("L")) >= 128
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise stage.UserError(
            f"--mask {path} does not fit: {error}; give a PNG of the images' size"
        ) from error


def kept_codes(config: SamplePrior, model: ImageModel) -> list[torch.Tensor]:
    """Which codes stay, per level (h, w) bool: those whose whole place in the image does."""
    size = model.image_size
    stays = np.zeros((size, size), bool) if config.mask is None else read_mask(config.mask, size)
    stays[: int(config.keep_rows * size + 1e-6)] = True
    keep = [
        torch.from_numpy(stays.reshape(h, size // h, w, size // w).all((1, 3)))
        | (level < config.keep_levels)
        for level, (h, w) in enumerate(model.grids)
    ]
    if all(level.all() for level in keep):
        raise stage.UserError(f"all codes of all {len(keep)} levels stay; keep less of them")
    if not any(level.any() for level in keep):
        raise stage.UserError("no code's whole place stays; keep more, or leave --codes out")
    return keep


def open_given(config: SamplePrior, model: ImageModel, count: int) -> GivenCodes | None:
    """The given codes of `count` images; UserError for those of another VQ-VAE, or fewer."""
    if config.codes is None:
        return None
    index = read_index(config.codes)
    if index.codes and index.codes["checkpoint_sha256"] != model.sha256:
        raise stage.UserError(
            f"{config.codes} holds codes of another checkpoint than {config.checkpoint}; extract "
            "codes with this checkpoint"
        )
    keep = kept_codes(config, model)
    split = config.split or ("valid" if "valid" in index.splits else next(iter(index.splits), ""))
    codes = open_codes(config.codes, split)
    if len(codes) < count:
        raise stage.UserError(
            f"{config.codes} has codes of {len(codes)} images in split {split}, {count} are needed"
        )
    return GivenCodes(codes=codes, keep=keep)


def asked_for(config: SamplePrior, model: ImageModel, count: int) -> Asked:
    """What each of `count` images is asked for, in the priors' words; UserError for a data set that
    does not have them all."""
    names, classes = model.attribute_names, model.class_names
    if config.conditions is None:
        return model.asked(config, count)
    if not names and not classes:
        raise stage.UserError(
            "the priors were trained with neither attributes nor label; leave conditions out"
        )
    if read_index(config.conditions).codes:
        raise stage.UserError(f"{config.conditions} has codes; conditions are of image shards")
    data = open_images(config.conditions, "train", model.image_size, cache=False, progress=False)
    theirs, their_classes = list(data.index.attribute_names), list(data.index.class_names)
    if missing := [*(set(names) - set(theirs)), *(set(classes) - set(their_classes))]:
        raise stage.UserError(
            f"{config.conditions} does not tell {min(missing)}, which the priors were trained "
            "with; give the shards of their images"
        )
    chosen = stream(config.seed, len(data), 0, count)
    attributes = data.attributes[chosen][:, [theirs.index(name) for name in names]]
    # classes the priors do not know, and the -1 of no class, are left open
    number = np.array([*(classes.index(c) if c in classes else -1 for c in their_classes), -1])
    return Asked(names, attributes, classes, number[data.labels[chosen]])


def refuse_full_disk(config: SamplePrior, model: ImageModel, candidates: int) -> None:
    """UserError where images and codes would not fit; they are estimated by their raw size."""
    folder = config.out.absolute()
    ours = [file for name in FOLDERS for file in (folder / name).glob("*")]
    there = sum(file.stat().st_size for file in ours)
    while not folder.exists():
        folder = folder.parent
    pixels = model.vqvae.config.in_channels * model.image_size**2
    codes = 2 * sum(h * w for h, w in model.grids)
    members = 1024 * (len(model.grids) + 2)  # headers and padding of a tar
    needed = config.num_images * (pixels + codes + members) + candidates * (codes + 16) - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise stage.UserError(
            f"{config.num_images:,} images need about {needed / 2**30:.1f} GiB, {config.out} has "
            f"{free / 2**30:.1f} GiB left; ask for fewer images, or choose another --out"
        )


def make_protocol(
    config: SamplePrior,
    model: ImageModel,
    given: GivenCodes | None,
    selector: rejection.Selector | None,
) -> dict[str, Any]:
    """All that the images depend on; files by their SHA-256."""
    options = {name: v for name, v in stage.to_dict(config).items() if name not in FREE}
    priors = [model.priors.get(level) for level in range(len(model.grids))]
    return {
        **options,
        "attributes": config.wanted or None,
        "codes": given and given.codes.index.sha256,
        "conditions": config.conditions and read_index(config.conditions).sha256,
        "mask": config.mask and hashlib.sha256(config.mask.read_bytes()).hexdigest(),
        "selector": selector and selector.sha256,
        "vqvae_sha256": model.sha256,
        "prior_sha256": [prior and prior.sha256 for prior in priors],
        "file_format": "png",
        "recipe": model.recipe,
    }


# Drawing: one file per batch in <out>/drawn.


def save_part(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes <folder>/<first number>.npz atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arrays['numbers'][0]:09d}.npz"
    temporary = folder / f".{path.name}.{os.getpid()}"
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    sync(temporary)
    failpoint("commit")
    os.replace(temporary, path)


class Drawn:
    """What has been drawn, by whichever process: numbers (B,) int64, log_probs (B,) float64 and
    level0 ... (B, h, w) uint16 in each file."""

    def __init__(self, out: Path):
        self.places: dict[int, tuple[Path, int]] = {}
        self.log_probs: dict[int, float] = {}
        for path in sorted((out / "drawn").glob("*.npz")):
            with np.load(path, allow_pickle=False) as part:  # reads what it is asked for
                numbers, log_probs = part["numbers"].tolist(), part["log_probs"].tolist()
            self.places |= {number: (path, row) for row, number in enumerate(numbers)}
            self.log_probs |= dict(zip(numbers, log_probs, strict=True))
        # the images of a shard come from a few files, in turn
        self._read = lru_cache(maxsize=64)(lambda path: dict(np.load(path, allow_pickle=False)))

    def levels(self, numbers: list[int]) -> list[torch.Tensor]:
        """Codes of images, per level (B, h, w) uint16."""
        parts = [(self._read(path), row) for path, row in map(self.places.__getitem__, numbers)]
        names = [name for name in parts[0][0] if name.startswith("level")]
        return [torch.from_numpy(np.stack([part[n][row] for part, row in parts])) for n in names]


def codes_per_image(config: SamplePrior, model: ImageModel, given: GivenCodes | None) -> int:
    """How many codes are computed for an image."""
    total = 0
    for level, (h, w) in enumerate(model.grids):
        share = 0.0 if given is None else float(given.keep[level].float().mean())
        fillings = config.resample if 0 < share < 1 else int(share < 1)
        total += fillings * h * w
    return total


def draw(
    config: SamplePrior, model: ImageModel, numbers: np.ndarray, given: GivenCodes | None,
    asked: Asked, selector: rejection.Selector | None, advance: Callable[[int], Any],
) -> None:  # fmt: skip
    """Draws the codes of images `numbers` (N,), and scores them, batch by batch."""
    targets = selector and selector.targets(asked)
    for start in range(0, len(numbers), config.batch_size):
        batch = numbers[start : start + config.batch_size]
        codes = model.draw_codes(
            torch.from_numpy(batch), config, asked=asked.of(batch),
            given=given and given.of(batch), resample=config.resample, progress=advance,
        )  # fmt: skip
        log_probs = torch.zeros(len(batch))
        if selector and targets is not None:  # judges the images as files will hold them
            images = pictures.to_uint8(model.decode(codes))
            log_probs = selector.log_prob(pictures.to_unit(images, model.device), targets[batch])
        arrays = {f"level{i}": c.cpu().numpy().astype("<u2") for i, c in enumerate(codes)}
        arrays |= {"numbers": batch, "log_probs": log_probs.double().cpu().numpy()}
        save_part(config.out / "drawn", arrays)


# Decoding: one tar for SHARD_SIZE images in <out>/shards, and files in <out>/images.


def shard_path(config: SamplePrior, shard: int) -> Path:
    return config.out / "shards" / f"{SPLIT}-{shard:05d}.tar"


def note_path(config: SamplePrior, shard: int) -> Path:
    path = shard_path(config, shard)
    return path.with_name(f".{path.name}.json")


def png_path(config: SamplePrior, key: str) -> Path:
    return config.out / "images" / f"{key}.png"


def finished(config: SamplePrior, shard: int) -> ShardInfo | None:
    """What is known of a shard, if it is whole and the files of its images are there."""
    path, note = shard_path(config, shard), note_path(config, shard)
    info = ShardInfo(**json.loads(note.read_text())) if note.is_file() else None
    if info is None or not verify_shard(path, info):
        return None
    files = [png_path(config, key.decode()) for key in ShardReader(path, info).keys]
    return info if config.format == "tar" or all(file.is_file() for file in files) else None


def png_bytes(pixels: np.ndarray) -> bytes:
    """(H, W, C) uint8 as a PNG file."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def about_image(asked: Asked, number: int) -> dict[str, Any]:
    """What an image was asked for, as shards of images tell what theirs are of."""
    signs = dict(zip(asked.attribute_names, asked.attributes[number].tolist(), strict=True))
    about = {"attributes": {name: sign > 0 for name, sign in signs.items() if sign}}
    label = int(asked.labels[number])
    return about if label < 0 else {**about, "label": label}


def decoded(
    config: SamplePrior, model: ImageModel, numbers: list[int], drawn: Drawn, asked: Asked, bar
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard; with format png writes the files on the way."""
    for start in range(0, len(numbers), config.batch_size):
        batch = numbers[start : start + config.batch_size]
        levels = drawn.levels(batch)
        images = pictures.to_uint8(model.decode(levels))
        for row, number in enumerate(batch):
            key = f"{number:06d}"
            members = {
                f"level{i}.npy": npy_bytes(level[row].numpy()) for i, level in enumerate(levels)
            }
            if config.format == "tar":
                members["png"] = png_bytes(images[row])
            else:
                pictures.save_png(images[row], png_path(config, key))
            yield key, {**members, "json": json.dumps(about_image(asked, number)).encode()}
        bar.update(len(batch))


def finish(config: SamplePrior, model: ImageModel, shards: list[ShardInfo]) -> None:
    """The index of the shards, and the grid."""
    folder = config.out / "shards"
    origin = {
        "checkpoint_sha256": model.sha256,
        "recipe": model.recipe,
        "image_size": model.image_size,
        "grids": [list(grid) for grid in model.grids],
        "codebook_sizes": list(model.vqvae.config.codebook_sizes),
        "views": ["original"],
    }
    index = Index(
        source="folder", splits={SPLIT: tuple(shards)}, codes=origin,
        attribute_names=tuple(model.attribute_names), class_names=tuple(model.class_names),
    )  # fmt: skip
    write_index(folder, index)
    codes = open_codes(folder, SPLIT)
    shown = np.arange(min(len(codes), config.columns**2))
    batches = np.split(shown, range(config.batch_size, len(shown), config.batch_size))
    images = [pictures.to_uint8(model.decode(codes_of(codes, batch))) for batch in batches]
    grid = pictures.grid(np.concatenate(images), config.columns)
    pictures.save_png(grid, config.out / "samples.png", 2)


def main(config: SamplePrior) -> None:
    accelerator = make_accelerator(timeout_sec=86_400)  # one may have a batch more than the others
    rank, world = accelerator.process_index, accelerator.num_processes
    first = accelerator.is_main_process

    # Whatever can be wrong, before anything is written.
    candidates = rejection.num_candidates(config.num_images, config.acceptance)
    model = load_model(
        config.checkpoint, priors=config.priors, device=accelerator.device,
        precision=config.precision,
    )  # fmt: skip
    refuse_full_disk(config, model, candidates)
    given = open_given(config, model, candidates)
    model.check(config, given and given.keep)
    asked = asked_for(config, model, candidates)
    selector = None
    if config.selector:
        selector = rejection.load_selector(config.selector, model.recipe, model.device)
        selector.targets(asked)  # raises for what it cannot judge by
    protocol = make_protocol(config, model, given, selector)
    note = config.out / "samples.json"
    old = json.loads(note.read_text()) if note.is_file() else {}
    if old and {key: old.get(key) for key in protocol} != protocol:
        raise stage.UserError(
            f"{config.out} holds samples made otherwise; delete it or choose another --out"
        )
    if first and (deaf := model.deaf_levels(asked, given and given.keep)):
        print(f"note: the priors of levels {deaf} were trained without what is asked for")
    locks = []  # of rank 0, until this function ends
    on_rank_zero(lambda: locks.append(lock(config.out)), accelerator.device)
    shards = range(-(-config.num_images // SHARD_SIZE))
    infos = {shard: finished(config, shard) for shard in shards}
    todo = [shard for shard in shards if infos[shard] is None]
    missing = sorted(set(range(candidates)) - set(Drawn(config.out).places)) if todo else []
    if first:
        stage.remove_leftovers(*(config.out / name for name in ("", *FOLDERS)))
    accelerator.wait_for_everyone()  # all ranks have looked before the first one writes
    if first and not old:
        stage.write_json(note, {**protocol, "provenance": stage.provenance()})

    # Draw the codes.
    begun = time.perf_counter()
    mine = np.array(missing[rank::world], np.int64)
    total = len(mine) * codes_per_image(config, model, given)
    with progress_bar(total, "drawing", unit="codes", disable=not first) as bar:
        draw(config, model, mine, given, asked, selector, bar.update)
    accelerator.wait_for_everyone()

    # Choose, and decode what was chosen.
    drawn = Drawn(config.out)
    scores = np.array([drawn.log_probs[number] for number in range(candidates) if todo])
    chosen = rejection.best(scores, config.num_images).tolist()
    parts = {i: chosen[i * SHARD_SIZE : (i + 1) * SHARD_SIZE] for i in todo[rank::world]}
    with progress_bar(sum(map(len, parts.values())), "decoding", disable=not first) as bar:
        for shard, numbers in parts.items():
            samples = decoded(config, model, numbers, drawn, asked, bar)
            info = write_shard(shard_path(config, shard), samples)
            stage.write_json(note_path(config, shard), dataclasses.asdict(info))
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - begun

    if first:
        result = {**old, **protocol}
        if todo:
            result["provenance"] = stage.provenance()
        if todo and selector:
            result["accepted"] = chosen
        if len(missing) == candidates:  # nothing was there before
            result["images_per_sec"] = config.num_images / seconds
        stage.write_json(note, result)
        infos |= {shard: finished(config, shard) for shard in todo}
        finish(config, model, [info for info in infos.values() if info is not None])
        print(f"{config.out}: {config.num_images} images, grid in {config.out / 'samples.png'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    stage.run(SamplePrior, main, __doc__)
