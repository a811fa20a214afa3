"""A trained VQ-VAE and its priors, for use from elsewhere. With the checkout on PYTHONPATH:

    import torch
    from torchvision.utils import save_image
    from pipeline.image_model import load_model

    model = load_model("runs/demo")  # on the GPU where there is one; device="cpu" says otherwise
    images = torch.rand(4, 3, model.image_size, model.image_size)  # yours, in [0, 1]
    codes = model.encode(images)  # per level (4, h, w) int64, coarse to fine
    reconstructions = model.decode(codes)  # (4, 3, H, W) in [0, 1]
    samples = model.sample(4, attributes={"Smiling": 1}, seed=7, temperature=0.9)
    save_image(torch.cat([images, reconstructions.cpu(), samples.cpu()]), "images.png", nrow=4)

Priors are needed for `sample` alone. sample_prior.py is the same as a command, for many images.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from pipeline.models.blocks import true_fp32
from pipeline.models.priors.noise import image_keys
from pipeline.models.priors.prior import Prior
from pipeline.models.priors.sampling import (
    Draw,
    Method,
    Sampled,
    make_network,
    resample_codes,
    sample_codes,
)
from pipeline.models.vqvae import VQVAE
from pipeline.stage import UserError
from pipeline.training import checkpoint

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What to draw and how. Image n depends on these and on n alone."""

    seed: int = 0
    """Seed of the samples."""
    temperature: float | tuple[float, ...] = 1.0
    """Softmax temperature, one value or one per level, coarse to fine; below 1 = safer, duller."""
    top_k: int | tuple[int, ...] = 0
    """Draw from the k most probable codes only, one value or one per level; 0 = from all."""
    top_p: float | tuple[float, ...] = 1.0
    """Draw from the most probable codes that together have this probability, one value or one per
    level; 1 = from all."""
    guidance: float | tuple[float, ...] = 1.0
    """Classifier-free guidance towards the attributes or the class, one value or one per level:
    logits u + guidance (c - u) of those with them, c, and without, u; 1 = c."""
    attributes: dict[str, int] | str | None = None
    """Attributes to ask for, as Smiling=1,Eyeglasses=0 or (YAML, Python) by name, 1 = with it, -1 =
    without; the others are left open."""
    label: str | int | None = None
    """Class to ask for, by name or number."""
    method: Method = "wavefront"
    """How codes are computed; all methods draw the same ones, but for rounding. wavefront is the
    fastest; a classic gated PixelCNN (order raster) needs rows-above."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "guidance"):
            for value in self._values(name):
                Draw(**{name: value})
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2^63 - 1, got {self.seed}")
        if not self.asks and set(self._values("guidance")) != {1}:
            raise ValueError("guidance needs attributes or a label to guide to")

    @property
    def asks(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.wanted) or self.label is not None

    def _values(self, name: str) -> tuple:
        value = getattr(self, name)
        values = tuple(value) if isinstance(value, tuple | list) else (value,)
        if not values:
            raise ValueError(f"{name} needs one value, or one per level")
        return values

    @property
    def wanted(self) -> dict[str, int]:
        """The attributes asked for, by name: +1 or -1."""
        if not isinstance(self.attributes, str):
            wanted = dict(self.attributes or {})
            if not set(wanted.values()) <= {-1, 1}:
                raise ValueError(f"attributes must be 1 (with) or -1 (without), got {wanted}")
            return wanted
        wanted = {}
        for part in self.attributes.split(","):
            name, _, value = part.strip().partition("=")
            if not name or value not in ("0", "1"):
                raise ValueError(f"attributes must look like Smiling=1,Eyeglasses=0, got {part!r}")
            wanted[name] = 1 if value == "1" else -1
        return wanted

    def draws(self, num_levels: int) -> list[Draw]:
        """How each level's codes are drawn, coarse to fine."""
        per_level = {}
        for name in ("temperature", "top_k", "top_p", "guidance"):
            values = self._values(name)
            if len(values) not in (1, num_levels):
                raise UserError(f"{name} needs one value, or one for each of {num_levels} levels")
            per_level[name] = values * num_levels if len(values) == 1 else values
        return [
            Draw(**{name: values[level] for name, values in per_level.items()})
            for level in range(num_levels)
        ]


