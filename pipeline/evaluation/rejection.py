"""Classifier-based rejection sampling (Razavi et al. 2019, section 3.3): of many candidates keep
those in which a classifier sees most surely what was asked for.

The classifier is the selector, trained on the other half of the images than the judge, so that
nothing is tuned on its own yardstick. The share that is kept, the acceptance rate, trades variety
for fidelity.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.models.classifier import Classifier
from pipeline.stage import UserError
from pipeline.training.checkpoint import load_model, model_sha256, read_about

SELECTOR_HALF = 0


class Selector:
    """Scores images by the log-probability of attributes, or of a class."""

    def __init__(
        self, model: Classifier, attributes: Mapping[str, int], label: str | None, sha256: str = ""
    ):
        """attributes: name -> +1 or -1; label: name of the class. Raises UserError for names the
        classifier does not know, and for nothing that it could judge by."""
        names, self.model, self.sha256 = model.config.names, model, sha256
        wanted = list(attributes) if model.config.kind == "attributes" else [label]
        if not wanted or wanted == [None]:
            raise UserError(
                f"the selector tells {model.config.kind} apart and none was asked for; ask for "
                f"some of {', '.join(names)}"
            )
        if unknown := [name for name in wanted if name not in names]:
            raise UserError(f"the selector does not know {unknown[0]}; it knows {', '.join(names)}")
        self.columns = [names.index(str(name)) for name in wanted]
        self.signs = torch.tensor([attributes.get(str(name), 1) for name in wanted])

    @torch.no_grad()
    def log_prob(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> nats (B,): sum of log p over the attributes, or log p of
        the class."""
        logits = self.model(images).float()
        if self.model.config.kind == "classes":
            return logits.log_softmax(1)[:, self.columns[0]]
        return F.logsigmoid(logits[:, self.columns] * self.signs.to(logits.device)).sum(1)


def load_selector(
    path: Path, attributes: Mapping[str, int], label: str | None, recipe: str, device: torch.device
) -> Selector:
    """The selector of a run directory of train_classifier.py.

    Raises UserError for a classifier of the judge's half or of images of another recipe.
    """
    model, about = load_model(path, "classifier"), read_about(path)
    if about["half"] != SELECTOR_HALF:
        raise UserError(
            f"{path} was trained on the judge's half of the images; train a selector with "
            f"train_classifier.py --half {SELECTOR_HALF}, another --seed and other --channels"
        )
    if about["recipe"] != recipe:
        raise UserError(
            f"{path} was trained on images of recipe {about['recipe']}, the VQ-VAE on {recipe}; "
            "train a selector on the VQ-VAE's shards with its --image_size"
        )
    return Selector(model.to(device), attributes, label, model_sha256(path))


def num_candidates(num_images: int, acceptance: float) -> int:
    """How many to draw so that this share of them is `num_images`."""
    return math.ceil(round(num_images / acceptance, 6))


def best(log_probs: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the `count` candidates with the highest log_probs (N,), in ascending order; of
    equal ones the first."""
    return np.sort(np.argsort(-log_probs, kind="stable")[:count])
