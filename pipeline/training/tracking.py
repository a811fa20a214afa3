"""Figures for people (TensorBoard, progress bar) and for programs (metrics.jsonl), in one call.

Every tag is written down here; an unknown one is an error. {level} is a level's number, {features}
is judge, inception, dinov2-... or clip-... (published weights only), or 8 hex digits of other
weights' hash.

TensorBoard's tabs: see GUIDE, which stands in TEXT.
"""

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams, scalar
from tqdm import tqdm

from pipeline import stage
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
    "validation/negative_elbo": "reconstruction + KL, nats per image, averaged weights",
    "validation/active_units": "latent dimensions whose posterior mean varies over images",
    "validation/mse": "mean squared error in [0, 1], validation split, averaged weights",
    "validation/psnr": "10 log10(1 / MSE of an image), mean over images, dB",
    "validation/level{level}/perplexity": "effective codes on the validation split",
    "validation/level{level}/codes_used": "codes used at least once on the validation split",
    "validation/level{level}/relative_error": "E|z - q|^2 / Var z on the validation split",
    "prior/train_nats_per_code": "-log p of the training codes",
    "prior/validation_nats_per_code": "-log p of the validation codes, averaged weights",
    "prior/train_sample_nats_per_code": "-log p of as many training samples, averaged weights",
    "prior/gap_nats_per_code": "validation minus training sample: the overfitting",
    "classifier/train_loss": "cross-entropy in nats, training half",
    "classifier/validation_loss": "cross-entropy in nats, validation split",
    "classifier/validation_accuracy": "accuracy (classes) or mean accuracy over attributes",
    "classifier/validation_average_precision": "average precision, mean over attributes or classes",
    "data/substituted": "uses of corrupt training images since the start, others stood in for them",
    "throughput/images_per_sec": "training images per second, all processes",
    "throughput/codes_per_sec": "training codes per second, all processes",
    "throughput/scoring_seconds": "the pause for the scores, which is no part of images_per_sec",
    "memory/peak_gib": "most memory in use so far: of rank 0's GPU, or of its process",
    "schedule/kl_warmup": "share of beta, the weight of the KL, in force",
    "schedule/learning_rate": "learning rate of the step",
    "gradient/norm": "global norm before clipping",
    "fid/inception": "FID of samples, by the published Inception weights only; less is better",
    "rfid/inception": "FID of reconstructions, by the published Inception weights only",
    "frechet/{features}": "Fréchet distance to real images on these features; less is better",
    "kid/{features}": "kernel distance to real images, unbiased, mean over subsets; less is better",
    "precision/{features}": "share of the images near a real one; more is better",
    "recall/{features}": "share of the real images near one of these; more is better",
    "inception_score/{features}": "inception score; more is better",
}
_PATTERNS = {
    re.compile(
        re.escape(tag)
        .replace(r"\{level\}", r"\d+")
        .replace(r"\{features\}", r"(judge|inception|(dinov2|clip)-[\w-]+|[0-9a-f]{8})")
    ): text
    for tag, text in TAGS.items()
}

