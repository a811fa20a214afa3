"""A training step of VQ-VAE-2, whole: the usual one, ours, and ours with one thing added at a time.

    python benchmarks/train_step.py --json runs/bench/train_step-cpu.json
    python benchmarks/train_step.py --device cuda --json runs/bench/train_step-cuda.json
    python benchmarks/train_step.py ... --peer_repository DIR     also the published network itself

`usual` is the published form of benchmarks/usual.py; DIR is a checkout of its source, imported as
it is (`published`). A step is all that a training loop does for a batch, ours with clipping,
codebooks, weight average and metrics. The images lie on the device already: uint8 for ours, which
converts them in the step, and for the others what their loaders deliver, float32 in [-1, 1].

All contenders are as large, start from the same weights and take turns in one process. Checked
before: `first_mse`, in [0, 1], of the first forward pass, is that of `usual`, and ours learn.
`speedup` is the median over the turns of the time of `usual` divided by that of the contender;
`gain` of an addition is the same against the row above it.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from accelerate.state import AcceleratorState
from measure import (
    ROOT,
    Absent,
    CpuTimer,
    CudaTimer,
    peak_mib,
    print_table,
    refuse,
    take_turns,
    write_json,
)
from usual import (
    OneHotQuantizer,
    UsualStep,
    UsualVQVAE,
    VectorQuantizePytorch,
    published_network,
    to_usual,
)

try:
    from pipeline import stage
    from pipeline.data.faces import draw_face, sample_face
    from pipeline.evaluation import pictures
    from pipeline.models.vqvae import VQVAE
    from pipeline.train_vqvae import TrainVQVAE, train_step
    from pipeline.training import distributed
    from pipeline.training.codebooks import Codebooks, CodebookUse, Part, start_codebooks
    from pipeline.training.schedule import learning_rate
    from pipeline.training.steps import Steps
    from pipeline.training.tracking import MeanMetrics
    from pipeline.training.weight_average import WeightAverage
except ModuleNotFoundError as error:  # a bare interpreter has what kernels and models need
    print(f"train_step is left out: the stages need {error.name}")
    sys.exit(0)

CASES = {"cpu": ("celeba64", 64, 32), "cuda": ("celeba256", 256, 128)}  # config, pixels, batch
STEPS = {"cpu": 1, "cuda": 10}  # per turn: on a GPU the host prepares one while another runs
BATCHES = 2  # different ones, in turn
CHECK_STEPS = 20
TOLERANCE = {"fp32": 1e-5, "other": 1e-2}  # of first_mse; a GPU rounds operands of fp32 too (TF32)

Step = Callable[[torch.Tensor], torch.Tensor | float]  # a batch -> its mean squared error


@dataclasses.dataclass(frozen=True)
class Way:
    """How our step is run."""

    channels_last: bool = False
    fused: bool = False
    bf16: bool = False
    compiled: bool = False


ADDITIONS = {  # each row adds one thing to the row before
    "ours-fp32-eager-nchw": Way(),
    "+channels_last": Way(channels_last=True),
    "+fused": Way(channels_last=True, fused=True),
    "+bf16": Way(channels_last=True, fused=True, bf16=True),
    "+compile": Way(channels_last=True, fused=True, bf16=True, compiled=True),
}
OURS = {  # what to train with
    "cpu": Way(channels_last=True, fused=True, bf16=True),
    "cuda": Way(channels_last=True, fused=True, bf16=True, compiled=True),
}


class Ours:
    """What the loop of pipeline/train_vqvae.py does for a batch."""

    def __init__(self, way: Way, config: TrainVQVAE, variance: float, like: UsualVQVAE):
        self.way, self.config, self.variance = way, config, variance
        # Precision is the launcher's setting; accelerate would keep that of its first Accelerator.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if way.bf16 else "no"
        AcceleratorState._reset_state()
        self.accelerator = distributed.make_accelerator()
        self.device = self.accelerator.device

        self.model = VQVAE(config.model).to(self.device)
        if way.channels_last:
            self.model.to(memory_format=torch.channels_last)
        copy_weights(self.model, like)
        self.average = WeightAverage(self.model, config.average_halflife)
        adam = torch.optim.Adam(
            self.model.parameters(), lr=config.learning_rate, fused=way.fused or None
        )
        if way.compiled:
            self.model.compile()
        trained, optimizer = self.accelerator.prepare(self.model, adam)
        self.steps = Steps(self.accelerator, trained, optimizer, config.gradient_clip)
        quantizers: Any = self.model.quantizers
        self.codebooks = Codebooks(quantizers, config.batch_size)
        self.means = MeanMetrics()
        self.use = CodebookUse(config.model.codebook_sizes, self.device)
        self.images_seen = config.warmup_images
        trained.train()

    def batch(self, pixels: torch.Tensor) -> Part:
        images = pictures.to_unit(pixels, self.device)
        return Part(images if self.way.channels_last else images.contiguous(), 0)

    def start_codebooks(self, pixels: torch.Tensor) -> None:
        """k-means, before the first step of a run."""
        with self.accelerator.autocast():
            start_codebooks(self.model, [self.batch(pixels)], self.config.batch_size)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, H, W, C) uint8 -> the mean squared error in [0, 1]."""
        config = self.config
        rate = learning_rate(
            self.images_seen, config.learning_rate, config.schedule,
            config.warmup_images, config.total_images,
        )  # fmt: skip
        for group in self.steps.optimizer.param_groups:
            group["lr"] = rate
        found = train_step(
            self.steps, self.codebooks, self.batch(pixels), config, self.variance, self.images_seen
        )
        if found is None:
            raise SystemExit("a loss or gradient of ours is not finite")
        metrics, codes, revived = found
        self.images_seen += config.batch_size
        self.average.update(self.model, config.batch_size, self.images_seen)
        self.means.add(metrics)
        self.use.add(codes, revived)
        return metrics["loss/reconstruction"]


