"""What each level of a VQ-VAE carries: images decoded without it, and the length of its codes.

Without a level: its codes are those of another image (`shuffled`), or its vectors their mean over
training images at every position (`mean`). What the reconstruction loses is what the decoder takes
from that level.

Length: the nats of small priors on the codes, of a finer level with and without the coarser ones.
The difference is what the levels share. These are cross-entropies, so each is an upper bound of an
entropy, and their difference is an estimate.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pipeline.data.images import ImageSet
from pipeline.data.order import batches, permute
from pipeline.evaluation import fidelity, pictures
from pipeline.evaluation.sets import batches_of
from pipeline.models.priors import make_prior
from pipeline.models.priors.prior import Prior, PriorConfig
from pipeline.models.vqvae import VQVAE
from pipeline.stage import UserError
from pipeline.training.schedule import is_due, learning_rate
from pipeline.training.tracking import progress_bar
from pipeline.training.weight_average import WeightAverage

BATCH_SIZE = 50  # images per forward pass; no figure depends on it
GRADIENT_CLIP = 1.0

Codes = list[np.ndarray]  # per level (N, h, w) uint16, coarse to fine
Treatment = Literal["own", "shuffled", "mean"]


# Images without a level.


def treatments(num_levels: int) -> dict[str, tuple[Treatment, ...]]:
    """The rows of the report: name -> what is done to each level, coarse to fine.

    `only` has the mean at all other levels; below three levels the rows `mean` say that already.
    """

    def row(level: int, this: Treatment, others: Treatment) -> tuple[Treatment, ...]:
        return tuple(this if other == level else others for other in range(num_levels))

    rows = {"intact": row(0, "own", "own")}
    for level in range(num_levels):
        rows[f"level{level}/shuffled"] = row(level, "shuffled", "own")
    for level in range(num_levels):
        rows[f"level{level}/mean"] = row(level, "mean", "own")
    if num_levels > 2:
        for level in range(num_levels):
            rows[f"level{level}/only"] = row(level, "own", "mean")
    return rows


def partners(count: int, seed: int) -> np.ndarray:
    """The image (count,) int64 that each image's codes are taken from: a random permutation that
    is one cycle, so none is its own. At least 2 images."""
    if count < 2:
        raise ValueError(f"{count} images cannot be shuffled")
    order = permute(np.arange(count), count, seed, 0)
    chosen = np.empty(count, np.int64)
    chosen[order] = np.roll(order, 1)
    return chosen


def _rows(count: int) -> Iterator[np.ndarray]:
    """0 ... count - 1 in batches."""
    for start in range(0, count, BATCH_SIZE):
        yield np.arange(start, min(start + BATCH_SIZE, count))


def _batch(codes: np.ndarray, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Rows of one level's codes as the models take them: (B, h, w) int64."""
    return torch.from_numpy(codes[rows].astype(np.int64)).to(device)


@torch.no_grad()
def encode(
    model: VQVAE, images: ImageSet, indices: np.ndarray, device: torch.device, description: str
) -> Codes:
    """Codes of the images at `indices` (N,), in that order."""
    parts = []
    with progress_bar(len(indices), description) as bar:
        for batch in batches_of(images, indices):
            levels = model.encode_codes(pictures.to_unit(batch, device))
            # K is at most 65,536
            parts.append([level.cpu().numpy().astype(np.uint16) for level in levels])
            bar.update(len(batch))
    return [np.concatenate(level) for level in zip(*parts, strict=True)]


@torch.no_grad()
def mean_quantized(model: VQVAE, codes: Codes, device: torch.device) -> list[torch.Tensor]:
    """Per level the mean over images of the quantized vectors at each position, (D, h, w)."""
    means = []
    for quantizer, level in zip(model.quantizers, codes, strict=True):
        lookup: Any = quantizer.lookup
        parts = [lookup(_batch(level, rows, device)).double().sum(0) for rows in _rows(len(level))]
        means.append((torch.stack(parts).sum(0) / len(level)).float())
    return means


class Ablated:
    """Iterates over images decoded as a row of `treatments` says, as files would hold them,
    (B, H, W, C) uint8, and keeps their errors for `mse`.

    Args:
        codes: of these images.
        sources: (N,) the image that `shuffled` takes codes from.
        means: per level (D, h, w), what `mean` puts there.
    """

    def __init__(
        self,
        model: VQVAE,
        images: ImageSet,
        indices: np.ndarray,
        codes: Codes,
        sources: np.ndarray,
        means: list[torch.Tensor],
        row: Sequence[Treatment],
        device: torch.device,
    ):
        self.model, self.images, self.indices, self.codes = model, images, indices, codes
        self.sources, self.means, self.row, self.device = sources, means, row, device

    @torch.no_grad()
    def decode(self, rows: np.ndarray) -> torch.Tensor:
        """The images of `rows` (B,), positions in `indices`: (B, C, H, W), not clamped."""
        quantized = []
        for level, treatment in enumerate(self.row):
            if treatment == "mean":
                quantized.append(self.means[level].expand(len(rows), -1, -1, -1))
                continue
            taken = self.sources[rows] if treatment == "shuffled" else rows
            lookup: Any = self.model.quantizers[level].lookup
            quantized.append(lookup(_batch(self.codes[level], taken, self.device)))
        return self.model.decode(quantized).float()

    def __iter__(self) -> Iterator[np.ndarray]:
        self.errors = []
        for rows in _rows(len(self.indices)):
            originals = pictures.to_unit(self.images[self.indices[rows]], self.device)
            decoded = self.decode(rows)
            error = (decoded.clamp(0, 1) - originals).square().mean((1, 2, 3))
            self.errors.append(error.double().cpu())
            yield pictures.to_uint8(decoded)

    def mse(self) -> float:
        """Mean squared error in [0, 1], clamped, of the images of the last iteration."""
        return float(torch.cat(self.errors).mean())


