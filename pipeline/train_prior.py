"""Trains a prior over the codes of one level, given the coarser levels.

    python pipeline/train_prior.py --config configs/demo/train_prior_level0.yaml \\
        --codes runs/demo/codes --level 0 --out runs/demo/prior-level0
    accelerate launch --config_file configs/accelerate/gpu.yaml pipeline/train_prior.py \\
        --config configs/celeba64/train_prior_level1.yaml \\
        --codes runs/celeba64/codes --level 1 --out runs/celeba64/prior-level1
    torchrun --nproc_per_node 2 pipeline/train_prior.py ...       two CPU processes, or two GPUs
    python pipeline/train_prior.py ... --dry_run true             parameters, memory, disk, time

Other kinds of prior than the gated PixelCNN, and a large one on little memory:

    python pipeline/train_prior.py ... --model.architecture pixelsnail \\
        --model.attention_layers 2 --model.output_layers 2
    python pipeline/train_prior.py ... --model.architecture transformer --learning_rate 3e-4
    accelerate launch --config_file configs/accelerate/zero2.yaml pipeline/train_prior.py ... \\
        --checkpoint_activations true

Level 0 (top) is the coarsest. `final/` always holds the weights with the best validation nats per
code; its config.json says how far the training codes lie below them. Started again with the same
--out it resumes from its newest checkpoint.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from accelerate import Accelerator

from pipeline import stage
from pipeline.data.codes import CodeSet, open_codes
from pipeline.data.images import ImageSet, open_images
from pipeline.data.loader import training_batches
from pipeline.evaluation import model_card, pictures
from pipeline.models.priors import make_prior
from pipeline.models.priors.noise import image_keys
from pipeline.models.priors.prior import Prior, PriorConfig
from pipeline.models.priors.sampling import fastest_method, sample_codes
from pipeline.models.vqvae import VQVAE
from pipeline.training import distributed, scoring, zero
from pipeline.training.checkpoint import load_model, model_sha256, save_model
from pipeline.training.collectives import all_reduce_sum, rank_slice
from pipeline.training.dry_run import peak_memory_gib, report_dry_run
from pipeline.training.run import Run, step_seed
from pipeline.training.schedule import Schedule
from pipeline.training.steps import Steps
from pipeline.training.weight_average import WeightAverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPrior:
    """Config of the stage. The clock of a run is images seen."""

    codes: Path
    """Directory with code shards, made by extract_codes.py."""
    out: Path
    """Run directory: checkpoints/, final/, metrics.jsonl, tensorboard/."""
    level: int | Literal["top", "bottom"] = 0
    """Level whose codes are modelled; 0 or top is the coarsest, bottom the finest."""
    condition: Literal["none", "class", "attributes"] = "none"
    """What to condition on, besides the coarser levels."""
    condition_dropout: float = 0.1
    """Probability that an image's class and attributes are hidden altogether, in [0, 1): what
    guidance in sampling needs. Besides, a random share of the attributes always is."""
    flips: bool = True
    """Train on the mirror images too, where extract_codes.py made their codes; false = leave them
    out."""
    model: PriorConfig = PriorConfig()
    """Sizes; what the codes determine (codebook sizes, classes, attributes) is filled in."""
    total_images: int = 400_000
    """Length of the run in images."""
    patience: int = 0
    """End the run when the validation has found no new best for so many images, a few times
    validate_every; 0 = never."""
    batch_size: int = 64
    """Global batch, over all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    schedule: Schedule = "cosine"
    """After the warm-up: constant, or a cosine down to 0."""
    warmup_images: int = 5_000
    """Length of the linear warm-up."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    average_halflife: int = 10_000
    """Half-life of the weight average in images; 0 = no average."""
    checkpoint_activations: bool = False
    """Compute the layers' activations twice instead of keeping them: less memory, the same
    gradients."""
    seed: int = 0
    """Seed of the initial weights, the data order and the dropout."""
    log_every: int = 2_000
    """Images between lines in the metrics."""
    validate_every: int = 20_000
    """Images between validations; each may renew final/."""
    save_every: int = 100_000
    """Images between checkpoints."""
    score_every: int = 0
    """Images between scores of samples against validation images, whose coarser codes, class and
    attributes they are given; only for the finest level. 0 = never. They are figures of a run's
    progress: few images, so not those of evaluate.py."""
    score_images: int = 500
    """Images that are scored, at most as many as the validation split has."""
    judge: Path | None = None
    """Run directory of train_classifier.py on whose features the scores are; None = Inception's,
    where torch.hub has its published weights."""
    checkpoint: Path | None = None
    """Run directory of the VQ-VAE that decodes the scored samples; None = vqvae beside the
    codes."""
    data: Path | None = None
    """Image shards the codes were made of, for the scores; None = shards beside the codes."""
    workers: int = 0
    """Loader processes; the codes are in memory, so 0 is fastest."""
    dry_run: bool = False
    """Print parameters, memory, disk and the time to the end, from ten steps, and stop."""

    def __post_init__(self) -> None:
        for name in ("total_images", "batch_size", "learning_rate", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.patience < 0:
            raise ValueError(f"patience must be at least 0, got {self.patience}")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}")
        if self.condition == "class" and self.condition_dropout == 0:
            raise ValueError(
                "condition_dropout must be above 0 with condition class: images whose class is not "
                "told, and guidance, need what is learnt from hidden classes"
            )
        scoring.check_config(self)


def level_number(level: int | str, num_levels: int) -> int:
    """0 ... num_levels - 1 for a number or an alias."""
    number = {"top": 0, "bottom": num_levels - 1}.get(str(level), level)
    if not isinstance(number, int) or not 0 <= number < num_levels:
        raise stage.UserError(f"level must be in 0..{num_levels - 1}, top or bottom, got {level}")
    return number


def model_config(config: TrainPrior, codes: CodeSet, level: int) -> PriorConfig:
    """The model's config with what the codes determine."""
    about: Any = codes.index.codes
    sizes = about["codebook_sizes"]
    names = {"class": codes.index.class_names, "attributes": codes.index.attribute_names}
    if config.condition != "none" and not names[config.condition]:
        raise stage.UserError(f"{config.codes} has no {config.condition} to condition on")
    return dataclasses.replace(
        config.model,
        grid=tuple(about["grids"][level]),
        codebook_size=sizes[level],
        coarser_codebook_sizes=tuple(sizes[:level]),
        num_classes=len(names["class"]) if config.condition == "class" else 0,
        num_attributes=len(names["attributes"]) if config.condition == "attributes" else 0,
    )


