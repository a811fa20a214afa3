"""Trains a baseline: AE, VAE, beta-VAE, CVAE, IWAE, flow posterior, PixelVAE, WAE and the like.

    python pipeline/train_vae.py --config configs/celeba64/train_vae_vae.yaml \\
        --data runs/celeba64/shards --out runs/celeba64/vae
    python pipeline/train_vae.py --config configs/mnist/train_vae_iwae.yaml \\
        --data runs/mnist/shards --out runs/mnist/iwae
    accelerate launch --config_file configs/accelerate/gpu.yaml pipeline/train_vae.py ...
    torchrun --nproc_per_node 2 pipeline/train_vae.py ...         two CPU processes, or two GPUs
    python pipeline/train_vae.py ... --dry_run true               parameters, memory, disk, time

All losses are in nats per image: sums over pixels and latent dimensions, means over images only,
constants included. Started again with the same --out it resumes from its newest checkpoint.
Figures and pictures of a trained model: report_vae.py; of several side by side: compare.py.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from accelerate import Accelerator

from pipeline import stage
from pipeline.data import corruption
from pipeline.data.binarize import binarize
from pipeline.data.corruption import CorruptConfig
from pipeline.data.images import ImageSet, open_for_training
from pipeline.data.loader import training_batches
from pipeline.evaluation import latent_pictures, model_card, pictures
from pipeline.evaluation.information import active_units
from pipeline.evaluation.vae_figures import Split, conditions
from pipeline.models.vae.objectives import Objective, check_objective
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.training import distributed, scoring, zero
from pipeline.training.checkpoint import save_model
from pipeline.training.collectives import all_reduce_sum, rank_slice
from pipeline.training.dry_run import report_dry_run
from pipeline.training.run import Run, step_seed
from pipeline.training.schedule import Schedule
from pipeline.training.steps import Steps
from pipeline.training.weight_average import WeightAverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVAE:
    """Config of the stage. The clock of a run is images seen."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    out: Path
    """Run directory: checkpoints/, final/, metrics.jsonl, tensorboard/."""
    image_size: int = 64
    """Side of the square images in pixels."""
    binarize: bool = False
    """Draw black and white pixels from the grey values, anew each time an image is seen."""
    condition: Literal["none", "class", "attributes"] = "none"
    """What encoder, decoder and prior are given: a CVAE."""
    model: VAEConfig = VAEConfig()
    """Parts and sizes; what the data determine (image size, channels, classes, attributes) is
    filled in."""
    objective: Objective = Objective()
    kl_warmup_images: int = 0
    """Images over which the weight of the KL grows linearly to beta; 0 = at once."""
    encoder_steps: int = 1
    """Steps of the encoder for each step of decoder and prior (aggressive inference, He et al.
    2019): in the others the learning rate of decoder and prior is 0."""
    aggressive_images: int = 0
    """First part of the run in which encoder_steps holds; after it, both step always."""
    total_images: int = 400_000
    """Length of the run in images."""
    batch_size: int = 64
    """Global batch, over all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    adam_epsilon: float = 1e-8
    """Epsilon of Adam."""
    schedule: Schedule = "cosine"
    """After the warm-up: constant, or a cosine down to 0."""
    warmup_images: int = 2_000
    """Length of the linear warm-up."""
    gradient_clip: float = 10_000.0
    """Largest global norm of the gradient, in nats: far above the usual, against outliers."""
    average_halflife: int = 10_000
    """Half-life of the weight average in images; 0 = no average."""
    seed: int = 0
    """Seed of the initial weights, the data order and the noise."""
    log_every: int = 2_000
    """Images between lines in the metrics."""
    validate_every: int = 40_000
    """Images between validations (and pictures)."""
    save_every: int = 40_000
    """Images between checkpoints."""
    score_every: int = 0
    """Images between scores of samples and reconstructions against validation images; 0 = never.
    They are figures of a run's progress: few images, so not those of evaluate.py."""
    score_images: int = 500
    """Images that are scored, at most as many as the validation split has."""
    judge: Path | None = None
    """Run directory of train_classifier.py on whose features the scores are; None = Inception's,
    where torch.hub has its published weights."""
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
        if self.encoder_steps < 1:
            raise ValueError(f"encoder_steps must be at least 1, got {self.encoder_steps}")
        if self.seed < 0 or self.kl_warmup_images < 0:
            raise ValueError("seed and kl_warmup_images must not be negative")
        if self.kl_warmup_images and (self.objective.name != "elbo" or not self.model.has_density):
            raise ValueError(
                "kl_warmup_images is for objective elbo, and not for an AE: it has no KL"
            )
        if (self.encoder_steps > 1) != (self.aggressive_images > 0):
            raise ValueError("encoder_steps above 1 and aggressive_images belong together")
        if self.model.prior == "learned" and self.condition == "none":
            raise ValueError("model.prior learned is p(z|y): set condition to class or attributes")
        check_objective(self.model, self.objective)
        scoring.check_config(self)


