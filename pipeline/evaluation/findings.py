"""What an evaluation has found so far, in the words of report.json."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pipeline.evaluation import fidelity, memorisation, two_sample
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.sets import Images, Mirrored, batches_of
from pipeline.stage import UserError


class Findings:
    """Figures, curves, pictures (title -> (H, W, 3) uint8), and lines on what is absent and why."""

    def __init__(self, count: int):
        """count: images in every set."""
        self.count = count
        self.figures: list[dict[str, Any]] = []
        self.curves: dict[str, Any] = {}
        self.pictures: dict[str, np.ndarray] = {}
        self.absent: list[str] = []

    def add(
        self, images: str, metric: str, score: Score, made_by: Any = None, count: int | None = None
    ) -> None:
        """A figure of a set of images.

        Args:
            made_by: the Extractor or Similarity it is of; None = no features.
            count: of the images, if not that of every set.
        """
        name = made_by and made_by.name
        self.figures.append({
            "tag": tag_of(images, metric, name), "images": images, "metric": metric,
            **score._asdict(), "features": name, "features_sha256": made_by and made_by.sha256,
            "num_images": count or self.count, "num_reference": self.count,
        })  # fmt: skip

    def add_all(self, images: str, scores: Mapping[str, Score], made_by: Any = None) -> None:
        """Figures of a set of images, by metric."""
        for metric, score in scores.items():
            self.add(images, metric, score, made_by)

    def add_rows(self, rows: Mapping[str, Mapping[str, Score]]) -> None:
        """Figures without features: set of images -> metric -> score."""
        for images, scores in rows.items():
            self.add_all(images, scores)

    def add_means(self, names: Sequence[str], together: str) -> None:
        """A set `together` with the mean of each metric over the sets `names`, and its spread."""
        found: dict[tuple, list[dict[str, Any]]] = {}
        for figure in self.figures:
            if figure["images"] in names:
                found.setdefault((figure["metric"], figure["features_sha256"]), []).append(figure)
        for figures in found.values():
            if len(figures) == len(names):
                mean = fidelity.over_seeds([Score(figure["value"]) for figure in figures])
                tag = tag_of(together, figures[0]["metric"], figures[0]["features"])
                own = {"tag": tag, "images": together, **mean._asdict()}
                self.figures.append({**figures[0], **own})

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What ends in a UserError is absent, with that as the reason; the others go on."""
        try:
            yield
        except UserError as error:
            self.lack(f"no {what}: {error}")

    def lack(self, line: str) -> None:
        """A line on what is absent or doubtful although it was asked for, also for the log."""
        self.absent.append(line)
        print(f"warning: {line}")

    # Figures that belong together.

    def add_distances(
        self, scorer: Extractor, sets: Mapping[str, Mapping[str, torch.Tensor]], seed: int
    ) -> None:
        """How far each set is from the set `real`, and whether a classifier can tell.

        Args:
            sets: by name the features (N, F) of each layer; the first is what distances are of.
        """
        sets = dict(sets)
        real = sets.pop("real")
        first = next(iter(real))
        if warning := fidelity.shortage(self.count, real[first].shape[1]):
            self.lack(f"{scorer.name}: {warning}")
        # of wide features the line bends, and every point of it takes its time
        width, smallest = real[first].shape[1], self.count // fidelity.PARTS[-1]
        extrapolates = smallest >= fidelity.MIN_IMAGES and (
            width <= fidelity.WIDE or smallest > width
        )
        if not extrapolates:
            needed = max(fidelity.MIN_EXTRAPOLATED, width * fidelity.PARTS[-1])
            self.absent.append(
                f"no distance in the limit of many images on {scorer.name} features: give "
                f"{needed:,} images"
            )
        lines = {}
        for name, features in sets.items():
            scores = fidelity.scores(features, real, seed)
            scores["auc"] = two_sample.classifier_auc(features[first], real[first], seed)
            if extrapolates:
                line = fidelity.extrapolated_frechet(features[first], real[first], seed)
                scores["frechet_extrapolated"] = line.limit
                lines[name] = [list(point) for point in line.points]
            self.add_all(name, scores, scorer)
        lines.pop("blurred", None)  # far above the others
        if lines:
            self.curves[f"Fréchet distance over 1 / images ({scorer.name})"] = {
                "x": "1 / images", "y": "Fréchet distance", "series": lines,
                "note": "at 0 the limit of many images (Chong & Forsyth 2020), with its standard "
                "error",
            }  # fmt: skip

    def add_copies(
        self, name: str, samples: Images, training: Images, scorer: Extractor,
        own: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor], known: torch.Tensor,
        seed: int,
    ) -> None:  # fmt: skip
        """Which training images samples come near, and how often they do more than real ones.

        Args:
            own, held_out: features (N, F) of the samples and of real images, each with those of
                their mirror images.
            known: features (M, F) of the training images.
        """
        near, real = (
            memorisation.nearest(views, known.split(fidelity.BLOCK)) for views in (own, held_out)
        )
        rates = memorisation.duplicates(near.distances[:, 0], real.distances[:, 0], seed)
        self.add(name, "duplicates", rates.samples, scorer)
        self.add("held-out real", "duplicates", rates.held_out, scorer, self.count // 2)
        self.pictures["nearest training images"] = memorisation.picture(samples, training, near)
        views = [batches_of(view, range(len(samples))) for view in (samples, Mirrored(samples))]
        originals = batches_of(training, range(len(training)))
        self.add(name, "exact_copies", memorisation.exact_copies(views, originals))


def tag_of(images: str, metric: str, features: str | None) -> str:
    return fidelity.tag(images, metric, features) if features else f"evaluation/{images}/{metric}"
