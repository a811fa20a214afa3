"""Extractors: folded Inception and torch-fidelity's own networks, and files that must not pass."""

import copy
import hashlib
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity import (
    FeatureExtractorDinoV2,
    FeatureExtractorInceptionV3,
    feature_extractor_clip,
    sample_similarity_lpips,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models.vgg import cfgs, make_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from features import random_inception

from pipeline.evaluation import extractors
from pipeline.evaluation.inception import FoldedInception, _resizing
from pipeline.stage import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # CLIP's file format


def pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(state, path):
    torch.save(state, path)
    return path, sha256_of(path)


@pytest.fixture(scope="module")
def inception():
    """The true architecture with random weights and batch norms that do something."""
    return random_inception(pixels(2, 3, 75, 75))


@pytest.fixture(scope="module")
def inception_file(inception, tmp_path_factory):
    return saved(inception.state_dict(), tmp_path_factory.mktemp("inception") / "weights.pth")


# Inception, folded.


def test_folded_features_are_torch_fidelitys_at_full_size(inception):
    images = pixels(1, 3, 64, 64)
    expected = inception(images)
    for found, feature in zip(FoldedInception(inception)(images), expected, strict=True):
        assert found.shape == feature.shape and found.dtype == torch.float32
        assert (found - feature).abs().max() < 1e-4 * feature.abs().max()


@pytest.mark.parametrize("size", [(33, 70), (160, 107)])
def test_folding_is_exact_to_rounding(inception, size, monkeypatch):
    # smaller than its 299 pixels on both sides, for speed
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
    monkeypatch.setattr("pipeline.evaluation.inception.CPU_BATCH", 2)
    images = pixels(3, 3, *size).to(memory_format=torch.channels_last)
    original = copy.deepcopy(inception).double()
    original.feature_extractor_internal_dtype = torch.float64
    expected = []  # before its forward rounds to float32
    original.AvgPool.register_forward_hook(lambda *args: expected.append(args[2].flatten(1)))
    original(images)
    features, logits = FoldedInception(original)(images)
    torch.testing.assert_close(features, expected[0], rtol=0, atol=1e-9)
    by_hand = expected[0] @ original.fc.weight.T
    torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-9 * float(by_hand.abs().max()))


@pytest.mark.parametrize("size", [(64, 64), (1, 17), (299, 299), (320, 601)])
def test_resizing_is_torch_fidelitys(size):
    images = pixels(2, 3, *size).float()
    rows, columns = (_resizing(length, images) for length in size)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, (299, 299), align_corners=False)
    torch.testing.assert_close(rows @ images @ columns.T, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), pixels(1, 1, 8, 8), pixels(3, 8, 8)]
)  # fmt: skip
def test_what_is_no_batch_of_colour_images_is_refused(inception, images):
    with pytest.raises(ValueError, match="must be"):
        FoldedInception(inception)(images)


# Finding.


