"""FID's Inception-v3 folded: the features of torch-fidelity's to rounding, in less time.

    module = FoldedInception(FeatureExtractorInceptionV3(name, ["2048"], weights_path))
    features, logits = module(images)        # (B, 3, H, W) uint8 -> (B, 2048), (B, 1008)

Folded are the statistics of batch norm, into the convolutions. Tensors are channels-last, in which
convolutions need no reordering and pooling is several times faster on a CPU, which also takes few
images at a time. Resizing is a linear map of rows and columns, so it is two matrix products.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

CPU_BATCH = 8  # of larger ones the tensors are no longer in the caches


class FoldedInception(FeatureExtractorBase):
    """The layers `2048` and `logits_unbiased` of torch-fidelity's extractor."""

    head: torch.Tensor

    def __init__(self, original: FeatureExtractorInceptionV3):
        super().__init__(original.get_name(), ["2048", "logits_unbiased"])
        # all but `fc`, in the order in which its forward calls them
        network = list(copy.deepcopy(original).children())[:-1]
        self.network = _fold(nn.Sequential(*network)).to(memory_format=torch.channels_last)
        self.register_buffer("head", original.fc.weight.detach().clone())  # (1008, 2048)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) uint8 -> features (B, 2048) and logits without bias (B, 1008)."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be (B, 3, H, W) uint8, got {images.shape} {images.dtype}"
            )
        parts = images.split(CPU_BATCH) if images.device.type == "cpu" else [images]
        features = torch.cat([self._features(part) for part in parts])
        return features, features @ self.head.T

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.to(self.head.dtype) - 128) / 128
        rows, columns = (_resizing(length, pixels) for length in images.shape[2:])
        return self.network(rows @ pixels @ columns.T).flatten(1)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("2048", "logits_unbiased")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(metric)


class FoldedConv(nn.Module):
    """A convolution with the batch norm after it, and a ReLU."""

    def __init__(self, block: BasicConv2d):
        super().__init__()
        self.conv = fuse_conv_bn_eval(block.conv, block.bn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.conv(x))


def _fold(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, FoldedConv(child) if isinstance(child, BasicConv2d) else _fold(child))
    return module


def _resizing(length: int, like: torch.Tensor) -> torch.Tensor:
    """(299, length), torch-fidelity's TF1-compatible resizing along one axis: the matrix of what it
    makes of the unit vectors."""
    units = torch.eye(length, dtype=like.dtype, device=like.device)[None, :, :, None]
    size = (FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE, 1)
    resized = interpolate_bilinear_2d_like_tensorflow1x(units, size, align_corners=False)
    return resized[0, :, :, 0].T
