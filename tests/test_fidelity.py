"""Distances: names, safety of the weights file, and the arithmetic against other ways to it."""

import hashlib

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity import FeatureExtractorInceptionV3, calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from pipeline.evaluation import extractors, fidelity
from pipeline.evaluation.sets import batches_of, blurred, choose
from pipeline.evaluation.two_sample import classifier_auc
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


def gaussian_distance(mean_a, a, mean_b, b):
    """The Fréchet distance of two Gaussians, by scipy's matrix root."""
    root = scipy.linalg.sqrtm(a @ b)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * root.real)


def random_gaussian(rng, width):
    """A mean (F,), and a factor (F, F) of a full covariance."""
    return rng.normal(size=width), rng.normal(size=(width, width)) / np.sqrt(width)


def test_interval_of_a_distance_holds_that_of_the_gaussians():
    # diagonal covariances: |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2
    rng = np.random.default_rng(0)
    sigma_a, sigma_b = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5])
    a = torch.from_numpy(rng.normal(size=(50_000, 3)) * sigma_a)
    b = torch.from_numpy(rng.normal(size=(40_000, 3)) * sigma_b + [1.0, 0.0, -2.0])
    expected = 5.0 + ((sigma_a - sigma_b) ** 2).sum()
    score = fidelity.frechet_with_interval(a, b)
    assert score.value == pytest.approx(expected, rel=0.02)
    assert score.interval[0] < expected < score.interval[1]
    assert score == fidelity.frechet_with_interval(a, b)


@pytest.mark.parametrize("width", [1, 2, 7])
@pytest.mark.parametrize("full", [False, True])
def test_distance_of_samples_with_known_moments(width, full):
    rng = np.random.default_rng(width)
    sets, moments = [], []
    for count in (2 * width + 17, fidelity.BLOCK + 3):  # the second in two blocks
        mean, factor = random_gaussian(rng, width)
        factor = factor if full else np.diag(np.diag(factor))
        noise = rng.normal(size=(count, width))
        # orthonormal columns of mean 0: exactly these moments
        white = np.linalg.qr(noise - noise.mean(0))[0] * np.sqrt(count - 1)
        sets.append(white @ factor.T + mean)
        moments += [mean, factor @ factor.T]
    expected = gaussian_distance(*moments)
    assert fidelity.frechet_distance(*sets) == pytest.approx(expected, rel=1e-7)
    if width > 1:
        theirs = [fid_features_to_statistics(torch.from_numpy(each)) for each in sets]
        theirs = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
        assert fidelity.frechet_distance(*sets) == pytest.approx(theirs, rel=1e-9)
    single = [torch.from_numpy(each).float() for each in sets]
    assert fidelity.frechet_distance(*single) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_kid_precision_and_recall_against_naive_loops():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(36, 5)) * 0.8 + 0.5, rng.normal(size=(45, 5))
    x, y = x.astype(np.float32), y.astype(np.float32)
    found = fidelity.scores({"layer": torch.from_numpy(x)}, {"layer": torch.from_numpy(y)}, seed=3)
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    xx, yy, xy = ([[kernel(a, b) for b in right] for a in left]
                  for left, right in ((x, x), (y, y), (x, y)))  # fmt: skip
    drawn, values, size = np.random.RandomState(3), [], fidelity.kid_subset_size(36)
    for _ in range(fidelity.KID_SUBSETS):
        rows = drawn.choice(36, size, replace=False)
        columns = drawn.choice(45, size, replace=False)
        same = sum(xx[i][j] for i in rows for j in rows if i != j)
        same += sum(yy[i][j] for i in columns for j in columns if i != j)
        other = sum(xy[i][j] for i in rows for j in columns)
        values.append(same / (size * (size - 1)) - 2 * other / size**2)
    assert found["kid"].value == pytest.approx(np.mean(values), rel=1e-9)
    assert found["kid"].spread == pytest.approx(np.std(values), rel=1e-9)

    def inside(points, others):
        """The share of points within reach of some of the others."""
        reach = [sorted(np.linalg.norm(others - other, axis=1))[3] for other in others]
        near = [any(np.linalg.norm(point - other) <= r for other, r in zip(others, reach,
                strict=True)) for point in points]  # fmt: skip
        return np.mean(near)

    assert 0 < inside(x, y) < 1 and 0 < inside(y, x) < 1
    assert found["precision"].value == pytest.approx(inside(x, y), abs=1e-6)
    assert found["recall"].value == pytest.approx(inside(y, x), abs=1e-6)


