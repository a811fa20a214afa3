"""Figures of reconstructions against the papers' formulas, written out in float64."""

import math

import numpy as np
import pytest
from scipy.signal import convolve2d

from pipeline.evaluation.pixels import pixel_figures, ssim


def pair(channels, seed=0, height=17, width=23):
    """Two images that have something to do with each other."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (height, width, channels))
    b = (a + rng.normal(0, 40, a.shape)).round().clip(0, 255)
    return a.astype(np.uint8), b.astype(np.uint8)


def naive_ssim(a, b):
    """Wang et al. 2004, eqs. 13 to 16: every window that lies inside, with a Gaussian of 11 x 11
    and 1.5 pixels; the mean over windows and colours."""
    x = np.arange(-5, 6)
    line = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for p, q in zip(a.transpose(2, 0, 1).astype(float), b.transpose(2, 0, 1), strict=True):
        mean = [convolve2d(each, window, "valid") for each in (p, q)]
        var = [convolve2d(each * each, window, "valid") - m**2
               for each, m in zip((p, q.astype(float)), mean, strict=True)]  # fmt: skip
        covariance = convolve2d(p * q, window, "valid") - mean[0] * mean[1]
        values.append(
            (2 * mean[0] * mean[1] + c1) * (2 * covariance + c2)
            / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (var[0] + var[1] + c2))
        )  # fmt: skip
    return float(np.mean(values))


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_index_of_the_paper(channels):
    a, b = pair(channels)
    assert 0.2 < naive_ssim(a, b) < 0.98  # or the comparison would say little
    assert ssim(a, b) == pytest.approx(naive_ssim(a, b), abs=1e-10)
    assert ssim(a, a) == 1 and ssim(a, 255 - a) < 0


def test_figures_are_means_over_images_with_intervals():
    pairs = [pair(3, seed) for seed in range(7)]
    a, b = (np.stack(images) for images in zip(*pairs, strict=True))
    found = pixel_figures(a, b)
    mse = [float(np.mean((p / 255 - q / 255) ** 2)) for p, q in pairs]
    expected = {
        "mse": mse,
        "psnr": [10 * math.log10(1 / value) for value in mse],
        "ssim": [naive_ssim(p, q) for p, q in pairs],
    }
    assert found.keys() == expected.keys()
    for metric, values in expected.items():
        margin = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
        assert found[metric].value == pytest.approx(np.mean(values), rel=1e-9), metric
        low, high = found[metric].interval
        assert (high - low) / 2 == pytest.approx(margin, rel=1e-6), metric


def test_what_is_lossless_is_finite():
    images = np.stack([pair(1, seed)[0] for seed in range(3)])
    found = pixel_figures(images, images)
    assert [found[m].value for m in ("mse", "psnr", "ssim")] == [0, 100, 1]


def test_sets_that_do_not_match_are_refused():
    images = np.stack([pair(1, seed)[0] for seed in range(3)])
    with pytest.raises(ValueError, match="3 originals, 2 reconstructions"):
        pixel_figures(images, images[:2])
    with pytest.raises(ValueError, match=r"originals \(17, 23, 1\), reconstructions \(23, 17, 1\)"):
        pixel_figures(images, images.transpose(0, 2, 1, 3))
