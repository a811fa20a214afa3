"""Figures for people (TensorBoard, progress bar) and for programs (metrics.jsonl), in one call.

Every tag is written down here; an unknown one is an error. {level} is a level's number, {features}
is judge, inception (the published weights only) or 8 hex digits of other weights' hash.
"""

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.training.collectives import all_reduce_sum

TAGS = {
    "loss/total": "the objective",
    "loss/reconstruction": "mean squared error in [0, 1], training batches",
    "loss/commitment": "sum over levels of |z_e - sg[e]|^2",
    "loss/skipped_steps": "steps skipped since the start, a loss or gradient was not finite",
    "codebook/level{level}/perplexity": "effective codes, exp of the entropy of their use",
    "codebook/level{level}/unused_fraction": "share of codes not used since the last line",
    "codebook/level{level}/revived": "codes that started anew since the last line",
    "vae/loss": "what is minimised, nats per image",
    "vae/reconstruction": "-E log p(x|z), nats per image",
    "vae/kl": "KL(q(z|x) || p(z)), nats per image",
    "vae/negative_elbo": "reconstruction + KL, nats per image",
    "vae/negative_bound": "-L_k, the bound of k importance-weighted samples, nats per image",
    "vae/nll": "-log p(x), exact or by prior Monte Carlo, nats per image",
    "vae/mmd": "MMD of the latents to N(0, I), unbiased",
    "validation/reconstruction": "-E log p(x|z), nats per image, averaged weights",
    "validation/kl": "KL(q(z|x) || p(z)), nats per image, averaged weights",
    "validation/negative_elbo": "their sum",
    "validation/active_units": "latent dimensions whose posterior mean varies over images",
    "validation/mse": "mean squared error in [0, 1], validation split, averaged weights",
    "validation/psnr": "10 log10(1 / MSE of an image), mean over images, dB",
    "validation/level{level}/perplexity": "effective codes on the validation split",
    "validation/level{level}/codes_used": "codes used at least once on the validation split",
    "validation/level{level}/relative_error": "E|z - q|^2 / Var z on the validation split",
    "prior/train_nats_per_code": "negative log-likelihood of the training codes",
    "prior/validation_nats_per_code": "the same on the validation split, averaged weights",
    "prior/train_sample_nats_per_code": "the same on as many training samples, averaged weights",
    "prior/gap_nats_per_code": "validation minus training sample: the overfitting",
    "classifier/train_loss": "cross-entropy in nats, training half",
    "classifier/validation_loss": "cross-entropy in nats, validation split",
    "classifier/validation_accuracy": "accuracy (classes) or mean accuracy over attributes",
    "classifier/validation_average_precision": "mean over attributes or classes",
    "throughput/images_per_sec": "training images per second, all processes",
    "throughput/codes_per_sec": "training codes per second, all processes",
    "memory/peak_gib": "most memory in use so far: of rank 0's GPU, or of its process",
    "schedule/kl_warmup": "share of beta, the weight of the KL, in force",
    "schedule/learning_rate": "learning rate of the step",
    "gradient/norm": "global norm before clipping",
    "fid/inception": "FID with the published Inception weights only",
    "rfid/inception": "the same for reconstructions",
    "frechet/{features}": "Fréchet distance of samples on other features: the judge's, or a hash",
    "kid/{features}": "kernel distance of samples, unbiased, mean over subsets",
    "precision/{features}": "share of samples near a real image",
    "recall/{features}": "share of real images near a sample",
    "inception_score/{features}": "inception score of samples",
}
_PATTERNS = [
    re.compile(
        re.escape(tag)
        .replace(r"\{level\}", r"\d+")
        .replace(r"\{features\}", "(judge|inception|[0-9a-f]{8})")
    )
    for tag in TAGS
]


def check_tag(tag: str) -> None:
    """Raises KeyError for a tag that is not written down in TAGS or below `evaluation/`."""
    if not tag.startswith("evaluation/") and not any(p.fullmatch(tag) for p in _PATTERNS):
        raise KeyError(f"metric tag {tag!r} is not in pipeline/training/tracking.py")


def progress_bar(total: int, description: str, initial: int = 0, unit: str = "images", **options):
    """A bar with rate and time left; quiet enough for a log file when there is no terminal."""
    bar = tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        dynamic_ncols=True,
        smoothing=0.05,
        **options,
    )
    if not bar.disable and not bar.fp.isatty():
        bar.mininterval = 10.0
    return bar


class Tracker:
    """Rank 0's record of a run; on other ranks every call does nothing."""

    def __init__(
        self,
        out: Path,
        description: str,
        total_images: int,
        images_seen: int = 0,
        enabled: bool = True,
    ):
        self.enabled = enabled
        self.bar = progress_bar(total_images, description, images_seen, disable=not enabled)
        self.restart_clock(images_seen)
        if not enabled:
            return
        self.path = out / "metrics.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        _keep_lines_up_to(self.path, images_seen)
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=images_seen + 1)

    def advance(self, num_images: int) -> None:
        """Moves the progress bar."""
        self.bar.update(num_images)

    def images_per_sec(self, images_seen: int) -> float:
        """Throughput of the training steps since `restart_clock`."""
        then, before = self._last
        return (images_seen - before) / max(time.perf_counter() - then, 1e-9)

    def restart_clock(self, images_seen: int) -> None:
        """Leaves what was done until now (validation, a checkpoint) out of the throughput."""
        self._last = (time.perf_counter(), images_seen)

    def log(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Writes scalars to metrics.jsonl and TensorBoard."""
        if not self.enabled:
            return
        line = {"images_seen": images_seen, "time": time.time(), **values}
        for tag, value in values.items():
            check_tag(tag)
            self.writer.add_scalar(tag, value, images_seen)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def show(self, **values: float) -> None:
        """Puts figures behind the progress bar."""
        self.bar.set_postfix({key: f"{value:.4g}" for key, value in values.items()}, refresh=False)

    def image(self, images_seen: int, tag: str, image: np.ndarray) -> None:
        """Writes one picture (H, W, 3) uint8 to TensorBoard."""
        if self.enabled:
            self.writer.add_image(tag, image, images_seen, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        if self.enabled:
            self.writer.close()


class MeanMetrics:
    """Means of scalar tensors since the last report, over steps and ranks."""

    def __init__(self) -> None:
        self.steps, self.sums = 0, {}

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Adds one step's metrics; nothing is copied from the device."""
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def values(self, world_size: int) -> dict[str, float]:
        """The means; collective, and starts a new window."""
        flat = torch.stack(list(self.sums.values())) / (self.steps * world_size)
        all_reduce_sum(flat)
        means = dict(zip(self.sums, flat.tolist(), strict=True))
        self.steps, self.sums = 0, {}
        return means


def _keep_lines_up_to(path: Path, images_seen: int) -> None:
    """A resumed run repeats what came after its checkpoint: drop those lines."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # a line without its end was torn by whatever ended the run
        whole = [line for line in lines if line.endswith("\n") and line.strip()]
        kept = [line for line in whole if json.loads(line)["images_seen"] <= images_seen]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