def test_order_of_images_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, 6, generator=generator) + 0.2 * count / 50 for count in (50, 70))
    found = fidelity.scores({"layer": x}, {"layer": y})
    for seed in range(3):
        generator.manual_seed(seed)
        mixed = [each[torch.randperm(len(each), generator=generator)] for each in (x, y)]
        other = fidelity.scores({"layer": mixed[0]}, {"layer": mixed[1]})
        assert other["frechet"].value == pytest.approx(found["frechet"].value, rel=1e-9)
        assert other["precision"] == found["precision"] and other["recall"] == found["recall"]
        # KID draws its subsets by position: equal within the error of a mean over them
        error = found["kid"].spread * np.sqrt(2 / fidelity.KID_SUBSETS)
        assert abs(other["kid"].value - found["kid"].value) < 4 * error


def textures(count, kinds=8, seed=0):
    """Images (N, 32, 32, 3) uint8 of stripes of some of 8 directions and colours."""
    rng = np.random.default_rng(seed)
    kind, phase = rng.integers(0, kinds, count), rng.uniform(0, 2 * np.pi, count)
    angle = kind * np.pi / 8
    y, x = np.mgrid[:32, :32]
    wave = np.sin(0.8 * (np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y)
                  + phase[:, None, None])  # fmt: skip
    color = np.stack([kind & 1, kind >> 1 & 1, kind >> 2], 1)[:, None, None] * 60
    return (60 + color + 60 * wave[..., None]).clip(0, 255).astype(np.uint8)


def worse(damage, strength):
    """300 textures, damaged."""
    kinds = 8 - 2 * strength if damage == "dropped kinds" else 8
    images = textures(300, kinds, seed=1)
    if damage == "blur" and strength:
        return next(iter(blurred([images], 1 + 0.4 * strength)))
    if damage == "noise":
        noise = np.random.default_rng(2).normal(size=images.shape) * 15 * strength
        return (images + noise).clip(0, 255).astype(np.uint8)
    return images


@pytest.mark.parametrize("damage", ["blur", "noise", "dropped kinds"])
def test_more_damage_scores_worse(judge, damage):
    real = features(judge, textures(300, seed=0))
    rows = [features(judge, worse(damage, strength)) for strength in range(4)]
    found = [fidelity.scores(row, real) for row in rows]
    for metric in ("frechet", "kid"):
        values = [scores[metric].value for scores in found]
        assert all(np.diff(values) > 0), (metric, values)
        assert values[3] > 3 * abs(values[0])
    auc = [classifier_auc(row["features"], real["features"]).value for row in rows]
    assert auc[0] < 0.6 and all(np.diff(auc) > 0), auc
    suffers = "recall" if damage == "dropped kinds" else "precision"
    values = [scores[suffers].value for scores in found]
    assert max(values[1:]) < values[0] - 0.1, values


def drawn(rng, count, mean, factor):
    return torch.from_numpy(rng.normal(size=(count, len(mean))) @ factor.T + mean)


def test_extrapolation_recovers_the_distance_of_gaussians_within_its_error():
    rng = np.random.default_rng(0)
    (mean_a, a), (_, b) = random_gaussian(rng, 12), random_gaussian(rng, 12)
    mean_b = mean_a + 0.1  # far means would hide the bias, which is of the covariances, in noise
    truth = gaussian_distance(mean_a, a @ a.T, mean_b, b @ b.T)
    limits, errors, whole = [], [], []
    for _ in range(24):
        found = fidelity.extrapolated_frechet(
            drawn(rng, 160, mean_a, a), drawn(rng, 200, mean_b, b)
        )
        (zero, limit, error), (inverse, value, none) = found.points[:2]
        assert (zero, limit, none, inverse) == (0, found.limit.value, None, 1 / 160)
        assert [point[0] * 160 for point in found.points[1:]] == pytest.approx([1, 2, 4, 8])
        # weighted least squares by the normal equations
        x, y = np.array(found.points[1:], float)[:, :2].T
        design, weights = np.stack([np.ones(4), x], 1), np.diag([8, 4, 2, 1])
        line = np.linalg.solve(design.T @ weights @ design, design.T @ weights @ y)
        assert limit == pytest.approx(line[0], rel=1e-9)
        limits.append(limit), errors.append(error), whole.append(value)
    of_mean = np.std(limits) / np.sqrt(len(limits))
    assert np.mean(whole) - truth > 4 * of_mean  # or there would be nothing to remove
    assert abs(np.mean(limits) - truth) < 3 * of_mean
    assert 0.6 < np.sqrt(np.mean(np.square(errors))) / np.std(limits) < 1.7
    inside = [abs(limit - truth) < 2.4 * e for limit, e in zip(limits, errors, strict=True)]
    assert np.mean(inside) >= 0.8