class Given(NamedTuple):
    """Codes of which some stay and the others are drawn."""

    codes: list[torch.Tensor]
    """Per level (B, h, w) int64, coarse to fine."""
    keep: list[torch.Tensor]
    """Per level (h, w) bool: those that stay."""


class Asked(NamedTuple):
    """What each of N images is asked for."""

    attribute_names: Sequence[str]
    attributes: np.ndarray
    """(N, A) int8: +1 with it, -1 without, 0 = left open."""
    class_names: Sequence[str]
    labels: np.ndarray
    """(N,) int64: the class, -1 = none."""

    def of(self, numbers: np.ndarray) -> "Asked":
        """What images `numbers` (B,) are asked for."""
        return self._replace(attributes=self.attributes[numbers], labels=self.labels[numbers])


class LevelPrior(NamedTuple):
    """The prior of a level, and the names of what it was trained with."""

    model: Prior
    attribute_names: list[str]
    class_names: list[str]
    sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageModel:
    """Images to codes and back, and new images. Methods compute without gradients, on `device`."""

    vqvae: VQVAE
    priors: dict[int, LevelPrior]
    """By level, 0 = coarsest; a level whose prior is not there cannot be drawn."""
    prior_paths: list[Path]
    """Where each level's prior is, or would be."""
    image_size: int
    """Side in pixels of the images it was trained on, and of its samples."""
    recipe: str
    """Hash of how those images were cropped and resized."""
    sha256: str
    """Of the VQ-VAE's weights."""
    device: torch.device

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of the codes of each level, coarse to fine."""
        return self.vqvae.config.grids(self.image_size, self.image_size)

    @property
    def attribute_names(self) -> list[str]:
        """What can be asked for."""
        return next((p.attribute_names for p in self.priors.values() if p.attribute_names), [])

    @property
    def class_names(self) -> list[str]:
        """What can be asked for."""
        return next((p.class_names for p in self.priors.values() if p.class_names), [])

    def asked(self, how: Sampling, count: int) -> Asked:
        """What `how` asks of each of `count` images; UserError for names that are not known."""
        names, classes, label = self.attribute_names, self.class_names, -1
        if names and (unknown := sorted(set(how.wanted) - set(names))):
            raise UserError(f"unknown attribute {unknown[0]}; known: {', '.join(names)}")
        if how.label is not None and classes:
            word = str(how.label)
            if word in classes:
                label = classes.index(word)
            elif word.isdigit() and int(word) < len(classes):
                label = int(word)
            else:
                raise UserError(f"unknown class {word}; known: {', '.join(classes)}")
        vector = np.array([how.wanted.get(name, 0) for name in names], np.int8)
        return Asked(names, np.tile(vector, (count, 1)), classes, np.full(count, label))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Codes of each level (B, h, w) int64, coarse to fine.

        Args:
            images: (B, C, H, W) floating point in [0, 1]; H and W divisible by the product of the
                VQ-VAE's ratios.
        """
        channels = self.vqvae.config.in_channels
        if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise ValueError(
                f"images must be (B, {channels}, H, W) floats in [0, 1], "
                f"got {tuple(images.shape)} {images.dtype}"
            )
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images must be in [0, 1], got {images.min():.3g} to {images.max():.3g}"
            )
        self.vqvae.config.grids(*images.shape[2:])  # raises for sizes that do not fit
        return self.vqvae.encode_codes(images.to(self.device, torch.float32))

    @torch.no_grad()
    def decode(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] of codes per level (B, h, w) int64, coarse to fine."""
        on_device = [level.to(torch.int64).to(self.device) for level in codes]
        return self.vqvae.decode_codes(on_device).clamp(0, 1)

    def sample(self, count: int, *, batch_size: int = 64, **options: Any) -> torch.Tensor:
        """`count` new images (count, C, H, W) in [0, 1]; `options` are the fields of Sampling.

        Raises UserError for what the priors cannot do, ValueError for impossible options.
        """
        if count < 1 or batch_size < 1:
            raise ValueError(f"count and batch_size must be at least 1, got {count}, {batch_size}")
        how = Sampling(**options)
        self.check(how)
        batches = torch.arange(count).split(batch_size)
        return torch.cat([self.decode(self.draw_codes(numbers, how)) for numbers in batches])

    @torch.no_grad()
    @true_fp32()
    def draw_codes(
        self,
        numbers: Sequence[int] | torch.Tensor,
        how: Sampling,
        *,
        asked: Asked | None = None,
        given: Given | None = None,
        resample: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> list[torch.Tensor]:
        """Codes of each level (B, h, w) int64, coarse to fine.

        Args:
            numbers: of the images, (B,).
            asked: of these images, one by one; None = of all what `how` asks.
            given: codes of these images, and which of them stay.
            resample: fillings drawn for a level of which a part stays; one is picked by the
                likelihood of the given codes that come later, see `resample_codes`.
            progress: called with the number of codes just drawn, of all images.
        """
        numbers = torch.as_tensor(numbers, device=self.device)
        advance = progress and (lambda positions: progress(positions * len(numbers)))
        asked = asked or self.asked(how, len(numbers))
        codes: list[torch.Tensor] = []
        for level, draw in enumerate(how.draws(len(self.grids))):
            known = None
            if given is not None:
                keep = given.keep[level].to(self.device).expand(len(numbers), -1, -1)
                known = given.codes[level].to(self.device, torch.int64), keep
            if known is not None and known[1].all():
                codes.append(known[0])
                continue
            condition = self._condition(level, codes, asked)
            unconditional = None
            if draw.guidance != 1:
                unconditional = self.prior(level).model.condition(len(numbers), codes)
            filling = partial(
                self._filling, level, draw, numbers, how, condition,
                unconditional=unconditional, given=known, progress=advance,
            )  # fmt: skip
            if resample > 1 and known is not None and known[1].any():
                keys = image_keys(how.seed, numbers, level, purpose=-1)
                codes.append(resample_codes(filling, resample, keys))
            else:
                codes.append(filling(0).codes)
        return codes

    def _filling(
        self, level: int, draw: Draw, numbers: torch.Tensor, how: Sampling,
        condition: torch.Tensor, number: int, **options: Any,
    ) -> Sampled:  # fmt: skip
        """A level's codes by noise number `number`."""
        keys = image_keys(how.seed, numbers, level, purpose=number)
        model = self.prior(level).model
        return sample_codes(model, condition, keys, draw, method=how.method, **options)

    def _condition(self, level: int, coarser: list[torch.Tensor], asked: Asked) -> torch.Tensor:
        """The condition of a level's prior, with what is asked for."""
        prior = self.prior(level)
        columns = [asked.attribute_names.index(name) for name in prior.attribute_names]
        labels = torch.from_numpy(asked.labels).to(self.device)
        attributes = torch.from_numpy(asked.attributes[:, columns]).float().to(self.device)
        return prior.model.condition(len(labels), coarser, labels, attributes)

    def prior(self, level: int) -> LevelPrior:
        """The prior of a level; UserError where there is none."""
        if level not in self.priors:
            raise UserError(
                f"level {level} has no prior at {self.prior_paths[level]}; train one with "
                f"pipeline/train_prior.py --level {level}"
            )
        return self.priors[level]

    def deaf_levels(self, asked: Asked, keep: Sequence[torch.Tensor] | None = None) -> list[int]:
        """Levels that are drawn without what is asked for: their priors do not know it."""
        return [
            level for level, prior in self.priors.items()
            if (keep is None or not keep[level].all()) and (
                (asked.attributes.any() and not prior.attribute_names)
                or ((asked.labels >= 0).any() and not prior.class_names)
            )
        ]  # fmt: skip

    @torch.no_grad()
    def check(self, how: Sampling, keep: Sequence[torch.Tensor] | None = None) -> None:
        """Raises UserError for what the priors cannot do; no prior is needed where all of a level's
        codes stay by `keep`, see Given."""
        levels = [i for i in range(len(self.grids)) if keep is None or not keep[i].all()]
        draws, priors = how.draws(len(self.grids)), [self.prior(level) for level in levels]
        if how.wanted and not any(prior.attribute_names for prior in priors):
            raise UserError("the priors were not trained with attributes; leave attributes out")
        if how.label is not None and not any(prior.class_names for prior in priors):
            raise UserError("the priors were not trained with label; leave label out")
        zeros = [torch.zeros(1, *grid, dtype=torch.int64, device=self.device)
                 for grid in self.grids]  # fmt: skip
        asked = self.asked(how, 1)
        for level, prior in zip(levels, priors, strict=True):
            size = prior.model.config.codebook_size
            if draws[level].top_k > size:
                raise UserError(f"top_k must be at most {size}, the number of codes of level "
                                f"{level}, got {draws[level].top_k}")  # fmt: skip
            condition = self._condition(level, zeros[:level], asked)
            if how.method in ("wavefront", "raster"):
                network = make_network(prior.model, condition, how.method)
                try:  # the first position, to see that all layers can be evaluated by fronts
                    network.logits(torch.zeros(1, dtype=torch.int64, device=self.device))
                except ValueError as error:
                    raise UserError(f"level {level}: {error} (--method rows-above)") from error