@torch.no_grad()
def copy_weights(ours: VQVAE, usual: UsualVQVAE) -> None:
    """Makes `ours` the same function as `usual`."""
    to_latents: Any = ours.to_latents[1]
    pairs = [
        (ours.encoders[0], usual.encoder_top),
        (ours.encoders[1], usual.encoder_bottom),
        (ours.to_latents[0], usual.to_latents_top),
        (to_latents, usual.to_latents_bottom),
        (ours.conditioners[0], usual.decoder_top),
        (ours.upsamplers[0], usual.upsample_top),
        (ours.decoder, usual.decoder),
    ]
    for own, other in pairs:
        for own_weight, weight in zip(own.parameters(), other.parameters(), strict=True):
            own_weight.copy_(weight)
    # the bottom latents see features and the decoding of the top, there in the other order
    weight = usual.to_latents_bottom.weight
    to_latents.weight.copy_(weight.roll(-ours.config.code_dim, dims=1))
    quantizers: list[Any] = [*ours.quantizers, usual.quantizer_top, usual.quantizer_bottom]
    for own, other in zip(quantizers[:2], quantizers[2:], strict=True):
        own.codebook.copy_(other.codebook.t())


def make_config(name: str, size: int, batch: int) -> TrainVQVAE:
    """The stage's config, with the published number of residual channels."""
    options = {
        "config": ROOT / "configs" / name / "train_vqvae.yaml", "data": "-", "out": "-",
        "image_size": size, "batch_size": batch, "model.residual_channels": 32,
    }  # fmt: skip
    return stage.parse(TrainVQVAE, [f"--{key}={value}" for key, value in options.items()])


def drawn_faces(count: int, size: int) -> torch.Tensor:
    """(count, size, size, 3) uint8."""
    faces = [np.asarray(draw_face(sample_face(0, index), size)) for index in range(count)]
    return torch.from_numpy(np.stack(faces))


def first_steps(name: str, step: Step, batches: list[torch.Tensor]) -> dict:
    """Makes them; the errors of the first and of the last ones."""
    first = float(step(batches[0]))
    if isinstance(step, Ours):  # as in a run, but after the one step with the codes of `usual`
        step.start_codebooks(batches[0])
    errors = [float(step(batches[i % BATCHES])) for i in range(1, CHECK_STEPS)]
    if not math.isfinite(first + sum(errors)):
        raise SystemExit(f"{name}: errors {[first, *errors]}")
    # of pixels in [0, 1]; those of the others are twice as wide
    scale = 1.0 if isinstance(step, Ours) else 0.25
    return {"first_mse": scale * first, "last_mse": scale * statistics.mean(errors[-BATCHES:])}


