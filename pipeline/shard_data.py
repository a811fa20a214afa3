"""Images -> WebDataset shards and an index.

    python pipeline/shard_data.py --source celeba --root ~/celeba --out runs/celeba/shards
    python pipeline/shard_data.py --source folder --root ~/photos --out runs/photos/shards
    python pipeline/shard_data.py --source mnist --root ~/mnist --out runs/mnist/shards
    python pipeline/shard_data.py --source faces --out runs/demo/shards --num_faces 2000

One process per CPU; a stopped run goes on where it was when it is started again. Images that
cannot be used are left out and named in the summary and in index.json; too many of them stop it.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import itertools
import json
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from tqdm import tqdm

from pipeline import stage
from pipeline.data.faces import write_faces
from pipeline.data.images import MAX_PIXELS
from pipeline.data.inspection import Limits
from pipeline.data.sharding import Result, Task, make_shards
from pipeline.data.shards import SPLITS, Index, check_unique, write_index
from pipeline.data.sources import SOURCES, Source
from pipeline.stage import UserError


@dataclass(frozen=True, kw_only=True)
class ShardData:
    """What to shard, and where to."""

    source: Literal["celeba", "folder", "mnist", "faces"]
    """celeba: official layout; folder: any images; mnist: idx files; faces: drawn here."""
    out: Path
    """Directory of the shards."""
    root: Path | None = None
    """Where the images are. Drawn faces are put there; default for them: faces/ beside `out`."""
    shard_size: int = 1000
    """Images per shard."""
    workers: int = 0
    """Processes, 0 for one per CPU."""
    max_quarantined: float = 0.001
    """Fraction of unusable images (truncated, wrong size, no annotation) beyond which it stops."""
    max_pixels: int = 64_000_000
    """Images with more pixels are not decoded but left out."""
    limit: int | None = None
    """Only the first images of each split; None: all."""
    num_faces: int = 8000
    """faces: how many to draw."""
    face_size: int = 64
    """faces: height and width in pixels."""
    seed: int = 0
    """faces: seed of the drawing."""

    def __post_init__(self) -> None:
        if self.root is None and self.source != "faces":
            raise ValueError(f"root must name the directory of the {self.source} images")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError("max_quarantined must be a fraction in 0..1")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"max_pixels must be in 1..{MAX_PIXELS}")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1, or null for all images")
        if self.shard_size < 1 or self.workers < 0:
            raise ValueError("shard_size must be at least 1 and workers at least 0")

    @property
    def image_root(self) -> Path:
        return self.root if self.root is not None else self.out.parent / "faces"

    @property
    def num_workers(self) -> int:
        return self.workers or stage.num_cpus()


def draw_faces(config: ShardData) -> None:
    """Draws what is missing of the faces; a second call finds them all there."""
    with tqdm(total=config.num_faces, unit="image", desc="drawing") as bar:

        def advance(count: int) -> None:
            bar.update(count)

        try:
            write_faces(
                config.image_root,
                num_faces=config.num_faces,
                size=config.face_size,
                seed=config.seed,
                workers=config.num_workers,
                progress=advance,
            )
        except ValueError as error:
            raise UserError(str(error)) from error


def plan_tasks(config: ShardData, source: Source) -> list[Task]:
    """Every split cut into shards, in the source's order."""
    keys = [item.key.encode() for item in source.items]
    check_unique(keys, "each image of a source needs its own")  # readers go by it, in all splits
    names = replace(source, items=())
    limits = Limits(max_pixels=config.max_pixels, image_size=source.image_size)
    tasks = []
    for split in SPLITS:
        chosen = [item for item in source.items if item.split == split][: config.limit]
        for number, start in enumerate(range(0, len(chosen), config.shard_size)):
            tasks.append(
                Task(
                    path=config.out / f"{split}-{number:05d}.tar",
                    split=split,
                    items=tuple(chosen[start : start + config.shard_size]),
                    source=names,
                    limits=limits,
                )
            )
    return tasks


