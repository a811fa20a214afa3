"""The likelihood bound of a VQ-VAE and its priors: masses that sum to one, scipy, enumeration."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from pipeline import compare
from pipeline.data.images import open_images
from pipeline.evaluation import comparison, pictures
from pipeline.evaluation.code_likelihood import code_nats, fit_log_scale, image_nats, logistic_nats
from pipeline.evaluation.comparison import Data
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.priors import make_prior
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.training.checkpoint import model_sha256, save_model

CPU, SIZE, K = torch.device("cpu"), 32, 8
GRIDS = [(4, 4), (8, 8)]


def prior(level=0, grid=(2, 2), codes=3, coarser=(), **changes):
    torch.manual_seed(level)
    sizes = {"channels": 8, "layers": 2, "kernel_size": 3, "condition_layers": 1, "dropout": 0.0}
    config = PriorConfig(
        **sizes, grid=grid, codebook_size=codes, coarser_codebook_sizes=coarser, **changes
    )
    return make_prior(config).eval()


def vqvae(**changes):
    torch.manual_seed(0)
    sizes = {"channels": 8, "residual_channels": 8, "code_dim": 4}
    return VQVAE(VQVAEConfig(**sizes, **changes)).eval()


@pytest.fixture(scope="module")
def model():
    return vqvae(codebook_size=(K,), ratios=(2, 4))


@pytest.fixture(scope="module")
def data(face_shards):
    train, real = (open_images(face_shards, s, SIZE, progress=False) for s in ("train", "valid"))
    return Data(train, 60, real, np.array([11, 3, 0, 7, 5, 9]), 0, CPU)


# The pixels.


@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0, 2.0])
def test_the_masses_of_all_256_values_sum_to_one(log_scale):
    """Of means within and beyond the pixels' range, narrow and flat."""
    values = torch.arange(256, dtype=torch.float64).view(-1, 1, 1, 1) / 255
    for mean in (-0.2, 0.0, 0.3137, 1.0, 1.1):
        mass = torch.exp(-logistic_nats(torch.full_like(values, mean), values, log_scale))
        assert float(mass.sum()) == pytest.approx(1, abs=1e-12)


def test_logistic_nats_against_scipy():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (5, 3, 4, 4), generator=generator)
    values[:, :, 0] = torch.tensor([0, 255, 0, 255])
    means = torch.rand(5, 3, 4, 4, dtype=torch.float64, generator=generator) * 1.2 - 0.1
    found = logistic_nats(means, values.double() / 255, -2.0)
    np.testing.assert_allclose(found, scipy_nats(means, values.numpy(), -2.0), rtol=1e-9)


def scipy_nats(means, values, log_scale):
    """-log p in nats (B,) of values 0..255 (B, C, H, W)."""
    density = stats.logistic(2 * np.asarray(means, np.float64) - 1, math.exp(log_scale))
    upper = np.where(values == 255, 1, density.cdf((values + 0.5) / 127.5 - 1))
    lower = np.where(values == 0, 0, density.cdf((values - 0.5) / 127.5 - 1))
    return -np.log(upper - lower).sum((1, 2, 3))


def test_the_scale_is_the_one_that_another_search_finds(model, data):
    """scipy's masses, minimised by Brent's method without bounds."""
    images = data.train[np.arange(60)]
    with torch.no_grad():
        means = model(pictures.to_unit(images)).reconstructions
    values = images.transpose(0, 3, 1, 2)
    best = optimize.minimize_scalar(lambda s: scipy_nats(means, values, s).sum(), bracket=(-2, 0))
    found = fit_log_scale(model, data.train, np.arange(60), CPU)
    assert found == pytest.approx(best.x, abs=2e-3)
    assert -7 < found < 2


# The codes.