def model_inputs(batch: dict[str, torch.Tensor], level: int, device: torch.device) -> dict:
    """What Prior.forward takes, from a batch of the loader."""
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return {
        "codes": on_device[f"level{level}"],
        "coarser": [on_device[f"level{coarser}"] for coarser in range(level)],
        "labels": on_device["labels"],
        "attributes": on_device["attributes"],
    }


def hide_some_conditions(
    inputs: dict, config: TrainPrior, images_seen: int, part: slice
) -> dict[str, torch.Tensor]:
    """Makes parts of the condition unknown, so that any part of it, or nothing, can be given in
    sampling.

    Of each image's attributes a uniformly random share is hidden; with probability
    `condition_dropout` all of them are, and the class. Drawn for the whole global batch at
    `images_seen`, of which this rank has `part`, so that it does not depend on the number of ranks.
    """
    labels, attributes = inputs["labels"], inputs["attributes"]
    generator = np.random.Generator(np.random.Philox(key=[config.seed, images_seen]))
    share = generator.random((config.batch_size, 1))
    hidden = generator.random((config.batch_size, attributes.shape[1])) < share
    everything = generator.random(config.batch_size) < config.condition_dropout
    hidden = torch.from_numpy((hidden | everything[:, None])[part]).to(attributes.device)
    no_class = torch.from_numpy(everything[part]).to(labels.device)
    return {
        **inputs,
        "attributes": attributes.masked_fill(hidden, 0),
        "labels": labels.masked_fill(no_class, -1),
    }


def subset(codes: CodeSet, indices: np.ndarray) -> CodeSet:
    """The samples at `indices`."""
    return dataclasses.replace(
        codes,
        levels=[level[indices] for level in codes.levels],
        attributes=codes.attributes[indices],
        labels=codes.labels[indices],
        flipped=codes.flipped[indices],
    )


