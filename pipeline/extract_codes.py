"""Encodes image shards into code shards: one small integer grid per level and image.

    python pipeline/extract_codes.py --data runs/demo/shards --checkpoint runs/demo/vqvae \\
        --out runs/demo/codes
    torchrun --nproc_per_node 2 pipeline/extract_codes.py ...     shards are dealt to the processes

Every image shard becomes one code shard with the same keys, members `<key>.level0.npy` ... (uint16,
coarse to fine) and `<key>.json`. With --flip true the training split has a second view of
each image, `<key>_flip`: the codes of its mirror image. Finished shards are kept on a restart.
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from pipeline import stage
from pipeline.data import corruption
from pipeline.data.codes import npy_bytes
from pipeline.data.corruption import CorruptConfig
from pipeline.data.images import ImageSet, open_images, recipe_for
from pipeline.data.index import ShardInfo, read_index, write_index
from pipeline.data.shards import verify_shard, write_shard
from pipeline.evaluation.pictures import to_unit
from pipeline.models.vqvae import VQVAE
from pipeline.training.checkpoint import load_model, model_sha256, read_about
from pipeline.training.distributed import make_accelerator
from pipeline.training.tracking import progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractCodes:
    """Config of the stage."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    checkpoint: Path
    """Run directory of train_vqvae.py, or its final/."""
    out: Path
    """Directory for the code shards."""
    flip: bool = False
    """Also encode the mirror image of every training image, as a second view for the prior."""
    batch_size: int = 128
    """Images per forward pass, in each process."""
    corrupt: CorruptConfig = CorruptConfig()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@torch.no_grad()
def encode(model: VQVAE, images: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """images (B, H, W, C) uint8 -> codes per level (B, h, w), coarse to fine."""
    levels = model.encode_codes(to_unit(images, device))
    return [codes.cpu().numpy().astype("<u2") for codes in levels]  # K is at most 65,536


def code_samples(
    images: ImageSet, numbers: range, model: VQVAE, config: ExtractCodes, flip: bool, device, bar
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a code shard, in the order of the image shard; flipped views last."""
    substitutes = {fault["number"]: fault["substitute"] for fault in images.faults}
    for mirrored in (False, True) if flip else (False,):
        for start in range(numbers.start, numbers.stop, config.batch_size):
            chosen = range(start, min(start + config.batch_size, numbers.stop))
            pixels = images[slice(chosen.start, chosen.stop)]
            if mirrored:
                pixels = pixels[:, :, ::-1].copy()
            levels = encode(model, pixels, device)
            for row, number in enumerate(chosen):
                key = bytes(images.keys[number]).decode() + ("_flip" if mirrored else "")
                about = images.describe(number)
                about["view"] = "flip" if mirrored else "original"
                if number in substitutes:
                    about["substitute"] = bytes(images.keys[substitutes[number]]).decode()
                members = {f"level{i}.npy": npy_bytes(grid[row]) for i, grid in enumerate(levels)}
                yield key, {**members, "json": json.dumps(about).encode()}
            bar.update(len(chosen))


def main(config: ExtractCodes) -> None:
    accelerator = make_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    index = read_index(config.data)
    model = load_model(config.checkpoint, "vqvae").to(accelerator.device)
    about = read_about(config.checkpoint)
    recipe = recipe_for(index.source, about["config"]["image_size"])
    if recipe.hash != about["recipe"]:
        raise stage.UserError(
            f"{config.data} is read by recipe {recipe.hash}, {config.checkpoint} was trained with "
            f"{about['recipe']}: use the shards it was trained on"
        )
    origin = {
        "checkpoint_sha256": model_sha256(config.checkpoint),
        "data_index_sha256": index.sha256,
        "recipe": recipe.hash,
        "image_size": recipe.size,
        "grids": [list(grid) for grid in model.config.grids(recipe.size, recipe.size)],
        "codebook_sizes": list(model.config.codebook_sizes),
        "views": ["original", "flip"] if config.flip else ["original"],
    }

    @functools.cache
    def images_of(split: str) -> ImageSet:
        return open_images(
            config.data, split, recipe.size, cache=False, corrupt=config.corrupt, progress=False
        )

    if config.corrupt.substitutes:
        with accelerator.main_process_first():
            faults = {split: images_of(split).faults for split in index.splits}
        corruption.write_list(config, **faults)
        origin["substituted"] = {split: len(found) for split, found in faults.items()}
    note = config.out / "origin.json"
    if note.is_file() and json.loads(note.read_text()) != origin:
        raise stage.UserError(
            f"{config.out} holds codes of another checkpoint, data or config; "
            "delete it or choose another --out"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        stage.remove_leftovers(config.out)
        stage.write_json(note, origin)
    accelerator.wait_for_everyone()

    plan = [(split, shard) for split in index.splits for shard in index.shards(split)]
    mine = plan[rank::world]
    views = {split: 1 + (config.flip and split == "train") for split in index.splits}
    total = sum(shard.num_samples * views[split] for split, shard in mine)
    first = {}  # number of a shard's first sample in its split
    for split in index.splits:
        sizes = [shard.num_samples for shard in index.shards(split)]
        starts = itertools.accumulate(sizes, initial=0)
        first |= dict(zip((shard.name for shard in index.shards(split)), starts, strict=False))
    bar = progress_bar(total, "codes", disable=not accelerator.is_main_process)
    for split, shard in mine:
        path, done = config.out / shard.name, config.out / f".{shard.name}.json"
        if done.is_file() and verify_shard(path, ShardInfo(**json.loads(done.read_text()))):
            bar.update(shard.num_samples * views[split])
            continue
        numbers = range(first[shard.name], first[shard.name] + shard.num_samples)
        samples = code_samples(
            images_of(split), numbers, model, config, views[split] == 2, accelerator.device, bar
        )
        stage.write_json(done, dataclasses.asdict(write_shard(path, samples)))
    bar.close()
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        splits = {
            split: tuple(
                ShardInfo(**json.loads((config.out / f".{shard.name}.json").read_text()))
                for shard in index.shards(split)
            )
            for split in index.splits
        }
        for split, shards in splits.items():
            expected = index.num_samples(split) * views[split]
            if sum(shard.num_samples for shard in shards) != expected:
                raise RuntimeError(f"{split}: not exactly {expected} ids x views; this is a bug")
        write_index(config.out, dataclasses.replace(index, splits=splits, codes=origin))
        counts = [f"{split} {index.num_samples(split) * views[split]:,}" for split in splits]
        print(f"{config.out}: samples {', '.join(counts)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    stage.run(ExtractCodes, main, __doc__)
