"""Priors over codes, and the sampling of them. PRIORS is the one place that names their kinds."""

import dataclasses
import functools

import torch

from pipeline.models.priors.causal import whole
from pipeline.models.priors.fronts import dependency_slope
from pipeline.models.priors.pixelcnn import PixelCNN
from pipeline.models.priors.pixelsnail import PixelSNAIL
from pipeline.models.priors.prior import Prior, PriorConfig
from pipeline.models.priors.transformer import Transformer

PRIORS = {"pixelcnn": PixelCNN, "pixelsnail": PixelSNAIL, "transformer": Transformer}


def make_prior(config: PriorConfig) -> Prior:
    """The prior of a config, with random weights; its slope found by a dependency scan. On the meta
    device, where a model has sizes only, there is no scan."""
    sizes_only = torch.get_default_device().type == "meta"
    return PRIORS[config.architecture](config, 1 if sizes_only else find_slope(config))


def find_slope(config: PriorConfig) -> int:
    """s of the fronts t = j + s·i in which the prior of a config can be sampled."""
    return _slope(_narrow(config))


def _narrow(config: PriorConfig) -> PriorConfig:
    """The same network with little width, few rows and nothing to condition on: quick to scan."""
    return dataclasses.replace(
        config, channels=16, residual_channels=16, attention_channels=4, heads=1, output_layers=0,
        dropout=0.0, grid=(min(config.grid[0], config.kernel_size + 3), config.grid[1]),
        codebook_size=3, coarser_codebook_sizes=(), num_classes=0, num_attributes=0,
    )  # fmt: skip


@functools.lru_cache
def _slope(narrow: PriorConfig) -> int:
    """The slope of the fronts, by the gradients of a narrow twin.

    The mask of the attention needs the slope itself. The twin's is that of slope 1, which adds
    nothing to the convolutions' (j' + i' < j + i is within every slope), or that of raster order.
    """
    start = narrow.grid[1] if narrow.order == "raster" else 1
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        torch.manual_seed(0)
        twin = PRIORS[narrow.architecture](narrow, start).double().eval()
        inputs = torch.randn(4, *narrow.grid, narrow.channels, dtype=torch.float64)
        condition = twin.condition(4)
        return dependency_slope(lambda x: twin.body(x, condition, whole), inputs)