@torch.no_grad()
def nats_per_code(
    model: Prior, codes: CodeSet, level: int, batch_size: int, accelerator: Accelerator
) -> float:
    """Mean negative log-likelihood in nats per code, with the full condition; each sample once,
    whatever the number of ranks."""
    rank, world = accelerator.process_index, accelerator.num_processes
    part = torch.arange(len(codes))[rank_slice(len(codes), rank, world)]
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for indices in part.split(batch_size):
        arrays = codes.fetch(indices.numpy())
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with zero.autocast(accelerator):
            nats = model(**model_inputs(batch, level, accelerator.device))
        total += nats.double() * len(indices)
    all_reduce_sum(total)
    return float(total) / len(codes)


def validate(
    model: Prior,
    valid: CodeSet,
    sample: CodeSet,
    level: int,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Nats per code of the validation split and of a sample of the training codes, measured alike,
    and the gap between them, which is overfitting."""
    found, on_train = (
        nats_per_code(model, codes, level, batch_size, accelerator) for codes in (valid, sample)
    )
    return {
        "validation_nats_per_code": found,
        "train_sample_nats_per_code": on_train,
        "gap_nats_per_code": found - on_train,
    }


def open_scored(config: TrainPrior, valid: CodeSet) -> tuple[VQVAE, ImageSet]:
    """The VQ-VAE that made the validation codes, and the images it made them of; UserError where
    these are others."""
    origin: Any = valid.index.codes
    checkpoint = config.checkpoint or config.codes.parent / "vqvae"
    if model_sha256(checkpoint) != origin["checkpoint_sha256"]:
        raise stage.UserError(
            f"{config.codes} holds codes of another checkpoint than {checkpoint}; give theirs "
            "with --checkpoint"
        )
    data = config.data or config.codes.parent / "shards"
    images = open_images(data, "valid", origin["image_size"])
    if images.index.sha256 != origin["data_index_sha256"]:
        raise stage.UserError(
            f"{config.codes} holds codes of other images than {data}; give theirs with --data"
        )
    return load_model(checkpoint, "vqvae"), images


def decoded_samples(
    prior: Prior, vqvae: VQVAE, codes: CodeSet, numbers: np.ndarray
) -> scoring.Make:
    """Makes images whose finest codes are drawn given the coarser codes, class and attributes of
    the images `numbers` (N,); image n depends on n alone."""
    level, device = len(codes.levels) - 1, prior.embed.weight.device
    method = fastest_method(prior)

    def make(where: slice) -> np.ndarray:
        arrays = codes.fetch(numbers[where])
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        inputs = model_inputs(batch, level, device)
        condition = prior.condition(
            len(inputs["codes"]), inputs["coarser"], inputs["labels"], inputs["attributes"]
        )
        keys = image_keys(0, torch.from_numpy(numbers[where]).to(device), level)
        drawn = sample_codes(prior, condition, keys, method=method).codes
        return pictures.to_uint8(vqvae.decode_codes([*inputs["coarser"], drawn]))

    return make


def has_stopped(progress: Mapping[str, Any], patience: int) -> bool:
    """True if the last validation came `patience` images after the best one, or later. Until the
    next one nothing changes, so a resumed run ends where an uninterrupted one does."""
    return 0 < patience <= progress["validated_at"] - progress["best_at"]


def main(config: TrainPrior) -> int:
    accelerator = distributed.make_accelerator()
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    distributed.check_global_batch(config.batch_size, world)

    # Data: the codes of all levels, in memory; of the training images a sample as large as the
    # validation split, on which the same is measured.
    train, valid = open_codes(config.codes, "train"), open_codes(config.codes, "valid")
    originals = np.flatnonzero(~train.flipped)
    spread = np.linspace(0, len(originals), min(len(originals), len(valid)), endpoint=False)
    sample = subset(train, originals[spread.astype(int)])
    if not config.flips:
        train = subset(train, originals)
    level = level_number(config.level, len(train.levels))
    config = dataclasses.replace(config, level=level)  # saved as a number, not an alias

    # Model, average, optimizer.
    torch.manual_seed(config.seed)
    model = make_prior(model_config(config, train, level)).to(device)
    model.checkpoint_activations = config.checkpoint_activations
    average = WeightAverage(model, config.average_halflife)
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    if zero.is_zero(accelerator):
        zero.configure(accelerator, model, config.batch_size // world, config.gradient_clip)
    trained, optimizer = accelerator.prepare(model, adam)
    steps = Steps(accelerator, trained, optimizer, config.gradient_clip)
    if config.dry_run:
        arrays = train.fetch(torch.arange(config.batch_size // world).numpy() % len(train))
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        inputs = model_inputs(batch, level, device)
        report_dry_run(
            lambda: steps.take([trained(**inputs)]),
            model, config.batch_size, config.total_images, config.save_every, accelerator,
        )  # fmt: skip
        return 0

    scorer, sets = None, {}
    if config.score_every and level == len(train.levels) - 1:
        vqvae, images = open_scored(config, valid)
        if scorer := scoring.make_scorer(config, images, accelerator):
            name = "samples_given_coarser" if level else "samples"
            sets[name] = decoded_samples(average.model, vqvae.to(device), valid, scorer.numbers)
    elif config.score_every and accelerator.is_main_process:
        print(f"level {level} is not scored: only the codes of the finest make an image")

    extra = {"best": None, "best_at": 0, "validated_at": 0}
    run = Run(config, model, average, steps, train.index.sha256, extra)
    run.resume()
    best = math.inf if run.extra["best"] is None else run.extra["best"]
    views = "1 view" if len(train) == len(originals) else "2 views"
    run.start(
        f"prior {level}",
        f"level {level}, {len(train):,} training samples: {len(originals):,} images in {views}",
    )
    run.tracker.introduce(run.images_seen, "prior", config, scorer and scorer.protocol)

    batches = training_batches(
        train.fetch, len(train), batch_size=config.batch_size, seed=config.seed,
        start=run.images_seen, rank=rank, world_size=world, workers=config.workers,
    )  # fmt: skip
    part = rank_slice(config.batch_size, rank, world)
    while run.images_seen < config.total_images and not has_stopped(run.extra, config.patience):
        run.start_step()
        # Randomness is keyed by position, so a resumed run needs no generator's state.
        torch.manual_seed(step_seed(config.seed, run.images_seen, rank))
        inputs = model_inputs(next(batches), level, device)
        inputs = hide_some_conditions(inputs, config, run.images_seen, part)
        nats = trained(**inputs)
        norm = steps.take([nats])
        metrics = {"prior/train_nats_per_code": nats, "gradient/norm": norm}
        due = run.end_step(None if norm is None else metrics)

        # Report, validate, save.
        if due.logs:
            values = run.means.values(world)
            rate = run.tracker.images_per_sec(run.images_seen)
            values["throughput/codes_per_sec"] = rate * math.prod(model.config.grid)
            values["memory/peak_gib"] = peak_memory_gib()
            run.log(values)
            run.tracker.show(nats=values["prior/train_nats_per_code"], best=best)
        if due.validates:
            validation = validate(
                average.model, valid, sample, level, config.batch_size, accelerator
            )
            tags = {f"prior/{name}": value for name, value in validation.items()}
            run.tracker.log(run.images_seen, tags)
            run.extra["validated_at"] = run.images_seen
            if validation["validation_nats_per_code"] < best:
                best = validation["validation_nats_per_code"]
                run.extra |= {"best": best, "best_at": run.images_seen}
                if accelerator.is_main_process:
                    about = {
                        "config": stage.to_dict(config),
                        "level": level,
                        "images_seen": run.images_seen,
                        **validation,
                        "data": model_card.data_of(train.index),
                        "codes": train.index.codes,
                        "attribute_names": train.index.attribute_names,
                        "class_names": train.index.class_names,
                        **stage.provenance(),
                    }
                    save_model(config.out, "prior", average.model, about)
        if scorer and scorer.is_due(run, due):
            scorer.score(run, sets)
        if due.saves or has_stopped(run.extra, config.patience):
            run.save()

    run.tracker.compare(run.images_seen, config, {"prior/validation_nats_per_code": best})
    run.tracker.close()
    if accelerator.is_main_process:
        if has_stopped(run.extra, config.patience):
            print(f"stopped at {run.images_seen:,} of {config.total_images:,} images: no new best "
                  f"in {config.patience:,} (--patience)")  # fmt: skip
        at = f"{run.extra['best_at']:,} images"
        print(f"{config.out / 'final'}: best validation {best:.4f} nats per code, at {at}")
    return run.end()


if __name__ == "__main__":
    stage.run(TrainPrior, main, __doc__)
