"""VAE and IWAE on MNIST, binarized anew for each batch: L_5000 beside the published values.

    python benchmarks/iwae_mnist.py --data DIR --out runs/bench/iwae_mnist \\
        --json docs/benchmarks/iwae_mnist.json                          the published schedule
    python benchmarks/iwae_mnist.py ... --stages 3 --test_images 1000   the short one for a CPU

DIR holds MNIST's idx files. Setting: Burda, Grosse and Salakhutdinov, Importance Weighted
Autoencoders (ICLR 2016), section 5 and table 1: 50 latent units, two tanh layers of 200 on each
side, Bernoulli pixels, batches of 20, Adam, 3^i passes at a learning rate of 1e-3 · 10^(-i/7) for
i = 0 ... 7. Started again with the same --out it goes on where it stopped, also with more --stages
or --test_images.

All models of one k, VAE and IWAE from three seeds, are trained stacked: one batched product per
layer, one Adam. At k = 1 both have the same objective, so they are trained once and reported twice.
The VAE and the IWAE of a seed start from the same weights and see the same images, binarizations
and noise; those of two seeds share nothing.

As in the authors' code (github.com/yburda/iwae): initial weights, the output bias, and gradients
summed over the batch, not averaged, which matters because Adam's epsilon of 1e-4 has a scale. As in
the paper and unlike the code: Adam's beta1 is 0.9, not 0.99, and its second moments start at 0, not
1. Unlike both: all 60,000 training images, none held out (they kept 400 back), in a new order in
each pass.

The table has the mean over seeds of -L_5000 in nats per image; `standard_error` is of that mean
over the test images, all models meet the same ones. `gain` is what the IWAE gains on the VAE of its
k, over the same images. `hours` are those of training all models of a k, `cpu_hours` the processor
time of them.

On one core of an AMD EPYC with AVX-512, shared with other work, an update of all models of
k = 1, 5, 50 took 8, 24 and 140 ms: 2 hours for three stages (13 passes), 470 for the published
eight (3,280 passes, 9.84 million updates). L_5000 took 0.15, 0.3 and 0.3 s per test image.
"""

import argparse
import functools
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from measure import print_table, refuse, write_json
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pipeline.data import idx
from pipeline.data.order import permute
from pipeline.evaluation.likelihood import importance_log_likelihood
from pipeline.models.vae.densities import log_mean_exp
from pipeline.stage import UserError
from pipeline.training.checkpoint import (
    Checkpoints,
    fault_of,
    load_optimizer_tensors,
    optimizer_tensors,
    refuse_changed_config,
    write_directory,
)
from pipeline.training.tracking import progress_bar

PUBLISHED = {  # table 1, one stochastic layer: -L_5000 in nats, active units
    ("VAE", 1): (86.76, 19), ("VAE", 5): (86.47, 20), ("VAE", 50): (86.35, 20),
    ("IWAE", 1): (86.76, 19), ("IWAE", 5): (85.54, 22), ("IWAE", 50): (84.78, 25),
}  # fmt: skip
SEEDS = (0, 1, 2)
HIDDEN, LATENTS = 200, 50
BATCH_SIZE = 20
MAX_STAGES = 8
NUM_SAMPLES = 5000  # of L_5000
CHUNK = 500  # samples at a time; more than fit into a cache are slower
ACTIVE_VARIANCE = 1e-2
SAVE_EVERY_SEC = 300.0
TEST_SEED = 255  # of the test images' binarization and of the noise of their estimate


def generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """The random stream of a seed below 256 and a number below 2^24: 0 for the initial weights,
    t for update t."""
    # the CPU's generator looks at no more than 32 bits of a seed
    return torch.Generator(device).manual_seed(seed << 24 | number)


