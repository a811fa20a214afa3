"""Trains a VQ-VAE (one level) or a hierarchical VQ-VAE-2 (two or more) on image shards.

    python pipeline/train_vqvae.py --config configs/demo/train_vqvae.yaml \\
        --data runs/demo/shards --out runs/demo/vqvae
    accelerate launch --config_file configs/accelerate/gpu.yaml pipeline/train_vqvae.py \\
        --config configs/celeba64/train_vqvae.yaml \\
        --data runs/celeba64/shards --out runs/celeba64/vqvae
    torchrun --nproc_per_node 2 pipeline/train_vqvae.py ...      two CPU processes, or two GPUs
    python pipeline/train_vqvae.py ... --dry_run true            parameters, memory, disk, time

Started again with the same --out it resumes from its newest checkpoint. Precision and the number
of processes belong to the launcher (ACCELERATE_MIXED_PRECISION=bf16, configs/accelerate).
"""

import dataclasses
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator

from pipeline import stage
from pipeline.data.images import ImageSet, open_images, pixel_variance
from pipeline.data.loader import training_batches
from pipeline.evaluation import pictures
from pipeline.models.quantizer import commit, usage
from pipeline.models.vqvae import VQVAE, VQVAEConfig, loss
from pipeline.training import distributed
from pipeline.training.checkpoint import (
    Checkpoints,
    restore_training,
    save_model,
    training_tensors,
)
from pipeline.training.dry_run import report_dry_run
from pipeline.training.schedule import Schedule, is_due, learning_rate
from pipeline.training.tracking import MeanMetrics, Tracker
from pipeline.training.weight_average import WeightAverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVQVAE:
    """Config of the stage. The clock of a run is images seen."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    out: Path
    """Run directory: checkpoints/, final/, metrics.jsonl, tensorboard/."""
    image_size: int = 64
    """Side of the square images in pixels."""
    model: VQVAEConfig = VQVAEConfig()
    beta: float = 0.25
    """Weight of the commitment loss."""
    total_images: int = 160_000
    """Length of the run in images."""
    batch_size: int = 128
    """Global batch, over all processes."""
    learning_rate: float = 3e-4
    """Peak learning rate of Adam."""
    schedule: Schedule = "cosine"
    """After the warm-up: constant, or a cosine down to 0."""
    warmup_images: int = 2_000
    """Length of the linear warm-up."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    average_halflife: int = 10_000
    """Half-life of the weight average in images; 0 = no average."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    log_every: int = 2_000
    """Images between lines in the metrics."""
    validate_every: int = 40_000
    """Images between validations (and reconstruction grids)."""
    save_every: int = 40_000
    """Images between checkpoints."""
    workers: int = 0
    """Loader processes; 0 is fastest with the cache."""
    cache: bool = True
    """Decode the shards once into a uint8 cache beside them; false = decode every time."""
    dry_run: bool = False
    """Print parameters, memory, disk and the time to the end, from ten steps, and stop."""

    def __post_init__(self) -> None:
        for name in ("image_size", "total_images", "batch_size", "learning_rate", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self.model.grids(self.image_size, self.image_size)


@torch.no_grad()
def validate(
    model: VQVAE, images: ImageSet, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Validation figures over the whole split, each image once, whatever the number of ranks."""
    rank, world = accelerator.process_index, accelerator.num_processes
    part = range(len(images))[distributed.rank_slice(len(images), rank, world)]
    sizes = model.config.codebook_sizes
    # squared error and PSNR summed over images, then the code counts of all levels
    sums = torch.zeros(2 + sum(sizes), dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(part), batch_size):
        indices = part[start : start + batch_size]
        batch = pictures.to_unit(images[slice(indices[0], indices[-1] + 1)], accelerator.device)
        output = model(batch)
        mse = (output.reconstructions.clamp(0, 1) - batch).square().mean((1, 2, 3)).double()
        sums[0] += mse.sum()
        sums[1] += (-10 * mse.clamp(min=1e-10).log10()).sum()
        counts = [
            codes.flatten().bincount(minlength=size)
            for codes, size in zip(output.codes, sizes, strict=True)
        ]
        sums[2:] += torch.cat(counts)
    distributed.all_reduce_sum(sums)
    values = {
        "validation/mse": float(sums[0]) / len(images),
        "validation/psnr": float(sums[1]) / len(images),
    }
    for level, counts in enumerate(sums[2:].cpu().split(sizes)):
        perplexity, _, used = usage(counts)
        values[f"validation/level{level}/perplexity"] = perplexity
        values[f"validation/level{level}/codes_used"] = used
    return values


@torch.no_grad()
def reconstruction_grid(model: VQVAE, images: ImageSet, device: torch.device, count: int = 16):
    """The first `count` validation images above their reconstructions, (H', W', 3) uint8."""
    originals = images[slice(0, count)]
    reconstructions = model(pictures.to_unit(originals, device)).reconstructions
    return pictures.pairs(originals, pictures.to_uint8(reconstructions), columns=8)


def train_step(model, optimizer, images, config: TrainVQVAE, variance: float, accelerator):
    """One optimizer step and one codebook commit. Returns the metrics as scalar tensors, and the
    codes per level."""
    output = model(images)
    total, mse = loss(output, images, variance, config.beta)
    optimizer.zero_grad()
    accelerator.backward(total)
    norm = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
    distributed.check_finite(norm)
    optimizer.step()
    commit(
        distributed.unwrap(accelerator, model).quantizers,
        config.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        distributed.all_reduce_sum if accelerator.num_processes > 1 else None,
    )
    metrics = {
        "loss/total": total,
        "loss/reconstruction": mse,
        "loss/commitment": torch.stack(output.commitments).sum(),
        "gradient/norm": norm,
    }
    return {name: value.detach() for name, value in metrics.items()}, output.codes