def test_published_inception_is_found_where_torch_hub_keeps_it(
    inception_file, tmp_path, monkeypatch
):
    path, sha256 = inception_file
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found, absent = extractors.find_extractors(None, None, None, CPU)
    assert found == [] and len(absent) == 4
    for flag in ("--judge", "--inception_weights", "--dinov2_weights", "--clip_weights"):
        assert sum(flag in line for line in absent) == 1
    assert not any("\n" in line for line in absent)

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / extractors.URL_INCEPTION_V3.rpartition("/")[2]).symlink_to(path)
    monkeypatch.setitem(extractors.INCEPTION.published, sha256, "inception")
    found, absent = extractors.find_extractors(None, None, None, CPU)
    assert [(extractor.name, extractor.sha256) for extractor in found] == [("inception", sha256)]
    assert len(absent) == 3 and not any("--inception_weights" in line for line in absent)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A published file of a few bytes at a URL; its bytes may be changed. (file, torch.hub's)"""
    file, hub = tmp_path / "there" / "weights.pth", tmp_path / "hub"
    file.parent.mkdir()
    file.write_bytes(b"published")
    network = extractors.INCEPTION._replace(
        source=file.as_uri(), published={sha256_of(file): "inception"}
    )
    monkeypatch.setattr(extractors, "INCEPTION", network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    return file, hub / "checkpoints"


def test_download_comes_when_asked_for_and_once(published):
    file, hub = published
    assert extractors.find_inception_weights(None) is None and not hub.exists()
    path = extractors.find_inception_weights(None, download=True)
    assert path.parent == hub and path.read_bytes() == b"published"
    file.unlink()
    assert extractors.find_inception_weights(None, download=True) == path
    given = Path("given.pth")
    assert extractors.find_inception_weights(given, download=True) == given


@pytest.mark.parametrize("fault", ["absent", "other", "cut off"])
def test_failed_download_is_one_line_and_leaves_nothing(published, fault):
    file, hub = published
    file.unlink()
    if fault != "absent":
        file.write_bytes(b"publishes" if fault == "other" else b"publish")
    with pytest.raises(UserError, match=r"cannot be downloaded .* --inception_weights") as refusal:
        extractors.find_extractors(None, None, None, CPU, download=True)
    assert "\n" not in str(refusal.value)
    assert list(hub.iterdir()) == []


# Files that must not pass, for every network.

LOADERS = {
    "Inception": extractors.inception_extractor,
    "DINOv2": extractors.dinov2_extractor,
    "CLIP": extractors.clip_extractor,
    "LPIPS": lambda path, *rest: extractors.lpips_similarity(path, path, *rest),
}


@pytest.fixture(params=LOADERS)
def load(request, tmp_path, monkeypatch):
    """A loader; DINOv2's has code that must not be run for a bad file."""
    (tmp_path / "facebookresearch_dinov2_main").mkdir()
    (tmp_path / "facebookresearch_dinov2_main" / "hubconf.py").write_text("assert False")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refused(path, sha256, match):
        with pytest.raises(UserError, match=match) as refusal:
            LOADERS[request.param](path, CPU, sha256)
        assert path.name in str(refusal.value) and "\n" not in str(refusal.value)

    return refused


def test_files_that_cannot_be_trusted_are_refused_in_one_line(load, tmp_path):
    path, sha256 = saved({"weight": torch.arange(1000.0)}, tmp_path / "weights.pth")
    load(path, sha256, "the weights of another network than")
    load(path, f"{'0' * 64},{sha256.upper()}", "the weights of another network than")
    load(path, "0" * 64, f"has SHA-256 {sha256}, not --extractor_sha256 0000")
    load(path, None, f"is not the published .* --extractor_sha256 {sha256} .* {sha256[:8]}")
    path.write_bytes(path.read_bytes()[:-500])
    load(path, None, "only a part of it")
    load(path, sha256, "has SHA-256")
    for content in (path.read_bytes(), b"", b"not weights"):
        path.write_bytes(content)
        load(path, sha256_of(path), "cannot be read safely")
    load(tmp_path / "absent.pth", None, "cannot be read: No such file")


def test_code_in_a_pickle_is_not_run(load, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))):
        write({"weight": Evil()}, path)
        for known, why in ((None, "is not "), (sha256_of(path), "cannot be read safely")):
            load(path, known, why)
            assert not canary.exists()