class StackedLinear(nn.Module):
    """M linear layers side by side, (M, N, inputs) -> (M, N, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Stack(nn.Module):
    """M VAEs of one shape, each with its own weights: p(z) = N(0, I), q(z|x) = N(mean, std²),
    p(x|z) Bernoulli for each of P pixels.

    Args:
        mean_image: (P,) in [0, 1], of the training images; its logit is the first output bias.
        seeds: of the initial weights, one per member.
    """

    def __init__(self, mean_image: torch.Tensor, seeds: Sequence[int], hidden: int, latents: int):
        super().__init__()
        members, pixels = len(seeds), len(mean_image)
        self.encoder1 = StackedLinear(members, pixels, hidden)
        self.encoder2 = StackedLinear(members, hidden, hidden)
        self.mean = StackedLinear(members, hidden, latents)
        self.log_std = StackedLinear(members, hidden, latents)
        self.decoder1 = StackedLinear(members, latents, hidden)
        self.decoder2 = StackedLinear(members, hidden, hidden)
        self.logits = StackedLinear(members, hidden, pixels)
        with torch.no_grad():
            self.logits.bias.copy_(mean_image.logit(1e-3))
            for member, seed in enumerate(seeds):
                stream = generator(seed, 0, torch.device("cpu"))
                for layer in self.children():
                    assert isinstance(layer, StackedLinear)
                    nn.init.xavier_uniform_(layer.weight[member], generator=stream)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images (M, B, P) -> mean and log standard deviation of q(z|x), each (M, B, D)."""
        hidden = self.encoder2(self.encoder1(images).tanh()).tanh()
        return self.mean(hidden), self.log_std(hidden)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (M, N, D) -> logits of the pixels (M, N, P)."""
        return self.logits(self.decoder2(self.decoder1(latents).tanh()).tanh())

    def log_weights(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """log p(x, z) - log q(z|x), (M, B, k), at the reparameterised samples of q(z|x).

        images: (M, B, P) of 0 and 1. noise: (M, B, k, D) standard normal.
        """
        mean, log_std = self.encode(images)
        latents = mean[:, :, None] + log_std.exp()[:, :, None] * noise
        logits = self.decode(latents.flatten(1, 2)).unflatten(1, latents.shape[1:3])
        # log p(x|z) is the sum over pixels of x · logit - softplus(logit)
        log_likelihood = (logits @ images[..., None]).squeeze(-1) - F.softplus(logits).sum(-1)
        # log p(z) - log q(z|x): the factors (2 pi)^(-D/2) cancel
        log_ratio = (noise.square() - latents.square()).sum(-1) / 2 + log_std.sum(-1, keepdim=True)
        return log_likelihood + log_ratio


OBJECTIVES = {  # log weights (M, B, k) -> what is maximised, (M, B); with k = 1 they are the same
    "VAE": lambda log_weights: log_weights.mean(-1),  # the ELBO
    "IWAE": lambda log_weights: log_mean_exp(log_weights, -1),  # L_k, equation 8
}


class Group:
    """The models trained with k samples, in one stack with its optimizer: for each objective a
    member per seed.

    Args:
        images: (N, P) uint8, the training images; N is a multiple of BATCH_SIZE.
    """

    def __init__(self, k: int, images: torch.Tensor, seeds: Sequence[int] = SEEDS):
        self.k, self.images, self.seeds = k, images, seeds
        self.objectives = ("VAE",) if k == 1 else ("VAE", "IWAE")
        mean_image = images.sum(0).double().cpu() / (255 * len(images))
        members = [*seeds] * len(self.objectives)
        self.stack = Stack(mean_image, members, HIDDEN, LATENTS).to(images.device)
        # Adam works element by element, so one serves all members
        self.optimizer = torch.optim.Adam(self.stack.parameters(), eps=1e-4, fused=True)

    def draw(self, update: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Binarized images (M, B, P) and noise (M, B, k, D) of an update, counted from 1."""
        epoch, batch = divmod(update - 1, len(self.images) // BATCH_SIZE)
        images, noise = [], []
        for seed in self.seeds:
            order = epoch_order(len(self.images), seed, epoch)
            chosen = order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
            pixels = self.images[torch.from_numpy(chosen)]
            stream = generator(seed, update, pixels.device)
            images.append(binarize(pixels, stream))
            shape = (BATCH_SIZE, self.k, LATENTS)
            noise.append(torch.randn(shape, generator=stream, device=pixels.device))
        copies = len(self.objectives)
        return torch.stack(images * copies), torch.stack(noise * copies)

    def step(self, images: torch.Tensor, noise: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """One update of all members; returns what they maximise, (M, B) in nats."""
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate
        parts = self.stack.log_weights(images, noise).chunk(len(self.objectives))
        named = zip(self.objectives, parts, strict=True)
        bounds = torch.cat([OBJECTIVES[name](part) for name, part in named])
        self.optimizer.zero_grad()
        (-bounds.sum()).backward()
        self.optimizer.step()
        return bounds.detach()


def binarize(pixels: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """Bernoulli draws, float32 0 or 1, of uint8 pixels as probabilities from 0 to 255/255."""
    uniform = torch.rand(pixels.shape, generator=stream, device=pixels.device)
    return (uniform < pixels.float() / 255).float()


@functools.lru_cache(maxsize=2 * len(SEEDS))
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """(num_images,) int64; kept, because it is asked for batch by batch."""
    return permute(np.arange(num_images), num_images, seed, epoch)


def num_passes(stages: int) -> int:
    """Over the training images in that many stages; stage i has 3^i."""
    return (3**stages - 1) // 2


def learning_rate(passes: int) -> float:
    """After that many passes: 1e-3 · 10^(-i/7) in stage i."""
    stage = next(i for i in range(MAX_STAGES) if passes < num_passes(i + 1))
    return 1e-3 * 10 ** (-stage / 7)


class Trained(NamedTuple):
    """A group's training: images seen by each model; wall-clock and processor time of them all."""

    images_seen: int
    sec: float
    cpu_sec: float


def train(group: Group, stages: int, out: Path) -> Trained:
    """Trains from the newest checkpoint in `out` to the end of the last stage. UserError if the
    checkpoint is of another or of a longer run, or if training diverges."""
    checkpoints, config = Checkpoints(out), {"k": group.k, "seeds": [*group.seeds]}
    update, sec, cpu_sec = 0, 0.0, 0.0
    if checkpoint := checkpoints.newest():
        refuse_changed_config(checkpoint.state["config"], config, out)
        group.stack.load_state_dict(checkpoint.tensors("model"))
        load_optimizer_tensors(group.optimizer, group.stack, checkpoint.tensors("optimizer"))
        update = checkpoint.images_seen // BATCH_SIZE
        sec, cpu_sec = checkpoint.state["sec"], checkpoint.state["cpu_sec"]
    per_pass = len(group.images) // BATCH_SIZE
    last = num_passes(stages) * per_pass
    if update > last:
        raise UserError(
            f"{out} is trained beyond --stages {stages}: ask for more, or another --out"
        )

    wall, cpu = time.perf_counter(), time.process_time()
    with progress_bar(last, f"k={group.k}", update, "updates") as bar:
        while update < last:
            update += 1
            bounds = group.step(*group.draw(update), learning_rate((update - 1) // per_pass))
            bar.update()
            if update < last and time.perf_counter() - wall < SAVE_EVERY_SEC:
                continue
            if not bool(bounds.isfinite().all()):
                raise UserError(f"k={group.k} diverged before update {update:,}")
            sec, wall = sec + time.perf_counter() - wall, time.perf_counter()
            cpu_sec, cpu = cpu_sec + time.process_time() - cpu, time.process_time()
            tensors = {
                "model": group.stack.state_dict(),
                "optimizer": optimizer_tensors(group.optimizer, group.stack),
            }
            state = {"config": config, "sec": sec, "cpu_sec": cpu_sec}
            checkpoints.save(update * BATCH_SIZE, tensors, state)
            for old in sorted(checkpoints.root.glob("images-*"))[:-2]:
                shutil.rmtree(old)
            bar.set_postfix(bound=f"{float(bounds.mean()):.1f}", refresh=False)
    return Trained(update * BATCH_SIZE, sec, cpu_sec)


@torch.no_grad()
def evaluate(stack: Stack, images: torch.Tensor, path: Path) -> torch.Tensor:
    """log p(x) by L_5000, and the ELBO, of binarized images (N, P): (N, 2, M) float64 nats.

    Kept in the directory `path`; what is there already is not computed again. All members meet the
    same noise.
    """
    members = len(stack.mean.bias)
    estimates = torch.empty(0, 2, members, dtype=torch.float64)
    if fault_of(path) is None:
        estimates = load_file(path / "estimates.safetensors")["estimates"][: len(images)]
    parts, saved = [*estimates], time.perf_counter()
    with progress_bar(len(images), f"{path.parent.name}: L_{NUM_SAMPLES}", len(parts)) as bar:
        while len(parts) < len(images):
            image = images[len(parts)].expand(members, 1, -1)
            stream = generator(TEST_SEED, len(parts) + 1, images.device)
            found = importance_log_likelihood(
                functools.partial(log_weights_of, stack, image, stream), NUM_SAMPLES, CHUNK
            )
            parts.append(torch.stack([found.log_likelihood, found.elbo]).cpu())
            bar.update()
            if len(parts) == len(images) or time.perf_counter() - saved > SAVE_EVERY_SEC:
                write_directory(path, {"estimates": {"estimates": torch.stack(parts)}}, {})
                saved = time.perf_counter()
    return torch.stack(parts)


def log_weights_of(
    stack: Stack, image: torch.Tensor, stream: torch.Generator, count: int
) -> torch.Tensor:
    """(count, M) of one image (M, 1, P), under the same noise for all members."""
    shape = (1, 1, count, LATENTS)
    noise = torch.randn(shape, generator=stream, device=image.device, dtype=image.dtype)
    return stack.log_weights(image, noise)[:, 0].T


@torch.no_grad()
def active_units(stack: Stack, images: torch.Tensor) -> torch.Tensor:
    """(M,) int64: latent units whose posterior mean varies over binarized images (N, P) by more
    than 0.01."""
    mean, _ = stack.encode(images.expand(len(stack.mean.bias), -1, -1))
    return (mean.var(1, correction=0) > ACTIVE_VARIANCE).sum(-1)


def table(
    group: Group, trained: Trained, estimates: torch.Tensor, active: torch.Tensor
) -> list[dict]:
    """A row per objective, of what `evaluate` and `active_units` return."""
    models = (len(group.objectives), len(group.seeds))
    nll, negative_elbo = -estimates.unflatten(2, models).movedim(0, -1)  # (objectives, seeds, N)
    rows = []
    for i, name in enumerate(group.objectives):
        published, published_active = PUBLISHED[name, group.k]
        row = {
            "model": name,
            "k": group.k,
            "nll": float(nll[i].mean()),
            "standard_error": standard_error(nll[i].mean(0)),
            "published": published,
            "nll_of_seeds": [round(value, 2) for value in nll[i].mean(1).tolist()],
            "negative_elbo": float(negative_elbo[i].mean()),
            "active_units": active.unflatten(0, models)[i].tolist(),
            "published_active_units": published_active,
            "hours": trained.sec / 3600,
            "cpu_hours": trained.cpu_sec / 3600,
        }
        if name == "IWAE":
            gain = (nll[0] - nll[1]).mean(0)
            row |= {"gain": float(gain.mean()), "gain_standard_error": standard_error(gain)}
        rows.append(row)
    return rows if group.k > 1 else [rows[0], rows[0] | {"model": "IWAE"}]


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def read(data: Path, part: str) -> torch.Tensor:
    """The images of "train" or "t10k", (N, 784) uint8."""
    images = idx.read_images(str(idx.find(data, part, "images-idx3")))
    return torch.from_numpy(images.copy()).flatten(1)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with MNIST's files")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoints go")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--stages", type=int, default=8, choices=range(1, MAX_STAGES + 1))
    parser.add_argument("--test_images", type=int, default=10_000, help="the first ones")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 50], choices=[1, 5, 50])
    options = parser.parse_args(words)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, test = read(options.data, "train").to(device), read(options.data, "t10k")
    if not 2 <= options.test_images <= len(test):
        raise UserError(f"--test_images must be in 2..{len(test)}, got {options.test_images}")
    # drawn on the CPU, so that the models of every device meet the same images
    test = binarize(test, generator(TEST_SEED, 0, test.device)).to(device)
    rows = []
    for k in options.k:
        group, out = Group(k, images), options.out / f"k{k}"
        trained = train(group, options.stages, out)
        path = out / f"evaluation-{trained.images_seen:09d}"
        estimates = evaluate(group.stack, test[: options.test_images], path)
        rows += table(group, trained, estimates, active_units(group.stack, test))
        write_json(
            options.json, rows, device.type, training_images=len(images),
            test_images=options.test_images, passes=num_passes(options.stages),
        )  # fmt: skip
    print_table(f"{num_passes(options.stages):,} passes, {options.test_images:,} test images", rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        refuse(f"error: {error}")
