"""Trains the judge: a classifier of attributes (or classes) on one half of the training split.

    python pipeline/train_classifier.py --data runs/demo/shards --out runs/demo/classifier-judge
    torchrun --nproc_per_node 2 pipeline/train_classifier.py ...     two CPU processes, or two GPUs
    python pipeline/train_classifier.py --data ... --out ... --total_images 20000    a quick look
    python pipeline/train_classifier.py ... --dry_run true           parameters, memory, disk, time

The judge measures (accuracy, a Fréchet distance on its features); whoever selects samples by a
classifier trains another one, on the other half (--half 0) with another --seed and --channels, so
that nothing is tuned on its own yardstick. Started again with the same --out it resumes.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import ClassVar, Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from accelerate import Accelerator

from pipeline import stage
from pipeline.data import corruption
from pipeline.data.corruption import CorruptConfig
from pipeline.data.images import ImageSet, open_for_training
from pipeline.data.loader import training_batches
from pipeline.evaluation import judge, model_card, pictures
from pipeline.models.classifier import Classifier, ClassifierConfig, loss
from pipeline.training import distributed, zero
from pipeline.training.checkpoint import save_model
from pipeline.training.collectives import all_reduce_sum, rank_slice
from pipeline.training.dry_run import report_dry_run
from pipeline.training.run import Run
from pipeline.training.schedule import Schedule
from pipeline.training.steps import Steps
from pipeline.training.weight_average import WeightAverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainClassifier:
    """Config of the stage. Figures of judges with different configs are not comparable."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    out: Path
    """Run directory: checkpoints/, final/, metrics.jsonl, tensorboard/."""
    half: Literal[0, 1] = 1
    """Half of the training split, by a hash of the key: 1 for the judge, 0 for a selector."""
    image_size: int = 64
    """Side of the square images in pixels."""
    channels: int = 32
    """Width of the first stage, a multiple of 8; there are 4 times as many features."""
    total_images: int = 200_000
    """Length of the run in images."""
    batch_size: int = 128
    """Global batch, over all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam; a linear warm-up, then a cosine down to 0."""
    schedule: ClassVar[Schedule] = "cosine"
    warmup_images: int = 2_000
    """Length of the linear warm-up."""
    average_halflife: int = 5_000
    """Half-life of the weight average in images; 0 = no average."""
    seed: int = 1
    """Seed of the initial weights, the data order and the flips."""
    log_every: int = 2_000
    """Images between lines in the metrics."""
    validate_every: int = 40_000
    """Images between validations."""
    save_every: int = 40_000
    """Images between checkpoints."""
    workers: int = 0
    """Loader processes; 0 is fastest with the cache."""
    cache: bool = True
    """Decode the shards once into a uint8 cache beside them; false = decode every time."""
    corrupt: CorruptConfig = CorruptConfig()
    dry_run: bool = False
    """Print parameters, memory, disk and the time to the end, from ten steps, and stop."""

    def __post_init__(self) -> None:
        for name in ("image_size", "total_images", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class _Fetch:
    """A batch for the loader from positions in `chosen`; picklable for worker processes."""

    def __init__(self, images: ImageSet, chosen: np.ndarray, targets: np.ndarray):
        self.images, self.chosen, self.targets = images, chosen, targets

    def __call__(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        indices = self.chosen[positions]
        return {"images": self.images[indices], "targets": self.targets[indices]}


def flips(seed: int, images_seen: int, batch_size: int) -> np.ndarray:
    """(batch_size,) bool: which images of the global batch at `images_seen` are mirrored."""
    return np.random.Generator(np.random.Philox(key=[seed, images_seen])).random(batch_size) < 0.5


@torch.no_grad()
def predict(model: Classifier, images: ImageSet, accelerator: Accelerator, batch_size: int = 250):
    """Logits (N, A) float64 of the whole split on the CPU, each rank doing its part."""
    rank, world = accelerator.process_index, accelerator.num_processes
    part = range(len(images))[rank_slice(len(images), rank, world)]
    logits = torch.zeros(
        len(images), model.config.num_outputs, dtype=torch.float64, device=accelerator.device
    )
    for start in range(part.start, part.stop, batch_size):
        where = slice(start, min(start + batch_size, part.stop))
        logits[where] = model(pictures.to_unit(images[where], accelerator.device)).double()
    all_reduce_sum(logits)
    return logits.cpu()


def main(config: TrainClassifier) -> int:
    accelerator = distributed.make_accelerator()
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    distributed.check_global_batch(config.batch_size, world)
    if zero.is_zero(accelerator):
        raise stage.UserError(
            "the classifier is too small for DeepSpeed; start it without, as "
            "configs/accelerate/gpu.yaml or cpu2.yaml do"
        )

    # Data: rank 0 fills the cache, the others wait for it.
    with accelerator.main_process_first():
        train, valid = open_for_training(config)
    task, chosen = judge.find_task(train, config.half, config.data)
    targets, part = judge.targets_of(train, task), rank_slice

    # Model, average, optimizer.
    torch.manual_seed(config.seed)
    model_config = ClassifierConfig(
        in_channels=train.recipe.channels, num_outputs=len(task.names),
        channels=config.channels, kind=task.kind, names=task.names,
    )  # fmt: skip
    model = Classifier(model_config).to(device).to(memory_format=torch.channels_last)
    average = WeightAverage(model, config.average_halflife)
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    trained, optimizer = accelerator.prepare(model, adam)
    steps = Steps(accelerator, trained, optimizer, gradient_clip=math.inf)

    if config.dry_run:
        indices = chosen[np.arange(config.batch_size // world) % len(chosen)]
        images = pictures.to_unit(train[indices], device)
        wanted = torch.from_numpy(targets[indices]).to(device)
        report_dry_run(
            lambda: steps.take([loss(trained(images), wanted, task.kind)]),
            model, config.batch_size, config.total_images, config.save_every, accelerator,
        )  # fmt: skip
        return 0

    def validate():
        logits = predict(average.model, valid, accelerator)
        return judge.figures(logits, judge.targets_of(valid, task), task)

    run = Run(config, model, average, steps, train.index.sha256)
    run.resume()
    run.start(
        "classifier",
        f"{len(chosen):,} of {len(train):,} training images, {len(task.names)} {task.kind}",
    )
    run.tracker.introduce(run.images_seen, "classifier", config)
    corruption.write_list(config, train=train.faults, valid=valid.faults)

    batches = training_batches(
        _Fetch(train, chosen, targets), len(chosen), batch_size=config.batch_size, seed=config.seed,
        start=run.images_seen, rank=rank, world_size=world, workers=config.workers,
    )  # fmt: skip
    while run.images_seen < config.total_images:
        run.start_step()
        batch = next(batches)
        images = pictures.to_unit(batch["images"], device)
        if task.kind == "attributes":  # a face may be mirrored, a digit may not
            flipped = flips(config.seed, run.images_seen, config.batch_size)
            mirror = torch.from_numpy(flipped[part(config.batch_size, rank, world)]).to(device)
            images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
        total = loss(trained(images), batch["targets"].to(device), task.kind)
        taken = steps.take([total]) is not None
        due = run.end_step({"classifier/train_loss": total} if taken else None)

        # Report, validate, save.
        if due.logs:
            values = run.means.values(world)
            corrupt = np.flatnonzero(np.isin(chosen, train.corrupt))
            values |= corruption.figures(config, corrupt, len(chosen), run.images_seen)
            run.log(values)
            run.tracker.show(loss=values["classifier/train_loss"])
        if due.validates and not due.ends:
            run.tracker.log(run.images_seen, validate()[0])
        if due.saves:
            run.save()

    validation, per_output = validate()
    run.tracker.log(run.images_seen, validation)
    run.tracker.compare(run.images_seen, config)
    run.tracker.close()
    if accelerator.is_main_process:
        about = {
            "config": stage.to_dict(config),
            "images_seen": run.images_seen,
            "validation": validation,
            "per_output": per_output,
            "skipped_constant_attributes": task.skipped,
            "half": config.half,
            "training_images": len(chosen),
            "data": model_card.data_of(train.index, train.recipe),
            "data_index_sha256": train.index.sha256,
            "recipe": train.recipe.hash,
            **stage.provenance(),
        }
        sha256 = save_model(config.out, "classifier", average.model, about)
        accuracy = validation["classifier/validation_accuracy"]
        print(f"{config.out / 'final'}: {sha256[:8]}, validation accuracy {accuracy:.4f}")
    return run.end()


if __name__ == "__main__":
    stage.run(TrainClassifier, main, __doc__)
