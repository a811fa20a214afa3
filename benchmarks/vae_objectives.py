"""What the objectives of a VAE do, on models small enough to know the answer: tables and charts.

    python benchmarks/vae_objectives.py --json docs/benchmarks/vae_objectives.json --pictures docs

    mixture      a mixture of three Gaussians in the plane, fitted by every objective
    dimension    where prior Monte Carlo fails as the latent grows: its gradient and the true one
    gradients    variance of the encoder's gradient: score function, (doubly) reparameterised
    reduction    what means in place of sums over pixels and latent dimensions do to the KL
    posterior    a nonlinear decoder's posterior, on a grid, is not Gaussian
    information  a higher ELBO is not more information in z: models that reach it with none

`--only` takes some of them, the rows of the others stay. Figures are in nats per point or image, of
one training run each; about 6 minutes on 2 slow cores. `--quick` only shows that everything runs.
Points of the plane are images of one pixel with two channels.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import torch
from measure import text, write_json
from PIL import Image
from scipy.optimize import minimize, minimize_scalar
from scipy.signal import find_peaks
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from pipeline.data.faces import draw_face, sample_face
from pipeline.evaluation.information import (
    Information,
    aggregate_information,
    diagonal_gaussian_log_q,
)
from pipeline.evaluation.likelihood import ImportanceEstimate, importance_log_likelihood
from pipeline.models.vae.distributions import DiagonalGaussian
from pipeline.models.vae.objectives import Objective, all_bits, evaluate
from pipeline.models.vae.vae import VAE, VAEConfig

matplotlib.use("Agg")
from matplotlib import pyplot

# the colours of Okabe and Ito, which colour-blind readers tell apart
BLACK, ORANGE, SKY, GREEN, BLUE, RED = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00",
)  # fmt: skip
MARKERS = "osv^D"
ONE = torch.ones(())


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; the defaults made the figures in docs/."""

    plane_steps: int = 3000
    """Training steps of the models of the plane."""
    image_steps: int = 1500
    """Training steps of those of digits and faces."""
    held_out: int = 1000
    """Points that a figure is the mean of."""
    num_samples: int = 5000
    """k of the importance-weighted NLL."""
    grid: int = 401
    """Values of each dimension of z in an integral."""
    batch: int = 256
    """Points in the batch of a linear decoder's gradient."""
    repeats: int = 6
    """Estimates of a gradient whose error is reported."""
    draws: int = 300
    """Estimates of a gradient whose variance is reported."""
    dimensions: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """D of the linear decoders."""
    faces: int = 1000
    """Drawn faces to train on."""


QUICK = Sizes(
    plane_steps=2, image_steps=2, held_out=12, num_samples=10, grid=41, batch=8, repeats=1,
    draws=3, dimensions=(1, 4), faces=12,
)  # fmt: skip


# Parts of several experiments.


def nothing(count: int) -> torch.Tensor:
    """y without a condition."""
    return torch.zeros(count, 0)


def loss_of(model: Any, images: torch.Tensor, objective: Objective) -> torch.Tensor:
    return evaluate(model, images, nothing(len(images)), objective, ONE)["loss"]


def fit(
    model: VAE,
    batches: Iterator[torch.Tensor],
    objective: Objective,
    steps: int,
    learning_rate: float,
    loss: Callable[[dict], torch.Tensor] = lambda values: values["loss"],
) -> list[dict[str, float]]:
    """Trains by Adam, its rate a cosine to 0. What the objective reported at each step."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for _ in range(steps):
        images = next(batches)
        values = model(images, nothing(len(images)), objective, ONE)
        optimizer.zero_grad()
        loss(values).backward()
        optimizer.step()
        schedule.step()
        history.append({name: float(value.detach()) for name, value in values.items()})
    return history


def batches_of(images: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    while True:
        yield images[torch.randint(len(images), (size,))]


@functools.cache
def truth() -> MixtureSameFamily:
    """Three Gaussians of equal weight in [0, 1]², with standard deviations of about 0.09 and 0.03
    along axes that are turned by 45, -30 and 0 degrees."""
    means = torch.tensor([[0.25, 0.30], [0.75, 0.35], [0.50, 0.75]])
    turned = ([[0.0045, 0.0036], [0.0036, 0.0045]], [[0.0063, -0.0031], [-0.0031, 0.0027]],
              [[0.0081, 0.0], [0.0, 0.0009]])  # fmt: skip
    return MixtureSameFamily(
        Categorical(torch.ones(3)), MultivariateNormal(means, torch.tensor(turned))
    )


def points(count: int) -> torch.Tensor:
    """Draws from the truth, (count, 2, 1, 1)."""
    return truth().sample((count,))[..., None, None]


def plane_model(**changes: Any) -> VAE:
    """A VAE of points of the plane. Its decoder's variance is learned, one for all points."""
    values = {"network": "mlp", "channels": 32, "latent_dim": 2, "image_size": 1, "in_channels": 2,
              "likelihood": "gaussian_global", "variance": 0.01}  # fmt: skip
    return VAE(VAEConfig(**values | changes))


