"""Exponential moving average of the weights: the model that is validated and kept."""

import copy
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """An average of parameters and floating buffers (the codebook too, so that encoder and
    codebook belong together). Integer buffers are copied.

    `halflife_images`: after that many images old weights count half; the memory is at most a
    twentieth of the images seen so far, so the random start is soon forgotten (Karras et al.
    2024, EDM2, appendix B). 0 = the model itself, no averaging.
    """

    def __init__(self, model: nn.Module, halflife_images: int):
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.halflife_images = halflife_images

    @torch.no_grad()
    def update(self, model: nn.Module, batch_size: int, images_seen: int) -> None:
        """Moves towards `model` after a step over `batch_size` images."""
        halflife = min(self.halflife_images, images_seen * 0.05)
        weight = 1 - 0.5 ** (batch_size / halflife) if halflife > 0 else 1.0
        ours, theirs = self.model.state_dict(), model.state_dict()
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name], weight)
            else:
                tensor.copy_(theirs[name])