def test_the_probabilities_of_all_codes_sum_to_one():
    """Two levels, a coarse code of 2 and four fine ones of 3: with y hidden, and given."""
    levels = [
        prior(0, (1, 1), 2, num_attributes=2),
        prior(1, (2, 2), 3, coarser=(2,), num_classes=3, architecture="pixelsnail"),
    ]
    every = torch.tensor(list(itertools.product(range(2), *[range(3)] * 4)))
    codes = [every[:, :1].view(-1, 1, 1), every[:, 1:].reshape(-1, 2, 2)]
    labels = torch.full((len(every),), 2)
    attributes = torch.tensor([[1, -1]], dtype=torch.int8).expand(len(every), 2)
    ways = [(None, None), (labels, None), (None, attributes), (labels, attributes)]
    with torch.no_grad():
        found = [code_nats(levels, codes, *y).sum(1) for y in ways]
    for nats in found:
        assert nats.dtype == torch.float64
        assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-5)
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other, rtol=1e-3)


def test_the_nats_of_each_level_are_the_priors_own_losses():
    levels = [prior(0, (3, 2), 5), prior(1, (6, 4), 7, coarser=(5,))]
    codes = [torch.randint(5, (4, 3, 2)), torch.randint(7, (4, 6, 4))]
    with torch.no_grad():
        found = code_nats(levels, codes)
        for row in range(4):
            one = [level[row : row + 1] for level in codes]
            expected = [6 * float(levels[0](one[0])), 24 * float(levels[1](one[1], one[:1]))]
            assert found[row].tolist() == pytest.approx(expected, rel=1e-5)


# Both.


class Images:
    """As much of an ImageSet as is read."""

    def __init__(self, pixels):
        self.pixels = pixels
        self.labels = np.full(len(pixels), -1)
        self.attributes = np.zeros((len(pixels), 0), np.int8)

    def __getitem__(self, indices):
        return self.pixels[indices]


def test_the_bound_is_the_term_of_the_own_codes_in_the_enumerated_likelihood():
    """Images of 4 x 4 pixels and a single code of three: log p(x) is a sum over three terms."""
    model = vqvae(ratios=(4,), codebook_size=(3,))
    own, images = prior(grid=(1, 1)), Images(np.random.randint(0, 256, (70, 4, 4, 3), np.uint8))
    log_scale = 2.0  # flat, so that the other codes count too
    found = image_nats(model, [own], log_scale, images, np.arange(70), CPU)
    every = torch.arange(3).view(3, 1, 1)
    unit = pictures.to_unit(images.pixels)
    with torch.no_grad():
        log_p_codes = own.logits(every, own.condition(3))[0, 0, 0].log_softmax(-1)
        decoded = model.decode([model.quantizers[0].lookup(every)])
        pixels = [logistic_nats(each.expand_as(unit), unit, log_scale) for each in decoded]
        terms = log_p_codes[:, None] - torch.stack(pixels)  # (3, 70)
        chosen = model.encode_codes(unit)[0][:, 0, 0]
    bound = -(found.pixels + found.codes)
    expected = terms[chosen, torch.arange(70)].double()
    torch.testing.assert_close(bound, expected, rtol=1e-5, atol=0)
    assert (bound < terms.double().logsumexp(0)).all()
    assert torch.equal(found.codes, found.codes_given_y)  # this prior knows no y


@pytest.fixture(scope="module")
def priors(data):
    known = len(data.real.index.attribute_names)
    return [
        prior(0, GRIDS[0], K, num_attributes=known),
        prior(1, GRIDS[1], K, coarser=(K,), num_attributes=known),
    ]


