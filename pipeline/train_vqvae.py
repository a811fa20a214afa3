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
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from accelerate import Accelerator

from pipeline import stage
from pipeline.data import corruption
from pipeline.data.corruption import CorruptConfig
from pipeline.data.images import ImageSet, open_for_training, pixel_variance
from pipeline.data.loader import training_batches
from pipeline.evaluation import model_card, pictures
from pipeline.models.quantizers import usage
from pipeline.models.vqvae import VQVAE, VQVAEConfig, loss
from pipeline.training import distributed, projector, scoring, zero
from pipeline.training.checkpoint import save_model
from pipeline.training.codebooks import (
    Codebooks,
    CodebookUse,
    Part,
    num_start_images,
    start_codebooks,
)
from pipeline.training.collectives import all_reduce_sum, rank_slice
from pipeline.training.dry_run import report_dry_run
from pipeline.training.run import Run
from pipeline.training.schedule import Schedule
from pipeline.training.steps import Steps
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
    """Global batch, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per step: less memory, the same result."""
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
    level_dropout: float = 0.0
    """Share of the images whose decoder sees only some of the levels, from the coarsest on, so
    that the finest does not take everything."""
    revival_rest: float = 0.0625
    """Last part of the run, as a share of it, in which no dead code starts anew: codes settle."""
    max_skipped_steps: int = 10
    """So many steps in a row, skipped because a loss or gradient was not finite, end the run."""
    compile: bool = False
    """Compile the model (torch.compile): minutes at the start, faster steps."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    log_every: int = 2_000
    """Images between lines in the metrics."""
    validate_every: int = 40_000
    """Images between validations (and reconstruction grids)."""
    save_every: int = 40_000
    """Images between checkpoints."""
    score_every: int = 0
    """Images between scores of reconstructions against validation images; 0 = never. They are
    figures of a run's progress: few images, so not those of evaluate.py."""
    score_images: int = 500
    """Images that are scored, at most as many as the validation split has."""
    judge: Path | None = None
    """Run directory of train_classifier.py on whose features the scores are; None = Inception's,
    where torch.hub has its published weights."""
    compare_every: int = 20_000
    """Images between comparisons of the ranks' codebooks, which have to be the same; before every
    checkpoint besides."""
    workers: int = 0
    """Loader processes; 0 is fastest with the cache."""
    cache: bool = True
    """Decode the shards once into a uint8 cache beside them; false = decode every time."""
    corrupt: CorruptConfig = CorruptConfig()
    dry_run: bool = False
    """Print parameters, memory, disk and the time to the end, from ten steps, and stop."""

    def __post_init__(self) -> None:
        for name in ("image_size", "total_images", "batch_size", "learning_rate", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("accumulation", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("level_dropout", "revival_rest"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        scoring.check_config(self)
        self.model.grids(self.image_size, self.image_size)


@torch.no_grad()
def validate(
    model: VQVAE, images: ImageSet, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Validation figures over the whole split, each image once, whatever the number of ranks."""
    rank, world = accelerator.process_index, accelerator.num_processes
    part = range(len(images))[rank_slice(len(images), rank, world)]
    sizes = model.config.codebook_sizes
    sums: list[torch.Tensor | float] = [0.0] * (2 + 2 * len(sizes))
    for start in range(0, len(part), batch_size):
        indices = part[start : start + batch_size]
        batch = pictures.to_unit(images[slice(indices[0], indices[-1] + 1)], accelerator.device)
        output = model(batch)
        mse = (output.reconstructions.clamp(0, 1) - batch).square().mean((1, 2, 3)).double()
        found = [mse.sum(), (-10 * mse.clamp(min=1e-10).log10()).sum()]
        for level, size in zip(output.levels, sizes, strict=True):
            vectors = level.vectors.flatten(0, 2).double()
            # squared error, squared vectors, vectors: what E|z - q|^2 / Var z is made of
            moments = [level.error.double() * vectors.numel(), vectors.square().sum()]
            found.append(torch.cat([torch.stack(moments), vectors.sum(0)]))
            found.append(level.codes.flatten().bincount(minlength=size).double())
        sums = [total + value for total, value in zip(sums, found, strict=True)]
    tensors = [torch.as_tensor(value) for value in sums]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    all_reduce_sum(flat)
    squared_error, psnr, *levels = flat.cpu().split([tensor.numel() for tensor in tensors])
    values = {
        "validation/mse": float(squared_error) / len(images),
        "validation/psnr": float(psnr) / len(images),
    }
    for level, (moments, counts) in enumerate(zip(levels[::2], levels[1::2], strict=True)):
        perplexity, _, used = usage(counts)
        error, squares, mean = moments[0], moments[1], moments[2:] / counts.sum()
        variance = squares / counts.sum() - mean.square().sum()
        values[f"validation/level{level}/perplexity"] = perplexity
        values[f"validation/level{level}/codes_used"] = used
        values[f"validation/level{level}/relative_error"] = float(error / counts.sum() / variance)
    return values


@torch.no_grad()
def reconstruction_grid(model: VQVAE, images: ImageSet, device: torch.device, count: int = 16):
    """The first `count` validation images above their reconstructions, (H', W', 3) uint8."""
    originals = images[slice(0, count)]
    reconstructions = model(pictures.to_unit(originals, device)).reconstructions
    return pictures.pairs(originals, pictures.to_uint8(reconstructions), columns=8)


def reconstructions(
    model: VQVAE, images: ImageSet, numbers: np.ndarray, device: torch.device
) -> scoring.Make:
    """Makes the reconstructions of the images `numbers` (N,)."""

    def make(where: slice) -> np.ndarray:
        batch = pictures.to_unit(images[numbers[where]], device)
        return pictures.to_uint8(model(batch).reconstructions)

    return make


def levels_kept(
    config: TrainVQVAE, images_seen: int, part: slice, device: torch.device
) -> torch.Tensor | None:
    """How many levels the decoder sees of each image of this rank (b,), from the coarsest on.

    Drawn for the whole global batch at `images_seen`, so it does not depend on the number of ranks.
    """
    levels = config.model.num_levels
    if config.level_dropout == 0 or levels == 1:
        return None
    generator = np.random.Generator(np.random.Philox(key=[config.seed, images_seen]))
    dropped = generator.random(config.batch_size) < config.level_dropout
    fewer = generator.integers(1, levels, config.batch_size)
    kept = torch.from_numpy(np.where(dropped, fewer, levels)[part])
    if device.type == "cuda":
        kept = kept.pin_memory()  # else the copy waits for the step before
    return kept.to(device, non_blocking=True)


def train_step(
    steps: Steps,
    codebooks: Codebooks,
    batch: Part,
    config: TrainVQVAE,
    variance: float,
    images_seen: int,
    revive: bool = True,
):
    """One optimizer step and one commit of the codebooks, over this rank's part of the global batch
    at `images_seen`. Returns the metrics as scalar tensors, the codes per level, and how many codes
    started anew per level; or None where all ranks skipped the step."""
    images, first_image = batch
    part = slice(first_image, first_image + len(images))
    kept = levels_kept(config, images_seen, part, images.device)
    metrics: dict[str, torch.Tensor] = {}
    codes: list[list[torch.Tensor]] = []

    def losses():
        size = len(images) // config.accumulation
        for start in range(0, len(images), size):
            some = slice(start, start + size)
            output = steps.model(images[some], None if kept is None else kept[some])
            total, mse = loss(output, images[some], variance, config.beta)
            codebooks.observe(output.levels, first_image + start, images_seen)
            codes.append(output.codes)
            commitment = torch.stack([level.commitment for level in output.levels]).sum()
            for name, value in (
                ("total", total),
                ("reconstruction", mse),
                ("commitment", commitment),
            ):
                mean = value.detach() / config.accumulation
                metrics[f"loss/{name}"] = metrics.get(f"loss/{name}", 0) + mean
            yield total

    norm = steps.take(losses(), codebooks.start_reduction)
    if norm is None:
        codebooks.discard()
        return None
    revived = codebooks.commit(revive)
    metrics["gradient/norm"] = norm
    return metrics, [torch.cat(level) for level in zip(*codes, strict=True)], revived


def place_codes(model: VQVAE, config: TrainVQVAE, batches, accelerator: Accelerator) -> None:
    """Starts the codebooks by k-means over as many of the first batches as that takes."""
    grids = config.model.grids(config.image_size, config.image_size)
    images = num_start_images(model.quantizers, [h * w for h, w in grids])
    count = -(-images // config.batch_size)
    parts = [
        Part(part.images, number * config.batch_size + part.first_image)
        for number, part in zip(range(count), batches, strict=False)
    ]
    with zero.autocast(accelerator):
        start_codebooks(model, parts, config.batch_size)


def main(config: TrainVQVAE) -> int:
    accelerator = distributed.make_accelerator(config.accumulation)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    distributed.check_global_batch(config.batch_size, world, config.accumulation)
    first_image = config.batch_size * rank // world

    # Data: rank 0 fills the cache, the others wait for it.
    with accelerator.main_process_first():
        train, valid = open_for_training(config)
    if train.recipe.channels != config.model.in_channels:
        raise stage.UserError(
            f"{config.data} has images of {train.recipe.channels} channels; "
            f"set --model.in_channels {train.recipe.channels}"
        )
    if len(valid) < world:
        raise stage.UserError(
            f"{config.data} has {len(valid)} validation images, fewer than the {world} processes"
        )
    variance = pixel_variance(train)

    # Model, average, optimizer.
    torch.manual_seed(config.seed)
    model = VQVAE(config.model).to(device).to(memory_format=torch.channels_last)
    average = WeightAverage(model, config.average_halflife)
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    if config.compile:
        model.compile()
    if zero.is_zero(accelerator):
        zero.configure(
            accelerator,
            model,
            config.batch_size // world // config.accumulation,
            config.gradient_clip,
        )
    trained, optimizer = accelerator.prepare(model, adam)
    steps = Steps(accelerator, trained, optimizer, config.gradient_clip, config.max_skipped_steps)
    codebooks = Codebooks(
        model.quantizers, config.batch_size, overlap=not zero.is_zero(accelerator)
    )
    if config.dry_run:
        images = pictures.to_unit(train[slice(0, config.batch_size // world)], device)
        batch = Part(images, first_image)
        report_dry_run(
            lambda: train_step(steps, codebooks, batch, config, variance, 0),
            model, config.batch_size, config.total_images, config.save_every, accelerator,
        )  # fmt: skip
        return 0

    def batches_from(images_seen: int) -> Iterator[Part]:
        """This rank's parts of the global batches from there on."""
        batches = training_batches(
            train.fetch, len(train), batch_size=config.batch_size, seed=config.seed,
            start=images_seen, rank=rank, world_size=world, workers=config.workers,
        )  # fmt: skip
        return (Part(pictures.to_unit(batch["images"], device), first_image) for batch in batches)

    scorer, sets = None, {}
    if config.score_every and (scorer := scoring.make_scorer(config, valid, accelerator)):
        sets["reconstructions"] = reconstructions(average.model, valid, scorer.numbers, device)

    run = Run(config, model, average, steps, train.index.sha256, before_save=codebooks.check_equal)
    if not run.resume():
        place_codes(model, config, batches_from(0), accelerator)
        average.model.load_state_dict(model.state_dict())
    run.start("vqvae", f"{len(train):,} training images, variance {variance:.5f}")
    corruption.write_list(config, train=train.faults, valid=valid.faults)
    run.tracker.introduce(run.images_seen, "vqvae", config, scorer and scorer.protocol)

    batches, validation = batches_from(run.images_seen), {}
    use = CodebookUse(config.model.codebook_sizes, device)
    while run.images_seen < config.total_images:
        run.start_step()
        revive = run.images_seen < config.total_images * (1 - config.revival_rest)
        found = train_step(
            steps, codebooks, next(batches), config, variance, run.images_seen, revive
        )
        metrics = None
        if found is not None:
            metrics, codes, revived = found
            use.add(codes, revived)
        due = run.end_step(metrics)

        # Report, validate, save.
        if run.is_due(config.compare_every):
            codebooks.check_equal()
        if due.logs:
            values = run.means.values(world) | use.values()
            values |= corruption.figures(config, train.corrupt, len(train), run.images_seen)
            run.log(values)
            run.tracker.show(mse=values["loss/reconstruction"], loss=values["loss/total"])
        if due.validates:
            validation = validate(average.model, valid, config.batch_size, accelerator)
            run.tracker.log(run.images_seen, validation)
            if accelerator.is_main_process:
                grid = reconstruction_grid(average.model, valid, device)
                run.tracker.image(run.images_seen, "reconstructions", grid)
                pictures.save_png(grid, config.out / "reconstructions.png", scale=2)
        if scorer and scorer.is_due(run, due):
            scorer.score(run, sets)
        if due.saves:
            run.save()

    projector.write_codebooks(run.tracker, run.images_seen, average.model, valid)
    run.tracker.compare(run.images_seen, config)
    run.tracker.close()
    if not validation:  # an earlier run reached the end, but not this line
        validation = validate(average.model, valid, config.batch_size, accelerator)
    if accelerator.is_main_process:
        about = {
            "config": stage.to_dict(config),
            "images_seen": run.images_seen,
            "validation": validation,
            "data_variance": variance,
            "data": model_card.data_of(train.index, train.recipe),
            "data_index_sha256": train.index.sha256,
            "recipe": train.recipe.hash,
            **stage.provenance(),
        }
        save_model(config.out, "vqvae", average.model, about)
        print(f"{config.out / 'final'}: validation MSE {validation['validation/mse']:.5f}")
    return run.end()


if __name__ == "__main__":
    stage.run(TrainVQVAE, main, __doc__)
