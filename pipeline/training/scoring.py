"""Scores during training: a few images of the model against real ones, every so many images.

    scorer = make_scorer(config, valid, accelerator) if config.score_every else None
    ...                                                             the loop
    if scorer and scorer.is_due(run, due):
        scorer.score(run, {"reconstructions": make})                make(where) -> uint8 images

Each rank makes and looks at its part of the images. What is random in it is keyed, so training goes
on as if nothing had been; the pause is reported and no part of the throughput.

What the scores need takes seconds to import, so it is imported where there are scores.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.data.images import ImageSet
from pipeline.evaluation import pictures
from pipeline.evaluation.sets import MIN_IMAGES, choose
from pipeline.models.blocks import true_fp32
from pipeline.stage import UserError
from pipeline.training.checkpoint import read_about
from pipeline.training.collectives import all_reduce_sum, rank_slice
from pipeline.training.run import Due, Run

if TYPE_CHECKING:
    from pipeline.evaluation.extractors import Extractor

BATCH_SIZE = 50
SHOWN = 32  # images in a grid
SEED = 0  # of the choice of images, the samples, and the subsets of KID

Make = Callable[[slice], np.ndarray]
"""Where among the scored images, at most BATCH_SIZE of them -> (B, H, W, C) uint8."""


def check_config(config: Any) -> None:
    """ValueError for a score_every or score_images that cannot be."""
    if config.score_every < 0:
        raise ValueError(f"score_every must be at least 0, got {config.score_every}")
    if config.score_images < MIN_IMAGES:
        raise ValueError(f"score_images must be at least {MIN_IMAGES}, got {config.score_images}")


def find_extractor(judge: Path | None, recipe: str, device: torch.device) -> "Extractor | None":
    """The judge's features, or without a judge Inception's; None where there is neither."""
    from pipeline.evaluation import extractors

    if judge:
        if read_about(judge)["recipe"] != recipe:
            raise UserError(f"--judge {judge} was trained on images of another recipe; train one "
                            "on these shards at this size")  # fmt: skip
        return extractors.judge_extractor(judge, device)
    if weights := extractors.find_inception_weights(None):
        return extractors.inception_extractor(weights, device)
    return None


def make_scorer(config: Any, real: ImageSet, accelerator: Accelerator) -> "Scorer | None":
    """The scorer of a stage whose config has score_every, score_images and judge. Collective: it
    looks at the real images at once, so that what is wrong shows before the training. None, with a
    line that says so, where there are no features to score on."""
    extractor = find_extractor(config.judge, real.recipe.hash, accelerator.device)
    if extractor is None:
        accelerator.print(
            "no scores during training: give --judge PATH (train_classifier.py), or "
            "fetch the weights of Inception (evaluate.py --download true)"
        )
        return None
    return Scorer(real, config.score_images, config.score_every, extractor, accelerator)


class Scorer:
    """Scores images against as many real ones, drawn without replacement from `real`.

    Args:
        count: of the images, at most as many as there are real ones.
        every: images seen between scores.
    """

    def __init__(
        self,
        real: ImageSet,
        count: int,
        every: int,
        extractor: "Extractor",
        accelerator: Accelerator,
    ):
        self.every, self.extractor, self.accelerator = every, extractor, accelerator
        count = min(count, len(real))
        if count < max(MIN_IMAGES, accelerator.num_processes):
            raise UserError(f"{count} validation images are too few to score; leave --score_every "
                            "out, or shard more")  # fmt: skip
        self.numbers = choose(count, np.arange(len(real)), SEED)  # of the images in `real`
        self.protocol = {
            "images": count,
            "reference": f"as many of the {real.split} split, drawn with seed {SEED}",
            "features": extractor.name,
            "features_sha256": extractor.sha256,
            "data_index_sha256": real.index.sha256,
            "recipe": real.recipe.hash,
        }
        self.reference, _ = self._look(lambda where: real[self.numbers[where]])

    def is_due(self, run: Run, due: Due) -> bool:
        """True after a multiple of `every` images, and at the end."""
        return due.ends or run.is_due(self.every)

    def score(self, run: Run, sets: Mapping[str, Make]) -> None:
        """Logs each set's figures and shows its first images; collective.

        Args:
            sets: by the names that `fidelity.tag` knows: samples, reconstructions, or another.
        """
        from pipeline.evaluation import fidelity

        start, values, seen = time.perf_counter(), {}, run.images_seen
        for name, make in sets.items():
            found, shown = self._look(make)
            if self.accelerator.is_main_process:
                for metric, figure in fidelity.scores(found, self.reference, SEED).items():
                    values[fidelity.tag(name, metric, self.extractor.name)] = figure.value
                run.tracker.image(seen, f"{name}/scored", pictures.grid(shown, columns=8))
        self.accelerator.wait_for_everyone()
        values["throughput/scoring_seconds"] = time.perf_counter() - start
        run.tracker.log(seen, values)
        run.paused = True  # so that the next step starts the clock of the throughput anew

    @torch.no_grad()
    def _look(self, make: Make) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """The extractor's first layer of all images, (N, F) float64 on the CPU of every rank, and
        this rank's first images."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        part, device = rank_slice(len(self.numbers), rank, world), self.accelerator.device
        features, shown = [], []
        for start in range(part.start, part.stop, BATCH_SIZE):
            images = make(slice(start, min(start + BATCH_SIZE, part.stop)))
            colours = np.repeat(images, self.extractor.channels // images.shape[3], axis=3)
            tensor = torch.from_numpy(colours).to(device).permute(0, 3, 1, 2)
            with true_fp32():
                features.append(self.extractor.module(tensor)[0].double())
            shown.append(images[:SHOWN])
        own = torch.cat(features)
        whole = own.new_zeros(len(self.numbers), own.shape[1])
        whole[part] = own
        all_reduce_sum(whole)
        layer = self.extractor.module.get_requested_features_list()[0]
        return {layer: whole.cpu()}, np.concatenate(shown)[:SHOWN]