def test_figures_are_means_over_the_chosen_images(model, priors, data):
    """Each image on its own, with its own attributes or none."""
    found = comparison.vqvae_likelihood(model, priors, data)
    log_scale = found["logistic_log_scale"].value
    assert log_scale == fit_log_scale(model, data.train, np.arange(60), CPU)
    pixels, hidden, given = [], [], []
    for index in data.chosen:
        unit = pictures.to_unit(data.real[[index]])
        y = torch.from_numpy(data.real.attributes[[index]])
        with torch.no_grad():
            output = model(unit)
            pixels.append(float(logistic_nats(output.reconstructions, unit, log_scale)))
            hidden.append(float(code_nats(priors, output.codes).sum()))
            given.append(float(code_nats(priors, output.codes, attributes=y).sum()))
    assert not np.allclose(hidden, given)
    bits = 3 * SIZE**2 * math.log(2)
    bound = np.add(pixels, hidden)
    expected = {
        "pixel_nats": pixels,
        "code_length_nats": hidden,
        "code_length_bits_per_dimension": np.divide(hidden, bits),
        "bound": bound,
        "bits_per_dim": bound / bits,
        "bound_given_y": np.add(pixels, given),
    }
    assert found.keys() - {"logistic_log_scale"} == expected.keys()
    for tag, values in expected.items():
        assert found[tag].value == pytest.approx(np.mean(values), rel=1e-5)
        half = 1.96 * stats.sem(values)
        assert np.diff(found[tag].interval) == pytest.approx(2 * half, rel=1e-3)


def test_without_priors_there_is_no_bound_and_without_y_none_given_it(model, data):
    assert set(comparison.vqvae_likelihood(model, [], data)) == {"pixel_nats", "logistic_log_scale"}
    alone = [prior(0, GRIDS[0], K), prior(1, GRIDS[1], K, coarser=(K,))]
    found = comparison.vqvae_likelihood(model, alone, data)
    assert "bound" in found and "bound_given_y" not in found


def test_priors_count_where_they_are_of_the_checkpoints_own_codes(model, tmp_path, capsys):
    save_model(tmp_path / "vqvae", "vqvae", model, {})
    sha256 = model_sha256(tmp_path / "vqvae")
    find = lambda: compare.find_priors("vqvae", tmp_path / "vqvae", sha256, 2)  # noqa: E731
    for level in range(2):
        assert find() == []
        assert f"prior-level{level} holds no trained model" in capsys.readouterr().out
        about = {"codes": {"checkpoint_sha256": sha256}, "level": level}
        save_model(tmp_path / f"prior-level{level}", "prior", prior(level), about)
    assert find() == [tmp_path / "prior-level0", tmp_path / "prior-level1"]
    for changes in ({"level": 0}, {"codes": {"checkpoint_sha256": "0" * 64}}):
        save_model(tmp_path / "prior-level1", "prior", prior(1), about | changes)
        assert find() == [] and "prior-level1 is of other codes" in capsys.readouterr().out


def test_the_comparison_has_the_bound_and_measures_it_anew_for_other_priors(
    model, priors, data, face_shards, tmp_path
):
    recipe = data.real.recipe.hash
    config = {"image_size": SIZE}
    save_model(tmp_path / "vqvae", "vqvae", model,
               {"config": config, "images_seen": 0, "recipe": recipe})  # fmt: skip
    names = ("a", "b")
    judge = Classifier(ClassifierConfig(num_outputs=2, channels=8, kind="attributes", names=names))
    save_model(tmp_path / "judge", "classifier", judge, {"half": 1, "recipe": recipe})
    values = []
    for last in (priors[1], prior(5, GRIDS[1], K, coarser=(K,))):
        for level, each in enumerate((priors[0], last)):
            codes = {"checkpoint_sha256": model_sha256(tmp_path / "vqvae")}
            save_model(tmp_path / f"prior-level{level}", "prior", each,
                       {"codes": codes, "level": level})  # fmt: skip
        compare.main(
            compare.Compare(data=face_shards, runs=[tmp_path / "vqvae"], judge=tmp_path / "judge",
                            out=tmp_path / "out", train_images=60)
        )  # fmt: skip
        report = json.loads((tmp_path / "out/comparison.json").read_text())
        values.append(report["rows"]["vqvae"]["bound"]["value"])
        table = comparison.markdown(report).split("## Likelihood")[1]
        assert "| bound, nats | VQ-VAE given y, nats |" in table
        assert f"{values[-1]:,.0f} [" in table
    assert values[0] != values[1]
