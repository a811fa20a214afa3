"""Draws images: codes level by level, coarse to fine, from the priors, then the decoder.

    python pipeline/sample_prior.py --checkpoint runs/demo/vqvae --out runs/demo/samples
    python pipeline/sample_prior.py --checkpoint runs/demo/vqvae --out runs/demo/smiling \\
        --attributes Smiling=1,Eyeglasses=0 --num_images 32 --temperature 0.9 --seed 7
    torchrun --nproc_per_node 2 pipeline/sample_prior.py ...      images are dealt to the processes

Writes <out>/images/000000.png ..., <out>/samples.png (a grid) and <out>/samples.json (how they were
made). Image n depends on the seed and n alone, not on the batch size or the number of processes.
A restart with the same options keeps the images that are there.
"""

import dataclasses
import json
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from pipeline import stage
from pipeline.evaluation import pictures
from pipeline.models.pixelcnn import PixelCNN
from pipeline.models.sampling import gumbel_noise, sample_codes
from pipeline.models.vqvae import VQVAE
from pipeline.training.checkpoint import final_directory, load_model, model_sha256, read_about
from pipeline.training.distributed import make_accelerator
from pipeline.training.tracking import progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplePrior:
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
    temperature: tuple[float, ...] = (1.0,)
    """Softmax temperature, one value or one per level, coarse to fine; below 1 = safer, duller."""
    attributes: str | None = None
    """Attributes to ask for, such as Smiling=1,Eyeglasses=0; the others are left open."""
    label: str | None = None
    """Class to ask for, by name or number."""
    seed: int = 0
    """Seed of the samples."""
    columns: int = 8
    """Columns of the grid."""
    tar: bool = False
    """Write <out>/images.tar in place of a folder (evaluate.py reads the folder)."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature or min(self.temperature) <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.attributes is not None:
            parse_attributes(self.attributes)


def parse_attributes(text: str) -> dict[str, int]:
    """`Smiling=1,Eyeglasses=0` -> {"Smiling": 1, "Eyeglasses": -1}."""
    wanted = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if not name or value not in ("0", "1"):
            raise ValueError(f"attributes must look like Smiling=1,Eyeglasses=0, got {part!r}")
        wanted[name] = 1 if value == "1" else -1
    return wanted


def attribute_vector(config: SamplePrior, names: list[str]) -> torch.Tensor:
    """(1, A) of -1, +1, and 0 for what was not asked for."""
    wanted = parse_attributes(config.attributes) if config.attributes else {}
    if unknown := sorted(set(wanted) - set(names)):
        raise stage.UserError(f"unknown attribute {unknown[0]}; known: {', '.join(names)}")
    return torch.tensor([[wanted.get(name, 0) for name in names]], dtype=torch.float32)


def label_number(config: SamplePrior, names: list[str]) -> torch.Tensor:
    """(1,) int64: the class asked for, or -1."""
    if config.label is None:
        return torch.tensor([-1])
    if config.label in names:
        return torch.tensor([names.index(config.label)])
    if config.label.isdigit() and int(config.label) < len(names):
        return torch.tensor([int(config.label)])
    raise stage.UserError(f"unknown class {config.label}; known: {', '.join(names) or 'none'}")


def prior_paths(config: SamplePrior, num_levels: int) -> list[Path]:
    """Directories of the priors, coarse to fine."""
    run = final_directory(config.checkpoint).resolve().parents[1]
    paths = config.priors or [run / f"prior-level{level}" for level in range(num_levels)]
    if len(paths) != num_levels:
        raise stage.UserError(f"--priors needs {num_levels} directories, got {len(paths)}")
    return paths


def load_priors(config: SamplePrior, paths: list[Path], device) -> list[tuple[PixelCNN, dict]]:
    """The priors, coarse to fine, each with the document beside it; refuses what does not fit."""
    priors, sha256 = [], model_sha256(config.checkpoint)
    for level, path in enumerate(paths):
        model, about = load_model(path, "pixelcnn"), read_about(path)
        if about["level"] != level:
            raise stage.UserError(f"{path} is a prior of level {about['level']}, needed {level}")
        if about["codes"]["checkpoint_sha256"] != sha256:
            raise stage.UserError(
                f"{path} was trained on codes of another checkpoint than {config.checkpoint}; "
                "extract codes with this checkpoint and train the prior on them"
            )
        priors.append((model.to(device), about))
    for given, needed in (("attributes", "num_attributes"), ("label", "num_classes")):
        if getattr(config, given) and not any(getattr(m.config, needed) for m, _ in priors):
            raise stage.UserError(f"the priors were not trained with {given}; leave --{given} out")
    return priors


@torch.no_grad()
def sample_images(
    vqvae: VQVAE,
    priors: list[tuple[PixelCNN, dict]],
    config: SamplePrior,
    images: list[int],
    device: torch.device,
    progress=None,
) -> np.ndarray:
    """Images number `images` of this config: (B, H, W, C) uint8."""
    temperatures = config.temperature
    if len(temperatures) == 1:
        temperatures = temperatures * len(priors)
    codes: list[torch.Tensor] = []
    for level, (model, about) in enumerate(priors):
        height, width = about["codes"]["grids"][level]
        attributes = attribute_vector(config, about["attribute_names"]).to(device)
        labels = label_number(config, about["class_names"]).to(device)
        condition = model.condition(
            len(images),
            (height, width),
            codes,
            labels.expand(len(images)) if model.config.num_classes else None,
            attributes.expand(len(images), -1) if model.config.num_attributes else None,
        )
        noise = gumbel_noise(
            config.seed, images, level, model.config.codebook_size, (height, width)
        )
        noise = torch.from_numpy(noise).to(device)
        codes.append(sample_codes(model, condition, noise, temperatures[level], progress))
    return pictures.to_uint8(vqvae.decode_codes(codes))


def write_tar(out: Path, paths: list[Path]) -> None:
    """Moves the PNGs into <out>/images.tar."""
    with tarfile.open(out / ".images.tar", "w") as tar:
        for path in paths:
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            with open(path, "rb") as file:
                tar.addfile(info, file)
    (out / ".images.tar").rename(out / "images.tar")
    for path in paths:
        path.unlink()
    paths[0].parent.rmdir()


def _advance(bar, batch_size: int, positions: int) -> None:
    bar.update(batch_size * positions)


def main(config: SamplePrior) -> None:
    accelerator = make_accelerator()
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    vqvae = load_model(config.checkpoint, "vqvae").to(device)
    paths = prior_paths(config, vqvae.config.num_levels)
    priors = load_priors(config, paths, device)
    if len(config.temperature) not in (1, len(priors)):
        raise stage.UserError(
            f"temperature needs one value, or one for each of {len(priors)} levels"
        )
    protocol = {
        "seed": config.seed,
        "temperature": list(config.temperature),
        "attributes": config.attributes,
        "label": config.label,
        "vqvae_sha256": model_sha256(config.checkpoint),
        "prior_sha256": [model_sha256(path) for path in paths],
        "file_format": "png",
        "recipe": read_about(config.checkpoint)["recipe"],
    }
    note = config.out / "samples.json"
    old = json.loads(note.read_text()) if note.is_file() else {}
    protocol["num_images"] = config.num_images
    if old and {key: old.get(key) for key in protocol} != protocol:
        raise stage.UserError(
            f"{config.out} holds samples made otherwise; delete it or choose another --out"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not old:
        stage.write_json(note, {**protocol, "provenance": stage.provenance()})

    files = [config.out / "images" / f"{image:06d}.png" for image in range(config.num_images)]
    done = config.tar and (config.out / "images.tar").is_file()
    missing = [] if done else [image for image, file in enumerate(files) if not file.is_file()]
    accelerator.wait_for_everyone()  # all ranks have looked before the first one writes
    mine = missing[rank::world]
    positions = sum(h * w for h, w in priors[0][1]["codes"]["grids"])
    bar = progress_bar(
        len(mine) * positions, "samples", unit="codes", disable=not accelerator.is_main_process
    )
    begun = time.perf_counter()
    for start in range(0, len(mine), config.batch_size):
        batch = mine[start : start + config.batch_size]
        advance = partial(_advance, bar, len(batch))
        images = sample_images(vqvae, priors, config, batch, device, advance)
        for image, pixels in zip(batch, images, strict=True):
            pictures.save_png(pixels, files[image])
    bar.close()
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        if missing:
            speed = len(missing) / (time.perf_counter() - begun)
            provenance = {"images_per_sec": speed, "provenance": stage.provenance()}
            stage.write_json(note, {**protocol, **provenance})
        if missing or not (config.out / "samples.png").is_file():
            shown = [
                np.array(Image.open(path)) for path in files[: config.columns * config.columns]
            ]
            grid = np.stack(shown).reshape(len(shown), *shown[0].shape[:2], -1)
            pictures.save_png(pictures.grid(grid, config.columns), config.out / "samples.png", 2)
        if config.tar and not done:
            write_tar(config.out, files)
        print(f"{config.out}: {config.num_images} images, grid in {config.out / 'samples.png'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    stage.run(SamplePrior, main, __doc__)
