"""Distances: names, safety of the weights file, and the arithmetic against other ways to it."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity import FeatureExtractorInceptionV3, calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as inception_module

from pipeline.evaluation import extractors, fidelity
from pipeline.evaluation.sets import batches_of, blurred, choose
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.stage import UserError
from pipeline.training.checkpoint import save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """The true architecture of FID's Inception with random weights, saved as people save them."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        module = FeatureExtractorInceptionV3("random", ["2048"])
    for parameter in module.parameters():  # He's scale, else features vanish in 94 layers
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    torch.save(module.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge with random weights; its features are as good as any for arithmetic."""
    out = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    names = ("a", "b")
    model = Classifier(ClassifierConfig(num_outputs=2, channels=8, kind="attributes", names=names))
    save_model(out, "classifier", model, {"half": 1})
    return extractors.judge_extractor(out, CPU)


def photos(count, seed=0, size=32):
    """Smooth random images (N, H, W, 3) uint8 with sharp noise on top."""
    rng = np.random.default_rng(seed)
    waves = np.sin(rng.normal(size=(count, 1, 1, 3)) * 4 + np.arange(size)[:, None, None] / 3)
    noise = rng.normal(size=(count, size, size, 3))
    return (128 + 30 * waves + 60 * noise).clip(0, 255).astype(np.uint8)


def features(extractor, images):
    whole = np.arange(len(images))
    found = fidelity.extract([extractor], batches_of(images, whole), len(images), "test")
    return found[extractor.name]


class Tensors(torch.utils.data.Dataset):
    """(N, H, W, 3) uint8 as torch-fidelity's own front door wants them."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_inception_path_agrees_with_torch_fidelitys_own_front_door(random_weights, monkeypatch):
    path, sha256 = random_weights
    # smaller than its 299 pixels on both sides, for speed
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
    extractor = extractors.inception_extractor(path, CPU, sha256)
    a, b = photos(16, 0, 64), photos(16, 1, 64)
    ours = fidelity.scores(features(extractor, a), features(extractor, b))
    theirs = calculate_metrics(
        input1=Tensors(a), input2=Tensors(b), feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path), fid=True, kid=True, kid_subset_size=8,
        rng_seed=0, isc=True, prc=True, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    assert ours["frechet"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["frechet"].value > 1e-3  # or the comparison would say nothing
    assert ours["kid"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0.02)
    assert ours["precision"].value == theirs["precision"]
    assert ours["recall"].value == theirs["recall"]
    assert ours["inception_score"].value == pytest.approx(theirs["inception_score_mean"], rel=1e-5)


def test_random_weights_never_write_fid(random_weights):
    path, sha256 = random_weights
    with pytest.raises(UserError, match=f"not the published .* --extractor_sha256 {sha256}"):
        extractors.inception_extractor(path, CPU)
    with pytest.raises(UserError, match="has SHA-256") as refusal:
        extractors.inception_extractor(path, CPU, "0" * 64)
    assert "\n" not in str(refusal.value)
    name = extractors.inception_extractor(path, CPU, sha256).name
    assert name == sha256[:8]
    for images in ("samples", "reconstructions", "floor", "blurred"):
        for metric in ("frechet", "kid", "precision"):
            for features_name in (name, "judge"):
                assert "fid" not in fidelity.tag(images, metric, features_name)


def test_names_of_published_and_other_features():
    assert fidelity.tag("samples", "frechet", "inception") == "fid/inception"
    assert fidelity.tag("reconstructions", "frechet", "inception") == "rfid/inception"
    assert fidelity.tag("samples", "frechet", "judge") == "frechet/judge"
    assert fidelity.tag("samples", "kid", "inception") == "kid/inception"
    assert fidelity.tag("floor", "frechet", "judge") == "evaluation/floor/frechet/judge"


def test_evil_weights_are_refused_and_do_nothing(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))):
        write({"fc.weight": Evil()}, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        for known in (None, sha256):
            with pytest.raises(UserError) as refusal:
                extractors.inception_extractor(path, CPU, known)
            assert "\n" not in str(refusal.value) and path.name in str(refusal.value)
            assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_what_is_no_weights_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save({"fc.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        extractors.inception_extractor(path, CPU, hashlib.sha256(path.read_bytes()).hexdigest())
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="cannot be read"):
        extractors.inception_extractor(tmp_path / "absent.pth", CPU)


def test_frechet_of_gaussians_in_closed_form():
    # diagonal covariances: |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2
    rng = np.random.default_rng(0)
    sigma_a, sigma_b = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5])
    a = rng.normal(size=(200_000, 3)) * sigma_a
    b = rng.normal(size=(200_000, 3)) * sigma_b + [1.0, 0.0, -2.0]
    expected = 5.0 + ((sigma_a - sigma_b) ** 2).sum()
    score = fidelity.frechet_from_features(a, b)
    assert score.value == pytest.approx(expected, rel=0.02)
    assert score.interval[0] < expected < score.interval[1]
    assert score == fidelity.frechet_from_features(a, b)


