"""How near reconstructions are to their originals, pixel by pixel.

SSIM by scikit-image: it computes in float64, and with the settings below is the index of Wang et
al. 2004 (Gaussian window of 11 x 11 and 1.5 pixels), a mean over pixels and colours.
"""

from typing import Any

import numpy as np
import torch
from skimage.metrics import structural_similarity

from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.information import mean_with_error
from pipeline.evaluation.sets import BATCH_SIZE, Images
from pipeline.training.tracking import progress_bar


def ssim(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """Structural similarity in [-1, 1] of two images (H, W, C) uint8 (Wang et al. 2004, eq. 13).

    H and W at least 11.
    """
    similarity: Any = structural_similarity(
        original, reconstruction, channel_axis=-1, data_range=255, gaussian_weights=True,
        sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    return float(similarity)


def pixel_figures(originals: Images, reconstructions: Images) -> dict[str, Score]:
    """MSE in [0, 1], PSNR in dB and SSIM of 8-bit images, as files hold them: means over images
    with 95 % intervals. An image without any error counts as 100 dB.

    Raises ValueError unless both sets have the same number of images of the same shape.
    """
    if len(originals) != len(reconstructions):
        raise ValueError(f"{len(originals)} originals, {len(reconstructions)} reconstructions")
    errors, similarities = [], []
    with progress_bar(len(originals), "pixels") as bar:
        for start in range(0, len(originals), BATCH_SIZE):
            numbers = np.arange(start, min(start + BATCH_SIZE, len(originals)))
            a, b = originals[numbers], reconstructions[numbers]
            if a.shape != b.shape:
                raise ValueError(f"originals {a.shape[1:]}, reconstructions {b.shape[1:]}")
            errors.append(((a.astype(np.float64) - b) ** 2).mean((1, 2, 3)) / 255**2)
            similarities += map(ssim, a, b)
            bar.update(len(numbers))
    mse = np.concatenate(errors)
    values = {"mse": mse, "psnr": -10 * np.log10(mse.clip(min=1e-10)), "ssim": similarities}
    figures = {}
    for metric, per_image in values.items():
        mean, error = mean_with_error(torch.from_numpy(np.asarray(per_image)))
        figures[metric] = Score(mean, (mean - 1.96 * error, mean + 1.96 * error))
    return figures
