"""Pictures of what a VAE has learned. Each is one (H', W', 3) uint8 with its captions.

    latents                prior_latents, posterior_means
    of any model           reconstructions, samples, interpolation, traversal, attribute_rows
    of a conditional one   generation, manipulation
    of a latent of two     manifold, posterior_scatter
    of a run               curves

Images are (N, C, S, S) in [0, 1], y is (N, E) as `VAE.condition` makes it, E = 0 without a
condition, and z is (N, D) with all layers of the latent; all on the model's device. An image is
decoded to the mean of p(x|z), unless the picture says that it is a draw; small images are enlarged.
What is random follows from the seed alone, and the global generators are left as they were.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw, ImageFont

from pipeline.evaluation.pictures import grid, to_uint8
from pipeline.models.vae.vae import VAE

BATCH_SIZE = 16  # a categorical likelihood takes 12 MiB for the logits of one image of 64 px
OFFSETS = (-3, -2, -1, 0, 1, 2, 3)  # of a traversal, in standard deviations
LIMIT = 3.0  # of the manifold, and the prior's outermost circle: standard deviations of N(0, I)
PERCENTILES = (0.01, 0.99)  # of the codes of an AE: the limits of its manifold
CELL, SMALL_CELL = 64, 32  # images are enlarged to at least so many pixels; of a manifold
DPI = 100  # of the charts
FEW = 10  # labels with a colour of their own and a place in the legend
TERMS = {
    "reconstruction": "reconstruction, -E log p(x|z)",
    "kl": "KL(q(z|x) || p(z))",
    "negative_elbo": "negative ELBO",
}
SPLITS = {"vae": ("training", "-"), "validation": ("validation", "o-")}  # tag -> label, line

Rows = list[tuple[str, np.ndarray]]  # caption and images (N, S, S, C) uint8, N alike


# The model, in small batches.


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The model draws by the global generators: seeded here, and put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def prior_latents(model: VAE, y: torch.Tensor, seed: int) -> torch.Tensor:
    """A draw z (N, D) from p(z|y) for each row of y (N, E); the same seed is the same noise."""
    with _seeded(seed, y.device):
        return model.prior(y).draw(1)[0][0]


@torch.no_grad()
def posterior_means(model: VAE, images: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean of q(z|x, y) for each image, (N, D)."""
    batches = zip(images.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True)
    return torch.cat([model.posterior(*batch).mean for batch in batches])