def test_script_in_place_of_tensors_is_not_run(load, tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.script(nn.Linear(1, 1)).save(str(path))
    load(path, sha256_of(path), "cannot be read safely")


# torch-fidelity's other networks, against its own front doors.


class Holder(nn.Module):
    """Tensors under given names, as in a file of TorchScript; it computes nothing."""

    def __init__(self, state):
        super().__init__()
        for key, tensor in state.items():
            *path, name = key.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(name, tensor)


def test_clip_is_torch_fidelitys(tmp_path, monkeypatch):
    network = feature_extractor_clip.CLIPVisual(
        embed_dim=8, image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=16
    )
    state = {**network.state_dict(), "text_projection": torch.zeros(4, 8)}
    script = tmp_path / "script.pt"
    torch.jit.script(Holder(state)).save(str(script))
    theirs = feature_extractor_clip.FeatureExtractorCLIP(
        "clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(script)
    )
    images = pixels(3, 3, 20, 24)
    (expected,) = theirs(images)
    assert expected.std() > 0.01

    path, sha256 = saved(state, tmp_path / "clip.pth")
    ours = extractors.clip_extractor(path, CPU, sha256)
    assert (ours.name, ours.sha256, ours.channels) == (sha256[:8], sha256, 3)
    torch.testing.assert_close(ours.module(images)[0], expected, rtol=0, atol=0)

    monkeypatch.setitem(extractors.CLIP.published, sha256_of(script), "clip-vit-b-32")
    ours = extractors.clip_extractor(script, CPU)
    assert ours.name == "clip-vit-b-32"
    torch.testing.assert_close(ours.module(images)[0], expected, rtol=0, atol=0)


HUBCONF = """
import torch
class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, 384))
        self.patches = torch.nn.Conv2d(3, 384, 14, 14)
    def forward(self, x):
        return self.cls_token[0] * self.patches(x).tanh().mean((2, 3))
def dinov2_vits14(pretrained=True):
    assert not pretrained
    return Network()
"""


def test_dinov2_is_torch_fidelitys_around_the_repositorys_code(tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    network = types.ModuleType("hubconf")
    exec(HUBCONF, network.__dict__)
    model = network.dinov2_vits14(pretrained=False)
    path, sha256 = saved(model.state_dict(), tmp_path / "dinov2.pth")
    with pytest.raises(UserError, match=r"no hubconf\.py; git clone .* --dinov2_code"):
        extractors.dinov2_extractor(path, CPU, sha256, code)
    (code / "hubconf.py").write_text(HUBCONF)
    monkeypatch.setitem(extractors.DINOV2.published, sha256, "dinov2-vit-s-14")
    found, absent = extractors.find_extractors(None, None, None, CPU, dinov2=path, dinov2_code=code)
    ours = found[-1]
    assert ours.name == "dinov2-vit-s-14" and not any("dinov2" in line for line in absent)

    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: model)
    theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = pixels(3, 3, 40, 24)
    torch.testing.assert_close(ours.module(images), theirs(images), rtol=0, atol=0)


def test_lpips_is_torch_fidelitys(tmp_path, monkeypatch):
    layers = make_layers(cfgs["D"])
    state = {f"features.{key}": value for key, value in layers.state_dict().items()}
    vgg16, sha256 = saved({**state, "classifier.0.bias": torch.zeros(2)}, tmp_path / "vgg16.pth")
    widths = (64, 128, 256, 512, 512)
    lins = {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1) for n, w in enumerate(widths)}
    lpips, _ = saved(lins, tmp_path / "lpips.pth")
    module = sample_similarity_lpips
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: lins)
    monkeypatch.setattr(
        module, "torchvision_load_pretrained_vgg16", lambda: types.SimpleNamespace(features=layers)
    )
    theirs = module.SampleSimilarityLPIPS("lpips-vgg16")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    nothing, absent = extractors.find_similarity(lpips, None, sha256, CPU)
    assert nothing is None and len(absent) == 1
    assert "--vgg16_weights" in absent[0] and "--lpips_weights" not in absent[0]
    monkeypatch.setitem(extractors.LPIPS.published, sha256_of(lpips), "lpips")
    ours, absent = extractors.find_similarity(lpips, vgg16, sha256, CPU)
    assert absent == [] and ours.name == sha256[:8]  # VGG16 is not the published one
    assert ours.sha256 == sha256_of(lpips) + sha256
    monkeypatch.setitem(extractors.VGG16.published, sha256, "vgg16")
    assert extractors.lpips_similarity(lpips, vgg16, CPU).name == "lpips"

    a, b = pixels(2, 24, 17, 3), pixels(2, 24, 17, 3, seed=1)
    expected = theirs(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2)).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(ours(a.numpy(), b.numpy()), expected, rtol=0, atol=0)
    assert ours(a.numpy(), a.numpy()).tolist() == [0, 0]
    grey = a[..., :1].numpy()
    repeated = np.repeat(grey, 3, 3)
    torch.testing.assert_close(ours(grey, b.numpy()), ours(repeated, b.numpy()), rtol=0, atol=0)