def check_ours(row: dict, usual: dict, exact: bool) -> None:
    """Ends the script where our network is not the usual one, or does not learn."""
    tolerance = TOLERANCE["fp32" if exact else "other"]
    if row["parameters"] != usual["parameters"]:
        raise SystemExit(f"not as large as `usual`: {row}")
    if abs(row["first_mse"] / usual["first_mse"] - 1) > tolerance:
        raise SystemExit(f"first_mse is not that of `usual`, {usual['first_mse']}: {row}")
    if row["last_mse"] >= row["first_mse"]:
        raise SystemExit(f"does not learn: {row}")


def contenders(
    device: str, config: TrainVQVAE, variance: float, published: Path | None
) -> dict[str, Callable[[], tuple[torch.nn.Module, Step]]]:
    """name -> a function that makes the network and its step."""
    torch.manual_seed(0)
    initial = UsualVQVAE().to(device)

    def usual(quantizer):
        model = UsualVQVAE(quantizer).to(device)
        model.load_state_dict(initial.state_dict(), strict=quantizer is OneHotQuantizer)
        return model, UsualStep(model)

    def imported():
        assert published is not None
        model = published_network(published).to(device)
        values = initial.state_dict().values()
        model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
        return model, UsualStep(model)

    def ours(way: Way):
        step = Ours(way, config, variance, initial)
        return step.model, step

    makers: dict[str, Callable[[], tuple[torch.nn.Module, Step]]] = {
        "usual": lambda: usual(OneHotQuantizer),
        "usual, vector-quantize-pytorch": lambda: usual(VectorQuantizePytorch),
    }
    if published is not None:
        makers["published"] = imported
    ways = ADDITIONS | {
        "ours-fp32": dataclasses.replace(OURS[device], bf16=False),
        "ours": OURS[device],
    }
    for name, way in ways.items():
        makers[name] = functools.partial(ours, way)
    return makers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--peer_repository", type=Path, help="checkout of vq-vae-2-pytorch")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: no CUDA device here")

    name, size, batch = CASES[device]
    case = f"{size} px, batch {batch}"
    pixels = drawn_faces(BATCHES * batch, size).to(device)
    ours_batches = list(pixels.split(batch))
    usual_batches = [to_usual(part) for part in ours_batches]
    config = make_config(name, size, batch)
    variance = float(pixels.double().div(255).var(correction=0))

    rows, timers, skipped = {}, {}, []
    makers = contenders(device, config, variance, arguments.peer_repository)
    for name, make in makers.items():
        try:
            model, step = make()
            batches = ours_batches if isinstance(step, Ours) else usual_batches
            row = {"contender": name, "case": case, "device": device}
            row["parameters"] = sum(weight.numel() for weight in model.parameters())
            row |= first_steps(name, step, batches)
            if isinstance(step, Ours):
                check_ours(row, rows["usual"], exact=device == "cpu" and not step.way.bf16)
            call = repeated(step, batches, STEPS[device])
            row["peak_mib"] = peak_mib(call, device)
            timers[name] = CudaTimer([call], None) if device == "cuda" else CpuTimer(call)
        except (Absent, torch.OutOfMemoryError) as error:
            reason = str(error) if isinstance(error, Absent) else "not enough memory"
            skipped.append(f"{name}: {reason}")
            continue
        rows[name] = row

    times = take_turns(timers, arguments.rounds)
    steps, before = STEPS[device], None
    for name, row in rows.items():
        row["median_ms"] = statistics.median(times[name]) / steps
        row["min_ms"] = min(times[name]) / steps
        row["images_per_sec"] = 1e3 * batch / row["median_ms"]
        row["speedup"] = median_ratio(times["usual"], times[name])
        if name in ADDITIONS:
            row["gain"] = median_ratio(times[before], times[name]) if before else None
            before = name
    print_table(case, list(rows.values()), skipped)
    write_json(arguments.json, list(rows.values()), device, skipped=skipped)


def repeated(step: Step, batches: list[torch.Tensor], count: int) -> Callable[[], None]:
    """`count` steps, each with the next batch."""
    endless = itertools.cycle(batches)

    def call() -> None:
        for _ in range(count):
            step(next(endless))

    return call


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    main()