def load_model(
    path: Path | str,
    *,
    priors: Sequence[Path | str] | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
) -> ImageModel:
    """Loads a VQ-VAE and the priors that belong to it.

    Args:
        path: a run tree (a directory with vqvae/, prior-level0/ ...), or a VQ-VAE's directory.
        priors: directories of the priors, coarse to fine; None = prior-level0, prior-level1 ...
            beside the VQ-VAE, as far as they are there.
        device: None = the GPU where there is one, else the CPU.
        precision: of the priors' weights; bf16 is faster on a GPU. The VQ-VAE stays in fp32.

    Raises UserError for damaged or missing files, and for priors of other codes.
    """
    path, given = Path(path), priors
    run = path / "vqvae" if (path / "vqvae").is_dir() else path
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vqvae, about = checkpoint.load_model(run, "vqvae"), checkpoint.read_about(run)
    num_levels = vqvae.config.num_levels
    # not resolve(): where the VQ-VAE is a link, the priors are beside the link
    tree = Path(os.path.abspath(checkpoint.final_directory(run))).parents[1]
    paths = [Path(prior) for prior in
             given or [tree / f"prior-level{level}" for level in range(num_levels)]]  # fmt: skip
    if len(paths) != num_levels:
        raise UserError(f"priors needs {num_levels} directories, got {len(paths)}")
    sha256 = checkpoint.model_sha256(run)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = {}
    for level, prior_path in enumerate(paths):
        if given or (prior_path / "final" / "config.json").is_file():
            prior = _load_prior(prior_path, level, run, sha256)
            found[level] = prior._replace(model=prior.model.to(where, dtype))
    for kind in ("attribute_names", "class_names"):
        if len({tuple(names) for prior in found.values() if (names := getattr(prior, kind))}) > 1:
            raise UserError(f"the priors beside {run} know different {kind.replace('_', ' ')}")
    return ImageModel(
        vqvae=vqvae.to(where), priors=found, prior_paths=paths,
        image_size=about["config"]["image_size"], recipe=about["recipe"], sha256=sha256,
        device=where,
    )  # fmt: skip


def _load_prior(path: Path, level: int, vqvae: Path, vqvae_sha256: str) -> LevelPrior:
    """The prior of a level; UserError if it is another level's or of another VQ-VAE's codes."""
    model, about = checkpoint.load_model(path, "prior"), checkpoint.read_about(path)
    if about["level"] != level:
        raise UserError(f"{path} is a prior of level {about['level']}, needed {level}")
    if about["codes"]["checkpoint_sha256"] != vqvae_sha256:
        raise UserError(
            f"{path} was trained on codes of another checkpoint than {vqvae}; "
            "extract codes with this checkpoint and train the prior on them"
        )
    return LevelPrior(
        model,
        list(about["attribute_names"]) if model.config.num_attributes else [],
        list(about["class_names"]) if model.config.num_classes else [],
        checkpoint.model_sha256(path),
    )