def test_a_line_that_bends_widens_the_error():
    # parts of 64 images with 128 features: the bias goes with 1/n no more
    found = fidelity.extrapolated_frechet(torch.randn(512, 128), torch.randn(512, 128))
    low, high = found.limit.interval
    assert low < 0 < high
    assert found.limit.value > 3 * found.points[-1][2]  # the error of the parts alone misses 0


def test_sets_in_pairs_stay_in_pairs():
    # reconstructions are off by less than two draws of real images are
    rng = np.random.default_rng(0)
    mean, factor = random_gaussian(rng, 6)
    covariance, off = factor @ factor.T, 0.1 * np.eye(6)
    real = drawn(rng, 400, mean, factor)
    near = real + torch.from_numpy(rng.normal(size=real.shape)) * 0.1
    truth = gaussian_distance(mean, covariance, mean, covariance + off @ off)
    found = fidelity.extrapolated_frechet(near, real)
    low, high = found.limit.interval
    assert low < truth < high
    apart = fidelity.extrapolated_frechet(near[torch.randperm(400)], real).limit.interval
    assert high - low < 0.5 * (apart[1] - apart[0])
    low, high = fidelity.frechet_with_interval(near, real).interval
    apart = fidelity.frechet_with_interval(near[torch.randperm(400)], real).interval
    assert high - low < 0.5 * (apart[1] - apart[0])


def test_mean_and_spread_over_seeds():
    found = fidelity.over_seeds([fidelity.Score(value) for value in (1.0, 2.0, 6.0)])
    assert found == (3.0, None, pytest.approx(np.sqrt(7)))  # (4 + 1 + 9) / 2
    with pytest.raises(ValueError, match="at least 2"):
        fidelity.over_seeds([fidelity.Score(1.0)])


def test_fewer_images_than_features_are_warned_of_in_one_line():
    assert fidelity.shortage(2049, 2048) is None
    for count in (16, 2048):
        line = fidelity.shortage(count, 2048)
        assert f"{count:,} images" in line and "2,048 features" in line and "\n" not in line
    x = np.random.default_rng(0).normal(size=(16, 16))
    assert np.linalg.matrix_rank(np.cov(x.T)) < 16 == np.linalg.matrix_rank(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_image(bad):
    good, broken = torch.ones(20, 3), torch.ones(20, 3)
    broken[17, 2] = bad
    for measure in (fidelity.frechet, fidelity.scores):
        with pytest.raises(UserError, match="real image 17 are not finite"):
            measure({"layer": good}, {"layer": broken})
    with pytest.raises(UserError, match="generated image 17 are not finite"):
        fidelity.extrapolated_frechet(broken, good)


def test_too_few_and_unlike_features_are_refused():
    with pytest.raises(UserError, match="127 images are too few to extrapolate"):
        fidelity.extrapolated_frechet(torch.ones(127, 2), torch.ones(500, 2))
    with pytest.raises(ValueError, match="widths"):
        fidelity.frechet({"layer": torch.ones(20, 3)}, {"layer": torch.ones(20, 4)})


def test_judge_path_against_an_independent_computation(judge):
    images_a, images_b = photos(40, 0), photos(40, 1)[:, ::-1] // 2
    a, b = features(judge, images_a), features(judge, images_b)
    with torch.no_grad():
        tensor = torch.from_numpy(images_a.copy()).permute(0, 3, 1, 2) / 255
        expected = judge.module.model.features(tensor).double()
    torch.testing.assert_close(a["features"], expected, rtol=1e-4, atol=1e-5)
    x, y = a["features"].numpy(), b["features"].numpy()
    ridge = 1e-9 * np.eye(x.shape[1])  # some features are dead, and sqrtm wants full rank
    frechet = gaussian_distance(x.mean(0), np.cov(x.T) + ridge, y.mean(0), np.cov(y.T) + ridge)
    assert fidelity.scores(a, b)["frechet"].value == pytest.approx(frechet, rel=1e-4)


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