# Charts of the custom scalars, by kind of run: tab -> title -> tags, regular expressions that
# match from the start. The x axis is images seen.
_STEPS = {
    "learning rate": ["schedule/learning_rate"],
    "gradient norm before clipping": ["gradient/norm"],
    "steps skipped, not finite": ["loss/skipped_steps"],
}
_SPEED = {"training images per second": ["throughput/images_per_sec"]}
_PAUSE = {"pause for the scores, seconds": ["throughput/scoring_seconds"]}
_SCORES = {
    "FID or Fréchet distance (less is better)": [r"r?fid/", r"(evaluation/[^/]+/)?frechet/"],
    "KID, kernel distance (less is better)": [r"(evaluation/[^/]+/)?kid/"],
    "precision, share of images near a real one": [r"(evaluation/[^/]+/)?precision/"],
    "recall, share of real ones near an image": [r"(evaluation/[^/]+/)?recall/"],
}
LAYOUTS: dict[str, dict[str, dict[str, list[str]]]] = {
    "vqvae": {
        "loss": {
            "squared error in [0, 1]: training, validation": ["loss/recon", "validation/mse"],
            "objective": ["loss/total"],
            "commitment": ["loss/commitment"],
            **_STEPS,
        },
        "codebooks": {
            "codes in effective use (perplexity)": [r"codebook/level\d+/perplexity"],
            "the same, validation split": [r"validation/level\d+/perplexity"],
            "share of codes not used": [r"codebook/level\d+/unused_fraction"],
            "codes that started anew": [r"codebook/level\d+/revived"],
            "quantization error / variance": [r"validation/level\d+/relative_error"],
        },
        "scores": {"PSNR, dB (more is better)": ["validation/psnr"]},
        "throughput": _SPEED,
    },
    "vae": {
        "loss": {
            "negative ELBO, nats per image": [r"(vae|validation)/negative_elbo"],
            "reconstruction, nats per image": [r"(vae|validation)/reconstruction"],
            "KL, nats per image": [r"(vae|validation)/kl"],
            "what is minimised": ["vae/loss"],
            **_STEPS,
        },
        "scores": {
            "squared error in [0, 1]": ["validation/mse"],
            "active units of the latent": ["validation/active_units"],
        },
        "throughput": _SPEED,
    },
    "prior": {
        "loss": {
            "nats per code: training, validation": [
                "prior/(train|validation|train_sample)_nats_per_code"
            ],
            "overfitting: validation - training": ["prior/gap_nats_per_code"],
            **_STEPS,
        },
        "throughput": {**_SPEED, "most memory in use, GiB": ["memory/peak_gib"]},
    },
    "classifier": {
        "loss": {
            "cross-entropy: training, validation": [r"classifier/\w+_loss"],
            **_STEPS,
        },
        "scores": {
            "accuracy": ["classifier/validation_accuracy"],
            "mean average precision": ["classifier/validation_average_precision"],
        },
        "throughput": _SPEED,
    },
    "evaluation": {"scores": _SCORES},
}
TABS = ("loss", "codebooks", "scores", "throughput")
GUIDE = """The step of every curve is **images seen**, not batches.

| tab | shows |
|---|---|
| CUSTOM SCALARS | the charts to look at first: loss, codebooks, scores, throughput |
| SCALARS | every figure by itself; the (i) says what it is |
| IMAGES | reconstructions and samples as training goes on |
| TEXT | command, commit and config of each run, and the protocol of its scores |
| HPARAMS | final figures beside the settings, to compare runs |
| PROJECTOR | the codebooks: label by code, color by uses; the picture of a code is what it draws |

A tab that is not there yet is under INACTIVE, and comes with a reload of the page.
The run `final` holds what HPARAMS shows.
"""

# What HPARAMS compares runs by, as far as a run has it.
FINAL = re.compile(
    "validation/|prior/|classifier/validation|r?fid/|frechet/|kid/|precision/|recall/|evaluation/"
    "|throughput/images_per_sec"
)
# What it does not show: paths, and what decides how a run is made, not what comes of it.
_NOT_COMPARED = {"out", "data", "codes", "judge", "checkpoint", "score_images"} | {
    "accumulation", "cache", "checkpoint_activations", "compile", "dry_run", "workers",
}  # fmt: skip


def check_tag(tag: str) -> None:
    """Raises KeyError for a tag that is not written down in TAGS or below `evaluation/`."""
    if not tag.startswith("evaluation/") and not any(p.fullmatch(tag) for p in _PATTERNS):
        raise KeyError(f"metric tag {tag!r} is not in pipeline/training/tracking.py")


def description(tag: str) -> str:
    """What a tag means, in one line; empty for tags below `evaluation/` that are no distance."""
    of_set = re.fullmatch(r"evaluation/([^/]+)/(\w+/[\w-]+)", tag)
    texts = [text for p, text in _PATTERNS.items() if p.fullmatch(of_set[2] if of_set else tag)]
    return texts[0] + (f" ({of_set[1]})" if of_set else "") if texts else ""


def _scalar(tag: str, value: float) -> Any:
    """A point of a curve, with its description."""
    summary = scalar(tag, value, new_style=True)  # the old style keeps no description
    summary.value[0].metadata.summary_description = description(tag)
    return summary


def _write(writer: SummaryWriter, summary: Any, images_seen: int) -> None:
    assert writer.file_writer is not None  # it is not closed
    writer.file_writer.add_summary(summary, images_seen)


def hyperparameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The scalars of a config that decide the result, nested keys dotted."""
    found = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= hyperparameters(value, f"{prefix}{key}.")
        elif key not in _NOT_COMPARED and not key.endswith("_every"):
            is_scalar = isinstance(value, bool | int | float | str)
            found[prefix + key] = value if is_scalar else json.dumps(value)
    return found


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
    """Rank 0's record of a run; on other ranks every call does nothing.

    Args:
        images_seen: what was written of later moments is dropped.
        anew: of this moment too, as a report does that is made again.
    """

    def __init__(
        self,
        out: Path,
        description: str,
        total_images: int,
        images_seen: int = 0,
        enabled: bool = True,
        anew: bool = False,
    ):
        self.enabled = enabled
        self.bar = progress_bar(total_images, description, images_seen, disable=not enabled)
        self.restart_clock(images_seen)
        if not enabled:
            return
        self.path, self.folder = out / "metrics.jsonl", out / "tensorboard"
        out.mkdir(parents=True, exist_ok=True)
        _keep_lines_up_to(self.path, images_seen - anew)
        self.writer = SummaryWriter(str(self.folder), purge_step=images_seen + 1 - anew)

    def introduce(
        self, images_seen: int, kind: str, config: Any, scores: Mapping[str, Any] | None = None
    ) -> None:
        """Writes what a person needs to read the run: the charts of its kind, and guide, command,
        commit and config.

        Args:
            kind: of LAYOUTS.
            config: of the stage.
            scores: their protocol, where the run is scored.
        """
        if not self.enabled:
            return
        layout = LAYOUTS[kind]
        if scores:
            self.document(images_seen, "scores", scores)
            layout = {
                **layout,
                "scores": {**_SCORES, **layout.get("scores", {})},
                "throughput": {**layout["throughput"], **_PAUSE},
            }
        self.writer.add_custom_scalars(
            {
                tab: {title: ["Multiline", tags] for title, tags in layout[tab].items()}
                for tab in TABS
                if tab in layout
            }
        )
        self.writer.add_text("README", GUIDE, images_seen)  # sorted before the others
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        self.document(images_seen, "command", {"command": command, **stage.provenance()})
        self.document(images_seen, "config", stage.to_dict(config))

    def document(self, images_seen: int, name: str, value: Mapping[str, Any]) -> None:
        """Writes JSON values as a text, as YAML: `protocol` in an evaluation, say."""
        if self.enabled:
            text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
            self.writer.add_text(f"about/{name}", f"```yaml\n{text}```", images_seen)

    def compare(self, images_seen: int, config: Any, values: Mapping[str, float] = {}) -> None:
        """Writes what HPARAMS compares runs by: the config, and the last value of each final
        figure, or that of `values`. They are a run of their own, `final`, for TensorBoard would
        take every scalar beside them for a result."""
        if not self.enabled:
            return
        last: dict[str, float] = {}
        for line in self.path.read_text().splitlines():
            last |= json.loads(line)
        last = {tag: value for tag, value in {**last, **values}.items() if FINAL.match(tag)}
        shutil.rmtree(self.folder / "final", ignore_errors=True)  # of a shorter run
        _, start, end = hparams(hyperparameters(stage.to_dict(config)), last)
        with SummaryWriter(str(self.folder / "final")) as writer:
            for summary in (start, end, *map(_scalar, last.keys(), last.values())):
                _write(writer, summary, images_seen)

    def embedding(
        self,
        images_seen: int,
        name: str,
        vectors: torch.Tensor,
        columns: Mapping[str, Sequence[Any]],
        pictures: np.ndarray,
    ) -> None:
        """Writes vectors (N, D) to the projector, with their pictures (N, h, w, C) uint8 and
        columns of N values that they can be labelled and coloured by."""
        if self.enabled:
            self.writer.add_embedding(
                vectors,
                metadata=[list(row) for row in zip(*columns.values(), strict=True)],
                metadata_header=list(columns),
                label_img=torch.from_numpy(pictures).movedim(-1, 1) / 255,
                global_step=images_seen,
                tag=name,
            )

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
            _write(self.writer, _scalar(tag, value), images_seen)
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