def fit_plane(objective: Objective, steps: int, **changes: Any) -> VAE:
    """Trained on ever new points, 128 a step."""
    torch.manual_seed(0)
    model = plane_model(**changes)
    fit(model, iter(lambda: points(128), None), objective, steps, learning_rate=1e-2)
    return model


@functools.cache
def digits() -> torch.Tensor:
    """scikit-learn's handwritten digits in [0, 1], shuffled: (1797, 1, 8, 8)."""
    images = torch.from_numpy(load_digits(return_X_y=True)[0]).float().view(-1, 1, 8, 8) / 16
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def log_joint(model: VAE, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """log p(x, z) of all pairs, images (B, ...) and z (S, D) -> (S, B) float64."""
    y = nothing(len(images))
    parts = [
        model.log_likelihood(images, part, y) + model.prior(y[:1]).log_prob(part)
        for part in z[:, None].split(20_000)
    ]
    return torch.cat(parts).double()


def latent_grid(latents: int, size: int) -> tuple[torch.Tensor, float]:
    """All z of an even grid on [-5, 5]^D, (size^D, D), and the log volume of a cell."""
    line = torch.linspace(-5, 5, size)
    z = torch.cartesian_prod(*[line] * latents).view(-1, latents)
    return z, latents * math.log(line[1] - line[0])


def by_quadrature(model: VAE, images: torch.Tensor, size: int) -> torch.Tensor:
    """log p(x) (B,), the integral over z."""
    z, log_cell = latent_grid(model.config.latent_dim, size)
    return log_joint(model, images, z).logsumexp(0) + log_cell


def by_enumeration(model: VAE, images: torch.Tensor) -> torch.Tensor:
    """log p(x) (B,), the sum over all bits."""
    return log_joint(model, images, all_bits(model.config.latent_dim)).logsumexp(0)


def by_importance(model: VAE, images: torch.Tensor, num_samples: int) -> ImportanceEstimate:
    """log p(x) (B,), and the ELBO, estimated with z from the encoder."""
    y = nothing(len(images))
    q, prior = model.posterior(images, y), model.prior(y)

    def log_weights(count: int) -> torch.Tensor:
        z, log_q = q.draw(count)
        return model.log_likelihood(images, z, y) + prior.log_prob(z) - log_q

    return importance_log_likelihood(log_weights, num_samples, chunk=50)


# A mixture of three Gaussians, fitted by every objective.

BITS = {"posterior": "bernoulli", "latent_dim": 4}
FITS = {  # model and objective; of bits, the ELBO's samples are each other's baseline
    "exact, 4 bits": (BITS, Objective(name="exact")),
    "importance, k = 20, 4 bits": (BITS, Objective(name="importance", num_samples=20)),
    "elbo, 4 samples, 4 bits": (BITS, Objective(num_samples=4)),
    "prior-mc, k = 200": ({}, Objective(name="prior-mc", num_samples=200)),
    "importance, k = 20": ({}, Objective(name="importance", num_samples=20)),
    "elbo, 1 sample": ({}, Objective()),
    "iwae, k = 20": ({}, Objective(name="iwae", num_samples=20)),
}


def mixture(sizes: Sizes, picture: Path) -> list[dict]:
    """NLL of held-out points after training by each objective, and draws from each model.

    `excess` is by how much it exceeds the truth's NLL of the same points, an estimate of KL(truth
    || model); the NLLs themselves vary with the points by `nll_error`.
    """
    torch.manual_seed(1)
    held_out, shown = points(sizes.held_out), [points(600)]
    log_truth = truth().log_prob(held_out[..., 0, 0]).double()
    entropy = -float(truth().log_prob(truth().sample((200_000,))).mean())
    rows: list[dict] = [
        {"contender": "truth", "nll": -float(log_truth.mean()),
         "nll_error": standard_error(log_truth), "entropy": entropy}
    ]  # fmt: skip
    for name, (changes, objective) in FITS.items():
        model = fit_plane(objective, sizes.plane_steps, **changes)
        with torch.no_grad():
            integral = None
            if changes:
                log_px = by_enumeration(model, held_out)
            else:
                log_px = by_importance(model, held_out, sizes.num_samples).log_likelihood
                integral = -float(by_quadrature(model, held_out, sizes.grid).mean())
            z = model.prior(nothing(600)).draw(1)[0][0]
            shown.append(model.decode_draw(z, nothing(600)))
        excess = log_truth - log_px
        rows.append(
            {
                "contender": name,
                "nll": -float(log_px.mean()),
                "nll_error": standard_error(log_px),
                "nll_by_quadrature": integral,
                "excess": float(excess.mean()),
                "excess_error": standard_error(excess),
            }
        )
    draw_mixture(rows, shown, picture)
    return rows


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def draw_mixture(rows: list[dict], shown: list[torch.Tensor], picture: Path) -> None:
    figure, axes = pyplot.subplots(
        2, 4, figsize=(10.5, 5.9), layout="constrained", sharex=True, sharey=True
    )
    parts = truth().component_distribution
    assert isinstance(parts, MultivariateNormal)
    angle = torch.linspace(0, 2 * math.pi, 100)
    circle = 2 * torch.stack([angle.cos(), angle.sin()])
    for ax, row, drawn in zip(axes.flat, rows, shown, strict=True):
        for mean, root in zip(parts.mean, parts.scale_tril, strict=True):
            ax.plot(*(mean[:, None] + root @ circle), color=ORANGE, linewidth=1)
        colour, title = BLUE, f"{row['contender']}\nNLL {row['nll']:.2f}"
        if "excess" in row:
            title += f", {row['excess']:.2f} above the truth"
        else:
            colour, title = BLACK, f"data\nNLL {row['nll']:.2f}, entropy {row['entropy']:.2f}"
        ax.scatter(*drawn[..., 0, 0].T, s=3, color=colour, alpha=0.5, linewidths=0)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set_title(title, fontsize=9)
    figure.supxlabel("x1", fontsize=10)
    figure.supylabel("x2", fontsize=10)
    figure.suptitle("600 draws each; NLL of held-out points in nats; outlines: the truth, 2 sd")
    save(figure, picture)


def save(figure: Any, picture: Path) -> None:
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
    # a palette makes the file a third as large; the octree is the method that keeps thin lines
    palette = Image.open(picture).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    palette.save(picture, optimize=True)


# Prior Monte Carlo, as the latent grows.


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x|z ~ N(W z, variance I), with x (B, d), and W (d, D) of orthogonal columns, so
    that log p(x) is known and so is the posterior, whose covariance is diagonal. It has what
    objectives.py needs of a VAE.

    Args:
        fault: of the encoder: how far its means are off, in posterior standard deviations.
    """

    config = SimpleNamespace(has_density=True)

    def __init__(self, weight: torch.Tensor, variance: float, fault: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.variance, self.fault = variance, fault

    def dequantizer(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x.new_zeros(len(x))

    def prior(self, y: torch.Tensor) -> DiagonalGaussian:
        zeros = torch.zeros(len(y), self.weight.shape[1])
        return DiagonalGaussian(zeros, zeros)

    def posterior(self, x: torch.Tensor, y: torch.Tensor) -> DiagonalGaussian:
        weight = self.weight.detach()  # the encoder has parameters of its own
        precision = 1 + weight.square().sum(0) / self.variance
        mean = x @ weight / self.variance / precision
        mean = mean + self.fault * torch.randn_like(mean) / precision.sqrt()
        return DiagonalGaussian(mean, -precision.log().expand_as(mean))

    def log_likelihood(self, x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        means = z @ self.weight.T  # (m, B or 1, d)
        # |x - W z|² without an (m, B, d) tensor where all points share z
        cross = means[:, 0] @ x.T if z.shape[1] == 1 else (means * x).sum(-1)
        squares = x.square().sum(-1) - 2 * cross + means.square().sum(-1)
        return -0.5 * (squares / self.variance + x.shape[1] * math.log(2 * math.pi * self.variance))

    def decode_draw(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mean = z @ self.weight.detach().T
        return mean + math.sqrt(self.variance) * torch.randn_like(mean)

    def log_evidence(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x) (B,)."""
        covariance = self.weight @ self.weight.T + self.variance * torch.eye(len(self.weight))
        return MultivariateNormal(torch.zeros(len(covariance)), covariance).log_prob(x)


PIXELS = 64  # d
SIGNAL = 3.0  # standard deviation of what one latent dimension adds to x, whose noise has 1
ESTIMATES = {  # objective, the encoder's fault, colour
    "prior-mc, k = 100": (Objective(name="prior-mc", num_samples=100), 0.0, RED),
    "prior-mc, k = 10,000": (Objective(name="prior-mc", num_samples=10_000), 0.0, ORANGE),
    "elbo, 1 sample, exact encoder": (Objective(), 0.0, SKY),
    "elbo, 1 sample, encoder off by 0.5 sd": (Objective(), 0.5, BLUE),
    "importance, k = 100, encoder off by 0.5 sd": (
        Objective(name="importance", num_samples=100), 0.5, GREEN,
    ),
}  # fmt: skip


def dimension(sizes: Sizes, picture: Path) -> list[dict]:
    """The gradient of W at half of the true W, against that of log p(x); and the multiple of the
    true W at which each objective is best. Medians over repeats, with new points and noise each.
    Every latent dimension adds the same amount of information, about 1.15 nats."""
    rows = []
    for dim in sizes.dimensions:
        torch.manual_seed(dim)
        weight = SIGNAL * torch.linalg.qr(torch.randn(PIXELS, PIXELS)).Q[:, :dim]
        true = LinearGaussian(weight, 1.0)
        for name, (objective, fault, _) in ESTIMATES.items():
            found = []
            for repeat in range(sizes.repeats):
                torch.manual_seed(repeat)
                x = true.decode_draw(torch.randn(sizes.batch, dim), nothing(sizes.batch))
                model = LinearGaussian(weight / 2, 1.0, fault)
                (target,) = torch.autograd.grad(-model.log_evidence(x).mean(), model.weight)
                (gradient,) = torch.autograd.grad(loss_of(model, x, objective), model.weight)
                noise = 1000 + repeat  # not the seed of x: prior Monte Carlo would draw its very z
                best = best_multiple(weight, x, objective, fault, noise)
                found.append([*against(gradient, target), float(target.norm()), best])
            keys = "relative_error", "relative_norm", "cosine", "true_norm", "best_multiple"
            medians = torch.tensor(found).median(0).values.tolist()
            rows.append({"contender": name, "D": dim, **dict(zip(keys, medians, strict=True))})
    draw_dimension(rows, sizes.dimensions, picture)
    return rows


def against(gradient: torch.Tensor, target: torch.Tensor) -> tuple[float, float, float]:
    """Relative error, relative norm and cosine."""
    relative_norm = gradient.norm() / target.norm()
    cosine = (gradient * target).sum() / (gradient.norm() * target.norm())
    return float((gradient - target).norm() / target.norm()), float(relative_norm), float(cosine)


@torch.no_grad()
def best_multiple(
    weight: torch.Tensor, x: torch.Tensor, objective: Objective, fault: float, seed: int
) -> float:
    """The c in (0, 1.5) at which the objective of the weight c W is best, the noise being fixed."""

    def loss(multiple: float) -> float:
        torch.manual_seed(seed)
        return float(loss_of(LinearGaussian(multiple * weight, 1.0, fault), x, objective))

    found: Any = minimize_scalar(loss, bounds=(0, 1.5), method="bounded", options={"xatol": 0.02})
    return float(found.x)


def predicted_multiple(k: int, dim: int) -> float:
    """What best_multiple is for prior Monte Carlo where D is large, when one of k draws decides.

    log p(x|c W z) is c x'Wz - c² |Wz|² / 2 + const; x'Wz varies over draws with the variance
    D s² (s² + 1), s = SIGNAL; the largest of k is about the quantile (k - 0.375) / (k + 0.25) of a
    normal (Blom 1958); and |Wz|² is D s². The best c is M sqrt((s² + 1) / s² / D).
    """
    largest = norm.ppf((k - 0.375) / (k + 0.25))
    return float(largest * math.sqrt((SIGNAL**2 + 1) / SIGNAL**2 / dim))


def draw_dimension(rows: list[dict], dimensions: tuple[int, ...], picture: Path) -> None:
    panels = {
        "relative_error": "error |g - g*| / |g*|", "relative_norm": "norm |g| / |g*|",
        "cosine": "cosine of g and g*", "best_multiple": "best multiple of the true W",
    }  # fmt: skip
    figure, axes = pyplot.subplots(2, 2, figsize=(10.5, 6.8), layout="constrained")
    for ax, (key, label) in zip(axes.flat, panels.items(), strict=True):
        for marker, (name, (objective, _, colour)) in zip(MARKERS, ESTIMATES.items(), strict=True):
            values = [row[key] for row in rows if row["contender"] == name]
            ax.plot(dimensions, values, color=colour, marker=marker, markersize=5, label=name)
            if key == "best_multiple" and objective.name == "prior-mc":
                large = [dim for dim in dimensions if dim >= 16]
                predicted = [predicted_multiple(objective.num_samples, dim) for dim in large]
                ax.plot(large, predicted, color=BLACK, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_xticks(dimensions, dimensions)
        ax.set(xlabel="latent dimensions D", ylabel=label)
        ax.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[0, 1].set_ylim(0, 1.6)
    axes[1, 0].axhline(0, color="0.5", linewidth=0.8)
    axes[1, 1].set_ylim(0, 1.25)
    axes[1, 1].set_title("dotted: one of k draws decides", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("A linear decoder's gradient g by each objective, against that of log p(x), g*")
    save(figure, picture)


# The variance of the encoder's gradient.


@dataclass(frozen=True)
class FixedGaussian(DiagonalGaussian):
    """The same Gaussian, its draws without gradients: the objectives take the score function."""

    reparameterised = False

    def draw(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = super().draw(num_samples)[0].detach()
        return z, self.log_prob(z)


class ScoreVAE(VAE):
    """A VAE that does not know how to differentiate through its draws."""

    def posterior(self, images: torch.Tensor, y: torch.Tensor) -> DiagonalGaussian:
        q = super().posterior(images, y)
        assert isinstance(q, DiagonalGaussian)
        return FixedGaussian(q.mean, q.log_variance)


def score_function(model: ScoreVAE, images: torch.Tensor, k: int) -> torch.Tensor:
    """A loss with the score function's gradient of the negative ELBO, without a baseline."""
    y = nothing(len(images))
    q, prior = model.posterior(images, y), model.prior(y)
    z, log_q = q.draw(k)
    kl = q.kl(prior)
    assert kl is not None
    return kl.sum(-1).mean() - (model.log_likelihood(images, z, y).detach() * log_q).mean()


ESTIMATORS = {  # colour and a loss of (model, its twin without reparameterisation, images, k)
    "ELBO, score function": (
        BLACK, lambda model, twin, x, k: score_function(twin, x, k),
    ),
    "ELBO, score function, baseline": (
        ORANGE, lambda model, twin, x, k: loss_of(twin, x, Objective(num_samples=k)),
    ),
    "ELBO, reparameterised": (
        GREEN, lambda model, twin, x, k: loss_of(model, x, Objective(num_samples=k)),
    ),
    "L_k, reparameterised": (
        RED, lambda model, twin, x, k: loss_of(model, x, Objective(name="iwae", num_samples=k)),
    ),
    "L_k, doubly reparameterised": (
        BLUE,
        lambda model, twin, x, k: loss_of(
            model, x, Objective(name="iwae", num_samples=k, encoder_gradient="dreg")
        ),
    ),
}  # fmt: skip
SAMPLES = 1, 5, 50


def gradients(sizes: Sizes, picture: Path) -> list[dict]:
    """The gradient of the encoder's weights on 16 digits, early in training by the ELBO and at its
    end: `variance` is the trace of the covariance, `snr` |mean| / sqrt(variance).

    The ELBO has the mean of k samples, and its KL in closed form; the baseline is the mean cost of
    the image's other samples, or for k = 1 of the other images. L_1 is the ELBO; there, doubly
    reparameterised is what is called sticking the landing. All estimators of one bound have one
    expectation, whose norm is taken from the least noisy of them; `agreement` is the squared
    distance of the means from that one's over what noise makes of it, about 1.
    """
    torch.manual_seed(0)
    config = VAEConfig(
        network="mlp", channels=64, latent_dim=8, image_size=8, in_channels=1, variance=0.05
    )
    model, twin = VAE(config), ScoreVAE(config)
    images, rows = digits()[:16], []
    for stage, steps in (("early", sizes.image_steps // 15), ("trained", sizes.image_steps)):
        fit(model, batches_of(digits(), 64), Objective(), steps, 3e-3)
        twin.load_state_dict(model.state_dict())
        found: dict[str, list[tuple[dict, torch.Tensor]]] = {}  # by bound
        for k in SAMPLES:
            for name, (_, loss) in ESTIMATORS.items():
                used = twin if "score" in name else model
                draw = functools.partial(loss, model, twin, images, k)
                draws = encoder_gradients(used, draw, sizes.draws)
                row = {"contender": name, "k": k, "stage": stage, "variance": total_variance(draws)}
                bound = f"L_{k}" if name.startswith("L_k") and k > 1 else "ELBO"
                found.setdefault(bound, []).append((row, draws.mean(0)))
        for same in found.values():
            best, mean = min(same, key=lambda each: each[0]["variance"])
            square = float(mean.square().sum()) - best["variance"] / sizes.draws  # without bias
            for row, own_mean in same:
                row["mean_norm"] = math.sqrt(max(square, 0.0))
                row["snr"] = row["mean_norm"] / math.sqrt(row["variance"])
                expected = (row["variance"] + best["variance"]) / sizes.draws
                distance = float((own_mean - mean).square().sum()) / expected
                row["agreement"] = None if row is best else distance
        rows += [row for same in found.values() for row, _ in same]
    draw_gradients(rows, picture)
    return rows


def encoder_gradients(model: VAE, loss: Callable[[], torch.Tensor], draws: int) -> torch.Tensor:
    """Estimates of the gradient of the encoder's weights, (draws, P) float64."""
    weights = [*model.encoder.parameters(), *model.to_posterior.parameters()]
    found = [torch.autograd.grad(loss(), weights) for _ in range(draws)]
    return torch.stack([torch.cat([part.flatten() for part in each]) for each in found]).double()


def total_variance(draws: torch.Tensor) -> float:
    """Trace of the covariance of draws (N, P)."""
    return float(draws.var(0).sum())


def draw_gradients(rows: list[dict], picture: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 4.7), layout="constrained", sharey=True)
    for ax, stage in zip(axes, ("early", "trained"), strict=True):
        for marker, (name, (colour, _)) in zip(MARKERS, ESTIMATORS.items(), strict=True):
            own = [row for row in rows if (row["contender"], row["stage"]) == (name, stage)]
            ax.plot(SAMPLES, [row["snr"] for row in own], color=colour, marker=marker, label=name)
        ax.set(xscale="log", yscale="log", xlabel="samples k", title=stage)
        ax.set_xticks(SAMPLES, SAMPLES)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("signal-to-noise ratio |E g| / sqrt(tr Cov g)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("The encoder's gradient on 16 digits, D = 8")
    save(figure, picture)


# Means in place of sums.

FACE_SIZE, FACE_LATENTS = 24, 16


def drawn_faces(count: int) -> torch.Tensor:
    """(count, 3, 24, 24) in [0, 1]: drawn three times as large."""
    pictures = [draw_face(sample_face(0, index), 3 * FACE_SIZE) for index in range(count)]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return nn.functional.avg_pool2d(images.movedim(-1, 1).float() / 255, 3)


def eigenvalues_of(images: torch.Tensor) -> torch.Tensor:
    """Of the images' covariance, the largest first."""
    rows = images.flatten(1)
    return torch.linalg.svdvals(rows - rows.mean(0)).square() / (len(rows) - 1)


def linear_kl(eigenvalues: torch.Tensor, variance: float, latents: int) -> float:
    """KL per image of the best linear VAE, which is probabilistic PCA: the sum of 1/2 ln(eigenvalue
    / variance) over those of the first D eigenvalues above the variance (Lucas et al. 2019)."""
    return float(0.5 * (eigenvalues[:latents] / variance).clamp(min=1).log().sum())


def reduction(sizes: Sizes, picture: Path) -> list[dict]:
    """KL per image of one VAE of d = 1,728 pixel values and D = 16, trained by sums, by the ELBO
    with beta up to d / D, and by means over pixels and over latent dimensions, which is the same
    as the last."""
    faces = drawn_faces(sizes.faces)
    pixels, eigenvalues = faces[0].numel(), eigenvalues_of(faces)
    config = VAEConfig(network="mlp", channels=128, latent_dim=FACE_LATENTS, image_size=FACE_SIZE,
                       variance=0.135)  # fmt: skip

    def sums(values: dict) -> torch.Tensor:
        return values["loss"]

    def means(values: dict) -> torch.Tensor:
        return values["reconstruction"] / pixels + values["kl"] / FACE_LATENTS

    equal = pixels / FACE_LATENTS
    runs = {"sums (beta = 1)": (1.0, sums), "beta = 4": (4.0, sums), "beta = 20": (20.0, sums),
            f"beta = d / D = {equal:g}": (equal, sums), "means": (1.0, means)}  # fmt: skip
    rows, strips = [], {"faces": faces[:12]}
    every = max(1, sizes.image_steps // 50)
    for name, (beta, loss) in runs.items():
        torch.manual_seed(0)
        model = VAE(config)
        batches = batches_of(faces, 32)
        history = fit(model, batches, Objective(beta=beta), sizes.image_steps, 1e-3, loss)
        with torch.no_grad():
            torch.manual_seed(0)
            y = nothing(len(faces))
            values = model(faces, y, Objective(num_samples=4), ONE)
            reconstructions = model.reconstruct(faces, y)
            strips[name] = reconstructions[:12]
            if loss is means or beta == 1:
                z = torch.randn(12, FACE_LATENTS)
                strips[f"samples, {name.split()[0]}"] = model.decode_mean(z, y[:12])
        curve = torch.tensor([step["kl"] for step in history]).split(every)
        total_beta = equal if loss is means else beta
        rows.append(
            {
                "contender": name,
                "beta": total_beta,
                "kl": float(values["kl"]),
                "kl_of_linear_vae": linear_kl(
                    eigenvalues, total_beta * config.variance, FACE_LATENTS
                ),
                "negative_elbo": float(values["negative_elbo"]),
                "mse": float((reconstructions - faces).square().mean()),
                "steps_per_value": every,
                "kl_curve": [round(float(part.mean()), 4) for part in curve],
            }
        )
    draw_reduction(rows, strips, picture)
    return rows


def draw_reduction(rows: list[dict], strips: dict[str, torch.Tensor], picture: Path) -> None:
    figure: Any = pyplot.figure(figsize=(10.5, 4.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.05])
    ax = left.subplots()
    styles = (BLUE, "-"), (GREEN, "-"), (ORANGE, "-"), (BLACK, "-"), (RED, "--")
    for row, (colour, dashes) in zip(rows, styles, strict=True):
        steps = (np.arange(len(row["kl_curve"])) + 0.5) * row["steps_per_value"]
        ax.plot(steps, row["kl_curve"], color=colour, linestyle=dashes, label=row["contender"])
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set(xlabel="training steps", ylabel="KL(q(z|x) || p(z)), nats per image", ylim=(0, 30))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    for ax, (name, images) in zip(right.subplots(len(strips), 1), strips.items(), strict=True):
        ax.imshow(
            torch.cat(list(images.clamp(0, 1)), -1).movedim(0, -1).numpy(), interpolation="nearest"
        )
        ax.set_title(name, fontsize=8, pad=2)
        ax.axis("off")
    save(figure, picture)


# The posterior of a nonlinear decoder.


def best_gaussian(z: np.ndarray, log_p: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard deviation and KL(q || p) of the Gaussian q that is nearest to the density p,
    both of them normalised on the even grid z (S,); searched from each of p's peaks."""
    log_p = log_p - logsumexp(log_p)

    def kl(parameters: np.ndarray) -> float:
        mean, log_sd = parameters
        log_q = -0.5 * ((z - mean) / np.exp(log_sd)) ** 2
        log_q = log_q - logsumexp(log_q)
        return float((np.exp(log_q) * (log_q - log_p)).sum())

    found: list[Any] = []
    for peak in sorted(find_peaks(log_p)[0], key=lambda i: -log_p[i])[:4]:
        curvature = (2 * log_p[peak] - log_p[peak - 1] - log_p[peak + 1]) / (z[1] - z[0]) ** 2
        start = np.array([z[peak], -0.5 * math.log(max(curvature, 1.0))])  # the prior's is 1
        found.append(minimize(kl, start, method="Nelder-Mead"))
    best = min(found, key=lambda result: result.fun)
    return float(best.x[0]), float(np.exp(best.x[1])), float(best.fun)


def posterior(sizes: Sizes, picture: Path) -> list[dict]:
    """The exact posterior of one latent dimension, the nearest Gaussian and the encoder's, for
    decoders trained by the likelihood (prior Monte Carlo, good enough for D = 1) and by the ELBO.
    The first one's encoder learned from dreams, KL(p || q): it covers all of p, and more.
    """
    torch.manual_seed(1)
    held_out = points(sizes.held_out // 4)
    y = nothing(len(held_out))
    z, log_cell = latent_grid(1, 5 * sizes.grid)
    grid = z[:, 0].double().numpy()
    figure, axes = pyplot.subplots(2, 4, figsize=(10.5, 5.8), layout="constrained")
    rows = []
    trainings = {"likelihood": Objective(name="prior-mc", num_samples=200), "ELBO": Objective()}
    for line, (name, objective) in zip(axes, trainings.items(), strict=True):
        model = fit_plane(objective, sizes.plane_steps, latent_dim=1)
        with torch.no_grad():
            joint = log_joint(model, held_out, z)
            log_px = joint.logsumexp(0) + log_cell
            log_p = joint - log_px  # (S, B)
            q = model.posterior(held_out, y)
            log_q = q.log_prob(z[:, None]).double()
            kl_of_encoder = (log_q.exp() * (log_q - log_p)).sum(0) * math.exp(log_cell)
            curve = model.decode_mean(torch.linspace(-2.5, 2.5, 300)[:, None], nothing(300))
        assert isinstance(q, DiagonalGaussian)
        nearest = np.array([best_gaussian(grid, each) for each in log_p.T.numpy()])
        rows.append(
            {
                "contender": f"decoder trained by the {name}",
                "nll": -float(log_px.mean()),
                "kl_of_nearest_gaussian": nearest[:, 2].mean(),
                "kl_of_nearest_gaussian_95th_percentile": np.quantile(nearest[:, 2], 0.95),
                "kl_of_encoder": float(kl_of_encoder.mean()),
            }
        )
        line[0].scatter(*held_out[..., 0, 0].T, s=3, color="0.6", linewidths=0)
        line[0].plot(*curve[..., 0, 0].T, color=BLUE, linewidth=1)
        line[0].set(xlim=(0, 1), ylim=(0, 1), xlabel="x1", ylabel="x2", aspect="equal")
        line[0].set_title(f"trained by the {name}\nline: E[x|z], |z| < 2.5", fontsize=9)
        order = np.argsort(nearest[:, 2])
        for ax, share, letter in zip(line[1:], (0.5, 0.8, 0.95), "abc", strict=True):
            index = order[int(share * (len(order) - 1))]
            x = held_out[index, :, 0, 0].tolist()
            line[0].plot(*x, marker="x", color=RED)
            line[0].annotate(letter, x, xytext=(4, 3), textcoords="offset points", color=RED)
            encoder = float(q.mean[index]), float((0.5 * q.log_variance[index]).exp())
            draw_posterior(ax, grid, log_p[:, index].exp().numpy(), nearest[index, :2], encoder)
            kls = f"{nearest[index, 2]:.2f}, encoder {kl_of_encoder[index]:.2f}"
            ax.set_title(f"{letter}, {100 * share:.0f}th percentile\nKL {kls}", fontsize=9)
        line[1].set_ylabel("density")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Posteriors of z in one dimension, at percentiles of the nearest Gaussian's KL")
    save(figure, picture)
    return rows


def draw_posterior(ax: Any, z: np.ndarray, density: np.ndarray, nearest: Any, encoder: Any) -> None:
    ax.fill_between(z, density, color=SKY, alpha=0.5, linewidth=0, label="p(z|x), exact")
    label = "nearest Gaussian by KL(q || p)"
    ax.plot(z, norm.pdf(z, *nearest), color=BLACK, linewidth=1.2, label=label)
    ax.plot(z, norm.pdf(z, *encoder), color=RED, linestyle="--", linewidth=1.2, label="encoder")
    inside = z[density > 0.001 * density.max()]
    margin = 0.1 + 0.15 * (inside.max() - inside.min())
    ax.set(xlim=(inside.min() - margin, inside.max() + margin), xlabel="z")


# The ELBO and the information in z.


def information(sizes: Sizes, picture: Path) -> list[dict]:
    """x ~ N(0, 1) by a decoder N(w z, 1 - w²) and its exact posterior: all w in [0, 1) have the
    same ELBO, -H(x), the best there is, and I_q from 0 to as much as one likes. Then binarized
    digits by a decoder of independent pixels and by an autoregressive one."""
    rows = []
    count = 2 * sizes.held_out
    x = Normal(0.0, 1.0).icdf((torch.arange(count)[:, None] + 0.5) / count)  # quantiles: no noise
    for w in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99):
        torch.manual_seed(0)
        model = LinearGaussian(torch.tensor([[w]]), 1 - w**2)
        with torch.no_grad():
            elbo = -float(loss_of(model, x, Objective(num_samples=100)))
            found = measured_information(model.posterior(x, nothing(count)))
        rows.append({"contender": "N(w z, 1 - w²)", "w": w, "elbo": elbo,
                     "i_q": found.information.value, "i_q_exact": -0.5 * math.log(1 - w**2),
                     "ceiling": found.ceiling})  # fmt: skip
    images = (digits() >= 0.5).float()
    train, test = images[:-300], images[-300:]
    for name, layers in (("independent pixels", 0), ("autoregressive", 1)):
        torch.manual_seed(0)
        config = VAEConfig(network="mlp", channels=64, latent_dim=8, image_size=8, in_channels=1,
                           likelihood="bernoulli", context_layers=layers, context_channels=8,
                           context_kernel=5)  # fmt: skip
        model = VAE(config)
        fit(model, batches_of(train, 64), Objective(), sizes.image_steps, 3e-3)
        with torch.no_grad():
            bounds = by_importance(model, test, 50)
            found = measured_information(model.posterior(train, nothing(len(train))))
        rows.append({"contender": name, "elbo": float(bounds.elbo.mean()),
                     "elbo_error": standard_error(bounds.elbo), "i_q": found.information.value,
                     "ceiling": found.ceiling, "kl": found.kl.value})  # fmt: skip
    draw_information(rows, picture)
    return rows


def measured_information(q: Any) -> Information:
    """I_q of Gaussian posteriors (N, D)."""
    zeros = torch.zeros_like(q.mean[:1])
    return aggregate_information(
        q.draw(5)[0].flatten(0, 1),
        torch.arange(len(q.mean)).repeat(5),
        diagonal_gaussian_log_q(q.mean, q.log_variance),
        DiagonalGaussian(zeros, zeros).log_prob,
    )


def draw_information(rows: list[dict], picture: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    gaussian, digit_rows = rows[:-2], rows[-2:]
    w = np.linspace(0, 0.995, 200)
    left.plot(w, -0.5 * np.log(1 - w**2), color=BLUE, label="-ln(1 - w²) / 2")
    left.axhline(-0.5 * math.log(2 * math.pi * math.e), color=BLACK, linewidth=1, label="-H(x)")
    for key, colour, marker, label in (("i_q", BLUE, "s", "I_q"), ("elbo", BLACK, "o", "ELBO")):
        left.plot([row["w"] for row in gaussian], [row[key] for row in gaussian], color=colour,
                  marker=marker, linestyle="", label=f"{label}, measured")  # fmt: skip
    left.set(xlabel="w", ylabel="nats", title="x ~ N(0, 1), decoder N(w z, 1 - w²)")
    left.grid(alpha=0.3)
    left.legend()
    for offset, key, sign, colour, label in (
        (-0.2, "elbo", -1, "0.6", "-ELBO of held-out digits"), (0.2, "i_q", 1, BLUE, "I_q"),
    ):  # fmt: skip
        heights = [abs(sign * row[key]) for row in digit_rows]
        bars = right.bar(np.arange(2) + offset, heights, 0.38, color=colour, label=label)
        right.bar_label(bars, fmt="%.2f")
    right.set_xticks(range(2), [f"decoder: {row['contender']}" for row in digit_rows])
    right.set(ylabel="nats per image", title="binarized 8x8 digits, D = 8", ylim=(0, 30))
    right.legend()
    save(figure, picture)


EXPERIMENTS = {
    "mixture": mixture, "dimension": dimension, "gradients": gradients, "reduction": reduction,
    "posterior": posterior, "information": information,
}  # fmt: skip


def print_markdown(rows: list[dict]) -> None:
    """The rows of an experiment as a table for the docs, without curves."""
    names = list(dict.fromkeys(key for row in rows for key in row if not key.endswith("curve")))
    names.remove("case")
    print(f"\n{rows[0]['case']}\n")
    for line in (names, ["---"] * len(names), *([text(row.get(n)) for n in names] for row in rows)):
        print(f"| {' | '.join(line)} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--pictures", type=Path, required=True, help="directory of the charts")
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, help="some of the experiments")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    options.pictures.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else Sizes()
    rows = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    for name in options.only or EXPERIMENTS:
        found = EXPERIMENTS[name](sizes, options.pictures / f"vae_{name}.png")
        found = [{"case": name, **row} for row in found]
        print_markdown(found)
        rows = [row for row in rows if row["case"] != name] + found
        write_json(options.json, rows, "cpu")


if __name__ == "__main__":
    main()
