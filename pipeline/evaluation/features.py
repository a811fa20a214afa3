"""Features of images by number: in chunks, by several processes, and kept on the disk.

    real = Choice(ShardImages(open_images(shards, "valid", 64)), chosen)
    extract(real, [judge], Path("runs/demo/features"), "real")["judge"]["features"]    # (N, F)

    <directory>/<key>/000000100.safetensors    numbers (n,) int64, and (n, F) float32 of each layer
    <directory>/<key>/protocol.json            what the key is the SHA-256 of

The key is of all that decides the features: what decides the pixels (`images.protocol`), the
extractor's weights and layers, and the version of the arithmetic here. So a killed run goes on
where it was, and the features of reference images, once there, serve all later evaluations.
torch-fidelity's own cache is left alone on purpose: it files features under a name that the caller
thinks of, and would return the old ones for images of another crop, split or checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.data.shards import sync
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.fidelity import with_channels
from pipeline.evaluation.sets import BATCH_SIZE, Images
from pipeline.failpoint import failpoint
from pipeline.models.blocks import true_fp32
from pipeline.stage import UserError, remove_leftovers, write_json
from pipeline.training.collectives import all_reduce_sum, alone
from pipeline.training.tracking import progress_bar

VERSION = 1  # to be raised with every change that alters a feature
CHUNK = 100  # images per file, whatever the batch size and the number of processes
LEFTOVER_SEC = 3600.0  # after which nobody else is still writing a file

Features = dict[str, torch.Tensor]  # layer -> (N, F) float32 on the CPU


def protocol_of(images: Images, extractor: Extractor) -> dict[str, Any]:
    """All that decides the features of a set, as JSON."""
    return {
        "version": VERSION,
        "chunk": CHUNK,
        "images": images.protocol,
        "num_images": len(images),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "layers": list(extractor.module.get_requested_features_list()),
    }


@torch.no_grad()
def extract(
    images: Images,
    extractors: Sequence[Extractor],
    directory: Path,
    description: str,
    *,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Features]:
    """Features of all images: extractor name -> layer -> (N, F) float32, in order, on the CPU.

    To be called by all processes; the chunks that are not there yet are dealt out among them, and
    an image is made once for all extractors that lack it. What is there is not made again, and with
    nothing to do `images` is not asked for a single one.

    Args:
        directory: one for many sets, on a disk that all processes see.
        description: of the set, for messages.
        batch_size: images in one forward pass.

    Returns {} on all processes but the first. Raises UserError for features that are not finite.
    """
    rank, world = (0, 1) if alone() else (dist.get_rank(), dist.get_world_size())
    folders = {extractor.name: _folder(images, extractor, directory) for extractor in extractors}
    lacking = _find_lacking(images, extractors, folders, description, rank)
    mine = [np.arange(start, min(start + CHUNK, len(images))) for start in lacking][rank::world]
    batches = [np.split(chunk, range(batch_size, len(chunk), batch_size)) for chunk in mine]
    pixels = _made_ahead(images, [numbers for chunk in batches for numbers in chunk])
    quiet = rank > 0 or not mine
    with (
        progress_bar(sum(map(len, mine)), description, disable=quiet) as bar,
        true_fp32(),
    ):
        for chunk, parts in zip(mine, batches, strict=True):
            start = int(chunk[0])
            made = {extractor.name: [] for extractor in lacking[start]}
            for numbers in parts:
                batch = next(pixels)
                for extractor in lacking[start]:
                    found = _features(batch, extractor)
                    _refuse_not_finite(found, numbers, extractor.name, description)
                    made[extractor.name].append(found)
                bar.update(len(numbers))
            for name, found in made.items():
                layers = {layer: torch.cat([part[layer] for part in found]) for layer in found[0]}
                _write(_path(folders[name], start), chunk, layers)
    if not alone():
        dist.barrier()
    if rank > 0:
        return {}
    found = {}
    for extractor in extractors:
        folder = folders[extractor.name]
        layers = assemble(map(_read, sorted(folder.glob("*.safetensors"))), len(images), folder)
        # in the extractor's order: distances are of the first
        names = extractor.module.get_requested_features_list()
        found[extractor.name] = {layer: layers[layer] for layer in names}
    return found


def _folder(images: Images, extractor: Extractor, directory: Path) -> Path:
    text = json.dumps(protocol_of(images, extractor), sort_keys=True)
    return directory / hashlib.sha256(text.encode()).hexdigest()[:16]


def _find_lacking(
    images: Images, extractors: Sequence[Extractor], folders: Mapping[str, Path], description: str,
    rank: int,
) -> dict[int, list[Extractor]]:  # fmt: skip
    """First number of each chunk with something to do -> the extractors that have not seen it.

    The first process looks for all, because a disk may show others something else.
    """
    starts = range(0, len(images), CHUNK)
    lacks = torch.zeros(len(extractors), len(starts), device=extractors[0].device)
    for row, extractor in zip(lacks, extractors if rank == 0 else (), strict=False):
        folder = folders[extractor.name]
        row += torch.tensor(
            [_is_lacking(_path(folder, start)) for start in starts], device=row.device
        )
        if row.any():
            remove_leftovers(folder, older_than_sec=LEFTOVER_SEC)
            write_json(folder / "protocol.json", protocol_of(images, extractor))
        else:
            print(f"{description}: {extractor.name} features are there already, in {folder}")
    all_reduce_sum(lacks)
    found = {
        start: [extractor for extractor, lack in zip(extractors, column, strict=True) if lack]
        for start, column in zip(starts, lacks.T.tolist(), strict=True)
    }
    return {start: those for start, those in found.items() if those}


def _made_ahead(images: Images, batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The images of each batch of numbers; the next ones are made while these are looked at."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(images.__getitem__, numbers) for numbers in batches[:1]]
        for numbers, following in zip(batches, [*batches[1:], None], strict=True):
            found = coming.pop().result()
            if following is not None:
                coming.append(pool.submit(images.__getitem__, following))
            if len(found) != len(numbers):
                raise RuntimeError(f"{len(found)} images for {len(numbers)} numbers; this is a bug")
            yield found


def _features(batch: np.ndarray, extractor: Extractor) -> Features:
    """Of a batch (B, H, W, C) uint8."""
    pixels = torch.from_numpy(with_channels(batch, extractor)).to(extractor.device)
    found = extractor.module(pixels.permute(0, 3, 1, 2))
    layers = extractor.module.get_requested_features_list()
    return {layer: f.float().cpu() for layer, f in zip(layers, found, strict=True)}


def _refuse_not_finite(features: Features, numbers: np.ndarray, name: str, images: str) -> None:
    for values in features.values():
        finite = values.isfinite().all(1)
        if not finite.all():
            first = numbers[int(finite.int().argmin())]
            raise UserError(
                f"{images}: the {name} features of image {first} are not finite; look at that "
                "image, and give other weights if it is like the others"
            )


# Chunks on the disk.


def _path(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.safetensors"


def _is_lacking(path: Path) -> bool:
    """True for a chunk that is not there, or damaged, which is said."""
    if not path.exists():
        return True
    try:
        _read(path)
    except UserError:
        print(f"warning: {path} is damaged, so its images are looked at again")
        return True
    return False


def _sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, numbers: np.ndarray, layers: Features) -> None:
    """Atomically: under its name a chunk is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"numbers": torch.from_numpy(numbers), **layers}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, {"sha256": _sha256(tensors)})
    sync(temporary)
    failpoint("commit")
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """`numbers` and the layers; UserError for a chunk that is not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it") from error
    if _sha256(tensors) != written:
        raise UserError(f"{path} does not match its SHA-256; delete it")
    return tensors


def assemble(chunks: Iterable[Mapping[str, torch.Tensor]], total: int, where: Path) -> Features:
    """Layer -> (total, F) of chunks with their `numbers` (n,), in any order.

    Raises UserError unless each number in [0, total) is there exactly once.
    """
    counts, features = torch.zeros(total, dtype=torch.int64), {}
    for chunk in chunks:
        numbers = chunk["numbers"]
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < total:
            raise UserError(f"{where} has image {int(numbers.max())} of {total}; delete it")
        counts += numbers.bincount(minlength=total)
        for layer in chunk.keys() - {"numbers"}:
            values = chunk[layer]
            if layer not in features:
                features[layer] = values.new_empty(total, *values.shape[1:])
            features[layer][numbers] = values
    if (counts != 1).any():
        first = int((counts != 1).int().argmax())
        raise UserError(
            f"{where} has image {first} {int(counts[first])} times, expected once; delete it"
        )
    return features