# The length of the codes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallPriors:
    """How the priors of a report are trained, all alike."""

    model: PriorConfig = PriorConfig(channels=32, layers=4, condition_layers=2, dropout=0.0)
    """Sizes; what the codes determine is filled in."""
    total_images: int = 16_000
    """Length of the training of each prior in images."""
    batch_size: int = 16
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam; after the warm-up a cosine down to 0."""
    warmup_images: int = 1_000
    """Length of the linear warm-up."""
    average_halflife: int = 1_000
    """Half-life of the weight average in images; 0 = no average."""
    validate_every: int = 4_000
    """Images between validations; the best one is reported, beside the last."""

    def __post_init__(self) -> None:
        for name in ("total_images", "batch_size", "learning_rate", "validate_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"prior.{name} must be positive, got {getattr(self, name)}")


@torch.no_grad()
def _nats_per_code(model: Prior, codes: Codes, level: int, device: torch.device) -> float:
    """Mean negative log-likelihood of a level's codes, each image once."""
    total, count = 0.0, len(codes[level])
    for rows in _rows(count):
        total += float(model(**_inputs(model, codes, level, rows, device))) * len(rows)
    return total / count


def _inputs(model: Prior, codes: Codes, level: int, rows: np.ndarray, device: torch.device) -> dict:
    """What Prior.forward takes."""
    given = range(len(model.config.coarser_codebook_sizes))
    return {
        "codes": _batch(codes[level], rows, device),
        "coarser": [_batch(codes[coarser], rows, device) for coarser in given],
    }