def make_plan(config: ShardData, tasks: list[Task]) -> dict[str, Any]:
    """What has to be equal for a run to go on in, or to accept, a directory of shards."""
    digests = "".join(task.digest for task in tasks)
    keys = ["source", "shard_size", "max_pixels", "limit"]
    if config.source == "faces":
        keys += ["num_faces", "face_size", "seed"]
    plan = {key: getattr(config, key) for key in keys}
    return {**plan, "images": hashlib.sha256(digests.encode()).hexdigest()}


def claim(out: Path, plan: dict[str, Any]) -> None:
    """Marks `out` as made by this plan; UserError where it was made by another one."""
    file = out / "plan.json"
    way_out = f"choose another --out, or delete {out}"
    if not file.exists():
        if (out / "index.json").exists():
            raise UserError(f"{out} has an index.json that shard_data did not write: {way_out}")
        stage.write_json(file, plan)
        return
    try:
        found = json.loads(file.read_text())
        differing = [key for key in plan | found if plan.get(key) != found.get(key)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {way_out}") from error
    if differing:
        key = differing[0]
        was, now = (str(values.get(key))[:20] for values in (found, plan))
        raise UserError(f"{out} was made with another {key} ({was}, now {now}): {way_out}")


def collect(config: ShardData, tasks: list[Task]) -> list[Result]:
    """All results in the plan's order; UserError as soon as too many images are unusable."""
    total = sum(len(task.items) for task in tasks)
    results: dict[str, Result] = {}
    quarantined: list[dict[str, str]] = []
    with tqdm(total=total, unit="image", desc="sharding") as bar:
        for result in make_shards(tasks, config.num_workers):
            results[result.info.name] = result
            quarantined += result.quarantined
            bar.update(result.num_items)
            if len(quarantined) > config.max_quarantined * total:
                some = "; ".join(f"{bad['path']}: {bad['reason']}" for bad in quarantined[:3])
                raise UserError(
                    f"{len(quarantined)} of {total} images cannot be used ({some}): mend or "
                    f"remove them, or raise --max_quarantined ({config.max_quarantined})"
                )
    return [results[task.path.name] for task in tasks]


def make_index(source: Source, results: list[Result]) -> Index:
    """The index of all results; splits without a shard are absent."""
    splits = {
        split: tuple(result.info for result in group)
        for split, group in itertools.groupby(results, lambda result: result.split)
    }
    return Index(
        source=source.name,
        splits=splits,
        attribute_names=source.attribute_names,
        class_names=source.class_names,
        factor_names=source.factor_names,
        quarantined=tuple(bad for result in results for bad in result.quarantined),
    )


def summarise(out: Path, index: Index, results: list[Result], seconds: float) -> int:
    """Prints what the directory holds; returns the number of images."""
    total = 0
    for split, shards in index.splits.items():
        count, size = index.num_samples(split), sum(shard.bytes for shard in shards)
        print(f"{split:>6}: {count:,} images in {len(shards)} shards, {size / 1e6:,.1f} MB")
        total += count
    found = sum(result.found for result in results)
    print(f"{out}: {total:,} images of {index.source}, {total / seconds:,.0f} images/s", end="")
    print(f" ({found} of {len(results)} shards were there already)" if found else "")
    print(f"quarantined: {len(index.quarantined)}")
    for bad in index.quarantined:
        print(f"  {bad['path']!a} ({bad['split']}): {bad['reason']}")
    return total


def main(config: ShardData) -> int:
    """Returns the number of images in the shards.

    A second call verifies the shards by their hashes and writes only those that are not whole.
    """
    if not stage.is_rank_zero():
        return 0  # it starts its own processes
    if config.source == "faces":
        draw_faces(config)
    start = time.monotonic()
    source = SOURCES[config.source](config.image_root)
    tasks = plan_tasks(config, source)
    claim(config.out, make_plan(config, tasks))
    stage.remove_leftovers(config.out, config.out / ".partial")
    results = collect(config, tasks)
    index = make_index(source, results)
    file = config.out / "index.json"
    if not file.is_file() or file.read_bytes() != index.to_bytes():
        write_index(config.out, index)
    return summarise(config.out, index, results, time.monotonic() - start)


if __name__ == "__main__":
    stage.run(ShardData, main, __doc__)