def model_config(config: TrainVAE, images: ImageSet) -> VAEConfig:
    """The model's config with what the data determine."""
    names = {"class": images.index.class_names, "attributes": images.index.attribute_names}
    if config.condition != "none" and not names[config.condition]:
        raise stage.UserError(f"{config.data} has no {config.condition} to condition on")
    if config.binarize and images.recipe.channels != 1:
        raise stage.UserError(f"{config.data} has colour images; binarize is for grey ones")
    try:
        found = dataclasses.replace(
            config.model,
            image_size=config.image_size,
            in_channels=images.recipe.channels,
            num_classes=len(names["class"]) if config.condition == "class" else 0,
            num_attributes=len(names["attributes"]) if config.condition == "attributes" else 0,
        )
        check_objective(found, config.objective)
    except ValueError as error:
        raise stage.UserError(str(error)) from error
    return found


def warmup_at(config: TrainVAE, trained_images: int) -> float:
    """The share of beta in force after so many images."""
    return min(1.0, trained_images / config.kl_warmup_images) if config.kl_warmup_images else 1.0


@torch.no_grad()
def validate(split: Split, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Validation figures over the whole split, one sample of z per image; nats per image."""
    model, device = split.model, accelerator.device
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(split.images)
    part = range(count)[rank_slice(count, rank, world)]
    torch.manual_seed(step_seed(0, 0, rank))
    sums: dict[str, torch.Tensor] = {}
    means = torch.zeros(count, model.config.vector_dim, device=device)
    one = torch.ones((), device=device)
    for start in range(part.start, part.stop, batch_size):
        where = slice(start, min(start + batch_size, part.stop))
        images, y = split.batch(where)
        found = model(images, y, Objective(), one)
        means[where] = model.posterior(images, y).mean
        if not model.config.context_layers:  # that would go pixel by pixel
            reconstructions = model.decode_mean(means[where], y).clamp(0, 1)
            found["mse"] = (reconstructions - images).square().mean()
        for name in ("reconstruction", "kl", "negative_elbo", "mse"):
            if name in found:
                sums[name] = sums.get(name, 0) + found[name].double() * len(images)
    flat = torch.stack(list(sums.values()))
    all_reduce_sum(flat)
    all_reduce_sum(means)
    values = dict(zip(sums, (flat / count).tolist(), strict=True))
    values["active_units"] = active_units(means)
    return {f"validation/{name}": value for name, value in values.items()}


def show_pictures(split: Split, run: Run) -> None:
    """Reconstructions, and samples as the decoder's means and as draws from p(x|z)."""
    images, y = split.batch(slice(0, min(16, len(split.images))))
    z = latent_pictures.prior_latents(split.model, y, seed=0)
    grids = {
        "reconstructions": latent_pictures.reconstructions(split.model, images, y),
        "samples": latent_pictures.samples(split.model, z, y, seed=0),
    }
    for name, grid in grids.items():
        run.tracker.image(run.images_seen, name, grid)
        pictures.save_png(grid, run.config.out / f"{name}.png")


@torch.no_grad()
def scored_sets(split: Split, numbers: np.ndarray) -> dict[str, scoring.Make]:
    """Samples of p(z|y) with the conditions of the images `numbers` (N,), and the reconstructions
    of these; both are means of p(x|z), as in compare.py."""
    model, y = split.model, conditions(split.model, split.images, numbers)
    z = latent_pictures.prior_latents(model, y, seed=0)

    def samples(where: slice) -> np.ndarray:
        return pictures.to_uint8(model.decode_mean(z[where], y[where]))

    def reconstructions(where: slice) -> np.ndarray:
        images = pictures.to_unit(split.images[numbers[where]], split.device)
        if split.binarized:
            images = binarize(images, numbers[where], seed=0)
        means = model.posterior(images, y[where]).mean
        return pictures.to_uint8(model.decode_mean(means, y[where]))

    return {"samples": samples, "reconstructions": reconstructions}


def main(config: TrainVAE) -> int:
    accelerator = distributed.make_accelerator()
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    distributed.check_global_batch(config.batch_size, world)
    if config.objective.mmd_weight and config.batch_size < 2 * world:
        raise stage.UserError(
            "mmd_weight compares images: at least 2 per process, see --batch_size"
        )
    if zero.is_zero(accelerator) and config.encoder_steps > 1:
        raise stage.UserError("encoder_steps needs two learning rates: start without DeepSpeed")

    # Data: rank 0 fills the cache, the others wait for it.
    with accelerator.main_process_first():
        train, valid = open_for_training(config)
    if len(valid) < world:
        raise stage.UserError(
            f"{config.data} has {len(valid)} validation images, fewer than the {world} processes"
        )

    # Model, average, optimizer.
    torch.manual_seed(config.seed)
    model = VAE(model_config(config, train)).to(device).to(memory_format=torch.channels_last)
    average = WeightAverage(model, config.average_halflife)
    groups = [{"params": list(group)} for group in model.encoder_and_decoder_parameters()]
    if config.encoder_steps == 1:
        groups = [{"params": list(model.parameters())}]
    adam = torch.optim.Adam(groups, lr=config.learning_rate, eps=config.adam_epsilon, fused=True)
    if zero.is_zero(accelerator):
        zero.configure(accelerator, model, config.batch_size // world, config.gradient_clip)
    trained, optimizer = accelerator.prepare(model, adam)
    steps = Steps(accelerator, trained, optimizer, config.gradient_clip)
    part = rank_slice(config.batch_size, rank, world)

    def inputs(batch: dict[str, torch.Tensor], images_seen: int):
        """Images and conditions of this rank, the same for any number of ranks."""
        images = pictures.to_unit(batch["images"], device)
        if config.binarize:
            positions = range(images_seen + part.start, images_seen + part.stop)
            images = binarize(images, positions, config.seed)
        y = model.condition(len(images), batch["labels"].to(device), batch["attributes"].to(device))
        return images, y

    try:
        first = pictures.to_unit(train[slice(0, 1)], device)
        model.likelihood.check(model.dequantizer(first)[0])
    except ValueError as error:
        raise stage.UserError(f"{config.data}: {error}") from error
    if config.dry_run:
        arrays = train.fetch(np.arange(config.batch_size // world) % len(train))
        images, y = inputs({name: torch.from_numpy(a) for name, a in arrays.items()}, 0)
        one = torch.ones((), device=device)
        report_dry_run(
            lambda: steps.take([trained(images, y, config.objective, one)["loss"]]),
            model, config.batch_size, config.total_images, config.save_every, accelerator,
        )  # fmt: skip
        return 0

    scorer = scoring.make_scorer(config, valid, accelerator) if config.score_every else None
    run = Run(config, model, average, steps, train.index.sha256)
    run.resume()
    run.start("vae", f"{len(train):,} training images")
    corruption.write_list(config, train=train.faults, valid=valid.faults)
    run.tracker.introduce(run.images_seen, "vae", config, scorer and scorer.protocol)

    batches = training_batches(
        train.fetch, len(train), batch_size=config.batch_size, seed=config.seed,
        start=run.images_seen, rank=rank, world_size=world, workers=config.workers,
    )  # fmt: skip
    split, validation = Split(average.model, valid, config.binarize, device), {}
    while run.images_seen < config.total_images:
        run.start_step()
        number = run.images_seen // config.batch_size
        if run.images_seen < config.aggressive_images and number % config.encoder_steps:
            optimizer.param_groups[1]["lr"] = 0.0  # the encoder catches up with the decoder
        images, y = inputs(next(batches), run.images_seen)
        # Noise is keyed by position, so a resumed run needs no generator's state.
        torch.manual_seed(step_seed(config.seed, run.images_seen, rank))
        warmup = torch.tensor(warmup_at(config, run.trained_images), device=device)
        found = trained(images, y, config.objective, warmup)
        norm = steps.take([found["loss"]])
        metrics = {f"vae/{name}": value for name, value in found.items()}
        metrics |= {"schedule/kl_warmup": warmup, "gradient/norm": norm}
        due = run.end_step(None if norm is None else metrics)

        # Report, validate, save.
        if due.logs:
            values = run.means.values(world)
            values |= corruption.figures(config, train.corrupt, len(train), run.images_seen)
            run.log(values)
            run.tracker.show(loss=values["vae/loss"], **validation_brief(validation))
        if due.validates:
            validation = validate(split, config.batch_size, accelerator)
            run.tracker.log(run.images_seen, validation)
            if accelerator.is_main_process:
                show_pictures(split, run)
        if scorer and scorer.is_due(run, due):
            scorer.score(run, scored_sets(split, scorer.numbers))
        if due.saves:
            run.save()

    run.tracker.compare(run.images_seen, config)
    run.tracker.close()
    if not validation:  # an earlier run reached the end, but not this line
        validation = validate(split, config.batch_size, accelerator)
    if accelerator.is_main_process:
        about = {
            "config": stage.to_dict(config),
            "images_seen": run.images_seen,
            "validation": validation,
            "data": model_card.data_of(train.index, train.recipe),
            "data_index_sha256": train.index.sha256,
            "recipe": train.recipe.hash,
            "attribute_names": train.index.attribute_names,
            "class_names": train.index.class_names,
            **stage.provenance(),
        }
        save_model(config.out, "vae", average.model, about)
        brief = ", ".join(f"{name} {value:.5g}" for name, value in validation.items())
        print(f"{config.out / 'final'}: {brief}")
    return run.end()


def validation_brief(validation: dict[str, float]) -> dict[str, float]:
    """What the progress bar says of the last validation."""
    names = {"validation/negative_elbo": "valid", "validation/mse": "mse"}
    return {short: validation[name] for name, short in names.items() if name in validation}


if __name__ == "__main__":
    stage.run(TrainVAE, main, __doc__)