def train_prior(
    config: SmallPriors,
    codebook_sizes: Sequence[int],
    level: int,
    conditional: bool,
    train: Codes,
    valid: Codes,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Trains a prior on the codes of a level, with or without the coarser ones, and returns its
    validation figures: averaged weights, the best validation and the last.

    Seeds the global generator. UserError where training diverges.
    """
    torch.manual_seed(seed)
    model_config = dataclasses.replace(
        config.model,
        grid=train[level].shape[1:],
        codebook_size=codebook_sizes[level],
        coarser_codebook_sizes=tuple(codebook_sizes[:level]) if conditional else (),
        num_classes=0,
        num_attributes=0,
    )
    model = make_prior(model_config).to(device)
    average = WeightAverage(model, config.average_halflife)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    order = batches(len(train[level]), config.batch_size, 0, 1, 0, seed)
    name = f"prior {level}" + (" given coarser" if conditional else "")
    seen, best, best_at, last = 0, math.inf, 0, math.inf
    model.train()
    with progress_bar(config.total_images, name) as bar:
        while seen < config.total_images:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    seen, config.learning_rate, "cosine", config.warmup_images, config.total_images
                )
            nats = model(**_inputs(model, train, level, next(order), device))
            optimizer.zero_grad()
            nats.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
            optimizer.step()
            before, seen = seen, seen + config.batch_size
            average.update(model, config.batch_size, seen)
            bar.update(config.batch_size)
            if is_due(config.validate_every, before, seen) or seen >= config.total_images:
                last = _nats_per_code(average.model, valid, level, device)
                if not math.isfinite(last):
                    raise UserError(f"{name} diverged; lower --prior.learning_rate")
                if last < best:
                    best, best_at = last, seen
                bar.set_postfix(nats=f"{best:.4g}", refresh=False)
    num_codes = int(np.prod(train[level].shape[1:]))
    return {
        **lengths(best, num_codes),
        "best_at_images": best_at,
        "last_nats_per_code": last,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def lengths(nats_per_code: float, num_codes: int) -> dict[str, float]:
    """A code length per code and per image of `num_codes` codes."""
    nats = nats_per_code * num_codes
    return {
        "nats_per_code": nats_per_code,
        "nats_per_image": nats,
        "bits_per_image": nats / math.log(2),
    }


def code_lengths(
    config: SmallPriors,
    codebook_sizes: Sequence[int],
    train: Codes,
    valid: Codes,
    seed: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Per level: `alone` H(level), `given_coarser` H(level | coarser), their difference `shared`,
    and `uniform`, log K. The two in the middle are None for level 0."""
    figures = []
    for level, size in enumerate(codebook_sizes):
        rows, columns = train[level].shape[1:]
        settings = (train, valid, seed, device)
        alone = train_prior(config, codebook_sizes, level, False, *settings)
        given, shared = None, None
        if level:
            given = train_prior(config, codebook_sizes, level, True, *settings)
            shared = lengths(alone["nats_per_code"] - given["nats_per_code"], rows * columns)
        figures.append({
            "level": level, "grid": [rows, columns], "codebook_size": size,
            "alone": alone, "given_coarser": given, "shared": shared,
            "uniform": lengths(math.log(size), rows * columns),
        })  # fmt: skip
    return figures


# The report: tags for programs, Markdown for people, both from the JSON document alone.


def tags(report: dict[str, Any]) -> dict[str, float]:
    """The figures by metric tag, all below evaluation/levels/."""
    values = {}
    for row in report["ablations"]:
        images = f"levels/{row['row']}"
        values[f"evaluation/{images}/mse"] = row["mse"]
        for features, score in row["frechet"].items():
            values[fidelity.tag(images, "frechet", features)] = score["value"]
    for figures in report["code_lengths"]:
        for what in ("alone", "given_coarser", "shared"):
            if figures[what] is not None:
                tag = f"evaluation/levels/level{figures['level']}/{what}/nats_per_code"
                values[tag] = figures[what]["nats_per_code"]
    return values


def markdown(report: dict[str, Any]) -> str:
    """The document as Markdown: a table of images, one of code lengths, the picture, protocol."""
    protocol = report["protocol"]
    checkpoint, rows = protocol["checkpoint"], [row["row"] for row in report["ablations"]]
    order = ", ".join(["originals", *(row.replace("/", " ") for row in rows)])
    lines = [
        "# What each level carries", "",
        f"`{checkpoint['path']}` ({checkpoint['sha256'][:8]}) on {protocol['num_images']:,} images "
        f"of the {protocol['split']} split. Level 0 is the coarsest.", "",
        "## Images without a level", "", *_image_table(report), "",
        "## Length of the codes", "", *_length_table(report), "",
        "## Images", "", f"Rows: {order}.", "", f"![Images]({report['picture']})", "",
        "## Protocol", "", "```json", json.dumps(protocol, indent=1), "```",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _image_table(report: dict[str, Any]) -> list[str]:
    rows, train_images = report["ablations"], report["protocol"]["train_images"]
    features = list(rows[0]["frechet"])
    titles = ["FID" if name == "inception" else f"Fréchet ({name})" for name in features]
    lines = [
        "How to read it: the further a row lies above `intact`, the more of the image the decoder "
        "takes from that level; `shuffled` puts another image's codes in the level's place, `mean` "
        f"the mean quantized vector of {train_images:,} training images at every position"
        + ("," if len(rows) > 1 and rows[-1]["row"].endswith("only") else ".")
    ]
    if lines[0].endswith(","):
        lines[0] += " and `only` does so at all other levels."
    if features:
        lines[0] += (
            " MSE asks for this image, Fréchet for a set that looks real: a level that is high in "
            "MSE and low in Fréchet when shuffled decides which image it is, and the other levels "
            "fit it anyway."
        )
    header = " | ".join(["levels", "MSE in [0, 1]", "x intact", *titles])
    lines += ["", f"| {header} |", "|---" * (3 + len(titles)) + "|"]
    for row in rows:
        cells = [row["row"].replace("/", " "), f"{row['mse']:.4g}"]
        cells.append(f"{row['mse'] / max(rows[0]['mse'], 1e-12):.2f}")
        cells += [_with_interval(row["frechet"][name]) for name in features]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _with_interval(score: dict[str, Any]) -> str:
    if score["interval"] is None:
        return f"{score['value']:.4g}"
    low, high = score["interval"]
    return f"{score['value']:.4g} [{low:.4g}, {high:.4g}]"


def _length_table(report: dict[str, Any]) -> list[str]:
    prior, train_images = report["protocol"]["prior"], report["protocol"]["train_images"]
    lines = [
        f"How to read it: cross-entropies of small priors ({prior['total_images']:,} images seen "
        f"of {train_images:,}, all alike, each at its best validation), so H is an upper bound; "
        "the shared part, what the coarser levels already say of a finer one, is an estimate that "
        "better priors may move either way.",
        "", "| | nats per code | nats per image | bits per image |", "|---|---|---|---|",
    ]  # fmt: skip

    def add(title: str, figures: dict[str, float]) -> None:
        code, image = f"{figures['nats_per_code']:.4f}", f"{figures['nats_per_image']:.1f}"
        lines.append(f"| {title} | {code} | {image} | {figures['bits_per_image']:.1f} |")

    total = 0.0
    for figures in report["code_lengths"]:
        level, given = figures["level"], figures["given_coarser"]
        coarser = ", ".join(str(number) for number in range(level))
        add(f"H(level {level})", figures["alone"])
        if given is not None:
            add(f"H(level {level} given {coarser})", given)
            add(f"shared by level {level} and {coarser}", figures["shared"])
        add(f"uniform, log {figures['codebook_size']} at level {level}", figures["uniform"])
        total += (given or figures["alone"])["nats_per_image"]
    lines.append(f"| all levels, coarse to fine | | {total:.1f} | {total / math.log(2):.1f} |")
    return lines