def codebook_metrics(counts: list[torch.Tensor]) -> dict[str, float]:
    """Use of the codes since the last report, from this rank's counts (K,) per level; collective,
    and starts a new window."""
    values = {}
    for level, level_counts in enumerate(counts):
        distributed.all_reduce_sum(level_counts)
        perplexity, unused, _ = usage(level_counts.cpu())
        values[f"codebook/level{level}/perplexity"] = perplexity
        values[f"codebook/level{level}/unused_fraction"] = unused
        level_counts.zero_()
    return values


def main(config: TrainVQVAE) -> int:
    accelerator = distributed.make_accelerator()
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    distributed.check_global_batch(config.batch_size, world)

    # Data: rank 0 fills the cache, the others wait for it.
    with accelerator.main_process_first():
        train = open_images(config.data, "train", config.image_size, cache=config.cache)
        valid = open_images(config.data, "valid", config.image_size, cache=config.cache)
    if train.recipe.channels != config.model.in_channels:
        raise stage.UserError(
            f"{config.data} has images of {train.recipe.channels} channels; "
            f"set --model.in_channels {train.recipe.channels}"
        )
    variance = pixel_variance(train)

    # Model, average, optimizer.
    torch.manual_seed(config.seed)
    model = VQVAE(config.model).to(device).to(memory_format=torch.channels_last)
    average = WeightAverage(model, config.average_halflife)
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    trained, optimizer = accelerator.prepare(model, adam)
    if config.dry_run:
        batch = pictures.to_unit(train[slice(0, config.batch_size // world)], device)
        report_dry_run(
            lambda: train_step(trained, optimizer, batch, config, variance, accelerator),
            model, config.batch_size, config.total_images, config.save_every, accelerator,
        )  # fmt: skip
        return 0

    # Resume from the newest checkpoint that verifies.
    checkpoints, images_seen = Checkpoints(config.out), 0
    resolved = stage.to_dict(config)
    if checkpoint := checkpoints.newest():
        images_seen = restore_training(
            checkpoint, resolved, train.index.sha256, model, average.model, adam
        )
    accelerator.wait_for_everyone()

    def save() -> None:
        if accelerator.is_main_process:
            state = {
                "config": resolved,
                "data_sha256": train.index.sha256,
                **stage.provenance(),
            }
            checkpoints.save(images_seen, training_tensors(model, average.model, adam), state)
        accelerator.wait_for_everyone()

    if checkpoint is None:
        save()  # the untrained state, so that an early death loses nothing
    if accelerator.is_main_process:
        where = f"resuming at {images_seen:,} images" if images_seen else "starting anew"
        print(f"{config.out}: {where}; {len(train):,} training images, variance {variance:.5f}")

    tracker = Tracker(
        config.out, "vqvae", config.total_images, images_seen, accelerator.is_main_process
    )
    batches = training_batches(
        train.fetch, len(train), batch_size=config.batch_size, seed=config.seed,
        start=images_seen, rank=rank, world_size=world, workers=config.workers,
    )  # fmt: skip
    means, validation = MeanMetrics(), {}
    counts = [torch.zeros(size, device=device) for size in config.model.codebook_sizes]
    trained.train()
    while images_seen < config.total_images:
        # Step.
        rate = learning_rate(
            images_seen, config.learning_rate, config.schedule,
            config.warmup_images, config.total_images,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = pictures.to_unit(next(batches)["images"], device)
        metrics, codes = train_step(trained, optimizer, batch, config, variance, accelerator)
        before, images_seen = images_seen, images_seen + config.batch_size
        average.update(model, config.batch_size, images_seen)
        means.add(metrics)
        for level_counts, level_codes in zip(counts, codes, strict=True):
            level_counts += level_codes.flatten().bincount(minlength=len(level_counts))
        tracker.advance(config.batch_size)

        # Report, validate, save.
        ends = images_seen >= config.total_images
        saves = ends or is_due(config.save_every, before, images_seen)
        logs = saves or is_due(config.log_every, before, images_seen)
        validates = ends or is_due(config.validate_every, before, images_seen)
        if logs:
            values = means.values(world) | codebook_metrics(counts)
            values["schedule/learning_rate"] = rate
            if tracker.enabled:
                values["throughput/images_per_sec"] = tracker.images_per_sec(images_seen)
            tracker.log(images_seen, values)
            tracker.show(mse=values["loss/reconstruction"], loss=values["loss/total"])
        if validates:
            validation = validate(average.model, valid, config.batch_size, accelerator)
            tracker.log(images_seen, validation)
            if tracker.enabled:
                grid = reconstruction_grid(average.model, valid, device)
                tracker.image(images_seen, "reconstructions", grid)
                pictures.save_png(grid, config.out / "reconstructions.png", scale=2)
        if saves:
            save()
        if logs or validates:
            tracker.restart_clock(images_seen)

    tracker.close()
    if not validation:  # an earlier run reached the end, but not this line
        validation = validate(average.model, valid, config.batch_size, accelerator)
    if accelerator.is_main_process:
        about = {
            "config": resolved,
            "images_seen": images_seen,
            "validation": validation,
            "data_variance": variance,
            "data_index_sha256": train.index.sha256,
            "recipe": train.recipe.hash,
            **stage.provenance(),
        }
        save_model(config.out, "vqvae", average.model, about)
        print(f"{config.out / 'final'}: validation MSE {validation['validation/mse']:.5f}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return images_seen


if __name__ == "__main__":
    stage.run(TrainVQVAE, main, __doc__)