@torch.no_grad()
def _decoded(decode: Callable[..., torch.Tensor], z: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """What `decode` makes of z and y, (N, S, S, C) uint8."""
    batches = zip(z.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True)
    return np.concatenate([to_uint8(decode(*batch)) for batch in batches])


def _means(model: VAE, z: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """The means of p(x|z, y), (N, S, S, C) uint8."""
    if model.config.posterior == "bernoulli":
        z = z.clamp(0, 1)  # moved latents may leave the range of bits and their probabilities
    return _decoded(model.decode_mean, z, y)


# Sheets of images.


def _sheet(rows: Rows, columns: Sequence[str] = (), gap: int = 2, cell: int = CELL) -> np.ndarray:
    """Rows of images with their captions to the left and the columns' above."""
    if not rows or not len(rows[0][1]):
        raise ValueError("a picture needs at least one image")
    count, size = rows[0][1].shape[:2]
    scale = -(-cell // size)
    images = np.concatenate([images for _, images in rows])
    body = grid(images.repeat(scale, 1).repeat(scale, 2), count, gap)
    pitch, font = size * scale + gap, ImageFont.load_default(13)
    left = int(max(font.getlength(name) for name, _ in rows)) + 12
    top = 22 if columns else 0
    sheet = Image.new("RGB", (left + body.shape[1], top + body.shape[0]), "white")
    sheet.paste(Image.fromarray(body), (left, top))
    draw = ImageDraw.Draw(sheet)
    for row, (name, _) in enumerate(rows):
        middle = top + gap + (row + 0.5) * pitch
        draw.text((left - 6, middle), name, "black", font, anchor="rm")
    for column, name in enumerate(columns):
        middle = left + gap + (column + 0.5) * pitch
        draw.text((middle, top - 4), name, "black", font, anchor="ms")
    return np.array(sheet)


def _wrapped(rows: Rows, columns: int) -> Rows:
    """The same rows with at most `columns` images each, the last ones filled up with white."""
    count = len(rows[0][1])
    columns = max(1, min(columns, count))
    missing = [(0, -count % columns), (0, 0), (0, 0), (0, 0)]
    padded = [(name, np.pad(images, missing, constant_values=255)) for name, images in rows]
    return [
        (name, images[start : start + columns])
        for start in range(0, count, columns)
        for name, images in padded
    ]


def _originals(model: VAE, images: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> Rows:
    return [("original", to_uint8(images)), ("reconstruction", _means(model, z, y))]


def reconstructions(
    model: VAE, images: torch.Tensor, y: torch.Tensor, columns: int = 8
) -> np.ndarray:
    """Originals above their reconstructions, the mean of p(x|z) at the posterior's mean."""
    z = posterior_means(model, images, y)
    return _sheet(_wrapped(_originals(model, images, z, y), columns))


def samples(
    model: VAE, z: torch.Tensor, y: torch.Tensor, seed: int, columns: int = 8
) -> np.ndarray:
    """For given latents the mean of p(x|z), which is what papers show, and below it a draw from
    p(x|z), which is what the model says an image is. z: see `prior_latents`."""
    with _seeded(seed, z.device):
        draws = _decoded(model.decode_draw, z, y)
    return _sheet(_wrapped([("mean", _means(model, z, y)), ("draw", draws)], columns))


def interpolation(
    model: VAE,
    images_a: torch.Tensor,
    images_b: torch.Tensor,
    y_a: torch.Tensor,
    y_b: torch.Tensor,
    steps: int = 6,
) -> np.ndarray:
    """A row per pair: original a, `steps` images from the reconstruction of a to that of b, with z
    and y on the line between theirs, original b.

    A line, not a great circle: that takes latents to lie on a sphere of radius sqrt(D), which is so
    of draws from N(0, I) in many dimensions, but not of posterior means, few of them active.
    """
    weights = torch.linspace(0, 1, steps).to(y_a)[:, None, None]
    z_a, z_b = posterior_means(model, images_a, y_a), posterior_means(model, images_b, y_b)
    z, y = z_a.lerp(z_b, weights), y_a.lerp(y_b, weights)  # (steps, N, ...)
    between = _means(model, z.flatten(0, 1), y.flatten(0, 1))
    between = between.reshape(steps, len(z_a), *between.shape[1:]).swapaxes(0, 1)
    cells = [to_uint8(images_a)[:, None], between, to_uint8(images_b)[:, None]]
    captions = ["original a", *(f"{weight:.2g}" for weight in weights.flatten()), "original b"]
    return _sheet([("", row) for row in np.concatenate(cells, 1)], captions)


def traversal(model: VAE, images: torch.Tensor, y: torch.Tensor, num_dims: int = 8) -> np.ndarray:
    """The first image with one dimension of its latent moved by -3 to 3 standard deviations; 0 is
    its reconstruction.

    A row for each of the `num_dims` most active dimensions: those whose posterior mean has the
    largest standard deviation over the images (N >= 2, better hundreds), which is also the unit of
    the row and its caption. Of two layers only the lower is moved: the image sees no other.
    """
    z = posterior_means(model, images, y)
    if len(z) < 2:
        raise ValueError("which dimensions are active shows over at least 2 images")
    spread = z[:, : model.config.latent_dim].std(0)
    rows = []
    for dim in spread.argsort(descending=True)[:num_dims].tolist():
        moved = z[0].repeat(len(OFFSETS), 1)
        moved[:, dim] += spread[dim] * spread.new_tensor(OFFSETS)
        name = f"z{dim}, s.d. {spread[dim]:.2g}"
        rows.append((name, _means(model, moved, y[:1].expand(len(OFFSETS), -1))))
    return _sheet(rows, [f"{offset:+d} s.d." if offset else "0" for offset in OFFSETS])


def attribute_rows(
    model: VAE,
    images: torch.Tensor,
    y: torch.Tensor,
    vectors: np.ndarray,
    names: Sequence[str],
    strengths: Sequence[float] = (-2, 2),
) -> np.ndarray:
    """Originals, reconstructions, and these moved along each attribute's vector.

    Args:
        vectors: (A, D), from the mean latent without the attribute to that with it, as
            `latents.attribute_vectors` gives them. Those of NaN (one side unknown) are left out.
        names: A of them.
        strengths: multiples of the vector, one row each.
    """
    z = posterior_means(model, images, y)
    if vectors.shape != (len(names), z.shape[1]):
        raise ValueError(
            f"{len(names)} names and {z.shape[1]} latent dimensions do not go with vectors "
            f"{vectors.shape}"
        )
    rows = _originals(model, images, z, y)
    for name, vector in zip(names, torch.as_tensor(vectors).to(z), strict=True):
        if vector.isfinite().all():
            for strength in strengths:
                moved = z + strength * vector
                rows.append((f"{name} {strength:+g}", _means(model, moved, y)))
    return _sheet(rows)


# Conditions.


def _changed(
    model: VAE, y: torch.Tensor, chosen: Mapping[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Captions and conditions (N, E): y with another class, or with one attribute on and off."""
    for name, column in chosen.items():
        if not 0 <= column < y.shape[1]:
            raise ValueError(f"{name}: the condition has {y.shape[1]} columns, none is {column}")
        is_class = column < model.config.num_classes
        for value in (1,) if is_class else (1, -1):
            changed = y.clone()
            if is_class:
                changed[:, : model.config.num_classes] = 0
            changed[:, column] = value
            yield name if is_class else f"{name} {'+' if value > 0 else '-'}", changed


def generation(model: VAE, y: torch.Tensor, chosen: Mapping[str, int], seed: int) -> np.ndarray:
    """Images by condition: one draw of noise a column, which p(z|y) makes into z, and rows for the
    chosen classes and attributes (on and off); whatever else y (N, E) says of a column stays.

    Args:
        chosen: caption -> column of y, classes before attributes.
    """
    rows = [
        (name, _means(model, prior_latents(model, changed, seed), changed))
        for name, changed in _changed(model, y, chosen)
    ]
    return _sheet(rows)


def manipulation(
    model: VAE, images: torch.Tensor, y: torch.Tensor, chosen: Mapping[str, int]
) -> np.ndarray:
    """Images encoded with their own y and decoded with another: original, reconstruction, and a row
    for each change, as in `generation`. A row that changes nothing is the reconstruction."""
    z = posterior_means(model, images, y)
    rows = _originals(model, images, z, y)
    return _sheet(
        rows + [(name, _means(model, z, new)) for name, new in _changed(model, y, chosen)]
    )


# Latents of two dimensions.


def manifold(model: VAE, images: torch.Tensor, y: torch.Tensor, side: int = 20) -> np.ndarray:
    """The decoded images of a uniform grid of side² latents, in the axes of `posterior_scatter`: z0
    to the right, z1 up. All are decoded with the first row of y (N, E).

    The grid covers [-3, 3]^2. The codes of an AE, which has no prior, may lie anywhere: its grid
    goes from the 1st to the 99th percentile of those of `images`, in either dimension.

    ValueError unless z has two continuous dimensions.
    """
    if model.config.latent_dim != 2 or model.config.posterior == "bernoulli":
        raise ValueError(
            "a manifold needs a continuous latent of 2 dimensions, got "
            f"{model.config.posterior} of {model.config.latent_dim}"
        )
    low, high = y.new_tensor([[-LIMIT] * 2, [LIMIT] * 2])
    if not model.config.has_density:
        codes = posterior_means(model, images, y)
        low, high = codes.quantile(codes.new_tensor(PERCENTILES), 0)
    across, up = low.lerp(high, torch.linspace(0, 1, side).to(low)[:, None]).T  # (side,) each
    z1, z0 = torch.meshgrid(up.flip(0), across, indexing="ij")
    z = torch.stack([z0, z1], -1).flatten(0, 1)
    decoded = np.split(_means(model, z, y[:1].expand(len(z), -1)), side)
    rows = [(f"{value:.2g}", row) for value, row in zip(up.flip(0).tolist(), decoded, strict=True)]
    return _sheet(rows, [f"{value:.2g}" for value in across.tolist()], gap=0, cell=SMALL_CELL)


class Posteriors(NamedTuple):
    """Posteriors q(z|x) of N images to be drawn."""

    title: str
    means: np.ndarray
    """(N, 2)."""
    log_variances: np.ndarray | None = None
    """(N, 2); None where a posterior is a point."""
    labels: np.ndarray | None = None
    """(N,) what the colours tell apart."""


@torch.no_grad()
def plane_posteriors(
    title: str, model: VAE, images: torch.Tensor, y: torch.Tensor, labels: np.ndarray
) -> Posteriors:
    """Those of a model of two continuous latents; labels (N,) are -1 where there are none."""
    found = model.posterior(images, y)
    log_variances = getattr(found, "log_variance", None)
    return Posteriors(
        title,
        found.mean.float().cpu().numpy(),
        None if log_variances is None else log_variances.float().cpu().numpy(),
        labels if (labels >= 0).all() else None,
    )


def posterior_scatter(entries: Sequence[Posteriors]) -> np.ndarray:
    """A panel per model: ellipses of one standard deviation, or points, under the circles of 1, 2
    and 3 standard deviations of N(0, I). Each panel has its own scale, the same on both axes."""
    figure = Figure((5.4 * len(entries), 5.6), dpi=DPI, layout="constrained")
    for panel, entry in zip(_panels(figure, len(entries)), entries, strict=True):
        _draw_posteriors(panel, entry)
    return _pixels(figure)


def _draw_posteriors(panel: Axes, entry: Posteriors) -> None:
    title, means, log_variances, labels = entry
    shapes = means.shape, means.shape if log_variances is None else log_variances.shape
    if shapes != ((len(means), 2),) * 2:
        raise ValueError(f"{title}: means and log variances must be (N, 2), got {shapes}")
    labels = np.zeros(len(means)) if labels is None else labels
    classes, numbers = np.unique(labels, return_inverse=True)
    palette = colormaps["tab10" if len(classes) <= FEW else "turbo"].resampled(
        max(FEW, len(classes))
    )
    colors = palette(np.arange(len(classes)))

    deviations = np.zeros_like(means)
    if log_variances is not None:
        deviations = np.exp(log_variances / 2)
        widths, heights = 2 * deviations.T
        ellipses = EllipseCollection(
            widths, heights, np.zeros(len(means)), units="xy", offsets=means,
            offset_transform=panel.transData, facecolors=colors[numbers], alpha=0.25,
        )  # fmt: skip
        panel.add_collection(ellipses)
    panel.scatter(*means.T, s=6, c=colors[numbers], linewidths=0)
    for radius in (1, 2, 3):
        panel.add_patch(Circle((0, 0), radius, fill=False, linestyle="--", zorder=3))
    if 1 < len(classes) <= FEW:
        for name, color in zip(classes, colors, strict=True):
            panel.scatter([], [], color=color, label=name)
        panel.legend(fontsize=8, loc="upper right")
    limit = max(LIMIT, (np.abs(means) + deviations).max()) * 1.05
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    panel.set(title=title, xlabel="z0", ylabel="z1")


# Charts.


def curves(metrics: Path) -> np.ndarray:
    """Reconstruction term, KL and negative ELBO by images seen, from a run's metrics.jsonl: the
    training batches, and the validation split on top. What a run does not have is left out;
    ValueError where it has none of them."""
    found = _read_curves(metrics)
    terms = [term for term in TERMS if any(found[f"{split}/{term}"] for split in SPLITS)]
    if not terms:
        raise ValueError(f"{metrics} has no figures of {', '.join(found)}")
    figure = Figure((5 * len(terms), 3.6), dpi=DPI, layout="constrained")
    for panel, term in zip(_panels(figure, len(terms)), terms, strict=True):
        points = []
        for split, (label, style) in SPLITS.items():
            if values := found[f"{split}/{term}"]:
                panel.plot(*np.array(values).T, style, label=label, linewidth=1.2, markersize=4)
                points += values
        seen, nats = np.array(points).T
        # the first tenth of a run may be far above all that follows: it may leave the picture
        low, high = nats.min(), nats[seen >= seen.max() / 10].max()
        margin = 0.05 * (high - low) or 1.0
        panel.set(ylim=(low - margin, high + margin), title=TERMS[term])
        panel.set(xlabel="images seen", ylabel="nats per image")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 2M
        panel.grid(alpha=0.3)
        panel.legend()
    return _pixels(figure)


def _read_curves(metrics: Path) -> dict[str, list[tuple[float, float]]]:
    """Tag -> images seen and value of each line that has it, where it is finite."""
    # a line without its end is being written, or was torn by whatever ended the run
    whole = [line for line in metrics.read_text().splitlines(True) if line.endswith("\n")]
    lines = [json.loads(line) for line in whole]
    return {
        f"{split}/{term}": [
            (line["images_seen"], value)
            for line in lines
            if math.isfinite(value := line.get(f"{split}/{term}", math.nan))
        ]
        for split in SPLITS
        for term in TERMS
    }


def _panels(figure: Figure, count: int) -> list[Axes]:
    """Axes side by side."""
    return list(figure.subplots(1, count, squeeze=False)[0])


def _pixels(figure: Figure) -> np.ndarray:
    """The figure drawn, (H', W', 3) uint8, without pyplot and its global state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
