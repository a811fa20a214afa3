"""benchmarks/features.py: the contenders see the same images, and who disagrees is not timed."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorInceptionV3

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import features


def test_contenders_agree_on_a_folder(tmp_path, monkeypatch):
    # smaller than its 299 pixels on both sides, for speed
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
    monkeypatch.setitem(features.DEFAULTS, "save_cpu_ram", True)  # no processes
    folder = tmp_path / "images"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 30, 3), np.uint8)
    for name, pixels in zip("dbeac", images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    path = tmp_path / "random.pth"
    module = features.random_inception(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.save(module.state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    own = features.ours(path, sha256, "cpu")(folder)
    theirs = features.torch_fidelity(path, "cpu")(folder)
    assert own.shape == theirs.shape == (5, 2048)
    assert (own - theirs).abs().max() < features.FEATURES * theirs.abs().max()
    assert theirs.std(0).mean() > 0.01  # the images differ, so their order is the same


@pytest.fixture
def agreeing():
    return torch.randn(40, 3).abs() + 0.1


def test_rounding_is_let_through(agreeing):
    row = features.check(agreeing * (1 + 1e-6), agreeing)
    assert 0 < row["max_difference"] < 1e-5
    assert abs(row["frechet"] - row["their_frechet"]) < 1e-4


@pytest.mark.parametrize("fault", ["one is off", "order", "nan", "fewer", "all a little"])
def test_contender_that_disagrees_is_refused(agreeing, fault):
    wrong = agreeing.clone()
    if fault == "one is off":
        wrong[7, 1] += 2e-3 * agreeing.max()
    if fault == "order":
        wrong = wrong.flip(0)
    if fault == "nan":
        wrong[0, 0] = torch.nan
    if fault == "fewer":
        wrong = wrong[1:]
    if fault == "all a little":  # each within its tolerance, the distance of the halves not
        agreeing = 1000 * agreeing
        wrong = agreeing.clone()
        wrong[:20] += 0.9e-3 * agreeing.max()
    with pytest.raises(SystemExit, match="features"):
        features.check(wrong, agreeing)