def test_judge_path_against_an_independent_computation(judge):
    images_a, images_b = photos(40, 0), photos(40, 1)[:, ::-1] // 2
    a, b = features(judge, images_a), features(judge, images_b)
    with torch.no_grad():
        tensor = torch.from_numpy(images_a.copy()).permute(0, 3, 1, 2) / 255
        expected = judge.module.model.features(tensor).double()
    torch.testing.assert_close(a["features"], expected, rtol=1e-4, atol=1e-5)
    x, y = a["features"].numpy(), b["features"].numpy()
    ridge = 1e-9 * np.eye(x.shape[1])  # some features are dead, and sqrtm wants full rank
    found = fidelity.scores(a, b)
    root = scipy.linalg.sqrtm((np.cov(x.T) + ridge) @ (np.cov(y.T) + ridge))
    frechet = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        np.cov(x.T) + np.cov(y.T) - 2 * root.real
    )
    assert found["frechet"].value == pytest.approx(frechet, rel=1e-4)
    # KID is unbiased: the mean over subsets is near the estimate on all images
    kernel = lambda p, q: (p @ q.T / x.shape[1] + 1) ** 3  # noqa: E731
    n, xx, yy = len(x), kernel(x, x), kernel(y, y)
    kid = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    kid -= 2 * kernel(x, y).mean()
    assert abs(found["kid"].value - kid) < found["kid"].spread
    reach = np.sort(scipy.spatial.distance.cdist(y, y))[:, fidelity.NEIGHBOURHOOD]
    precision = (scipy.spatial.distance.cdist(x, y) <= reach).any(1).mean()
    assert found["precision"].value == pytest.approx(precision, abs=1e-6)


def test_same_images_are_at_zero_and_blurred_above_the_floor(judge):
    real = photos(400, 0)
    own = features(judge, real)
    assert fidelity.scores(own, own)["frechet"].value == pytest.approx(0, abs=1e-6)
    assert fidelity.scores(own, own)["precision"].value == 1
    floor = fidelity.scores(features(judge, photos(400, 1)), own)
    soft = np.concatenate(list(blurred(batches_of(real, np.arange(400)), 2.0)))
    assert soft.shape == real.shape and soft.dtype == np.uint8
    ceiling = fidelity.scores(features(judge, soft), own)
    assert ceiling["frechet"].value > floor["frechet"].value
    assert ceiling["kid"].value > floor["kid"].value


def test_too_few_images_and_wrong_channels_are_user_errors(judge):
    few = features(judge, photos(8))
    with pytest.raises(UserError, match="too few"):
        fidelity.scores(few, few)
    with pytest.raises(UserError, match="channels"):
        features(judge, np.zeros((2, 32, 32, 4), np.uint8))
    assert features(judge, photos(2)[..., :1])["features"].shape == (2, 32)  # grey is repeated


def test_choice_is_without_replacement_and_keyed():
    chosen = choose(50, np.arange(100, 200), seed=3)
    assert len(set(chosen)) == 50 and chosen.min() >= 100
    assert not np.array_equal(chosen, choose(50, np.arange(100, 200), seed=4))
