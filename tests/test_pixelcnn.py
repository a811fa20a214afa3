"""Causality by gradients, exact probabilities, and sampling against the naive order."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from pipeline import stage
from pipeline.models.pixelcnn import PixelCNN, PixelCNNConfig, UpwardConv
from pipeline.models.sampling import gumbel_noise, sample_codes
from pipeline.train_prior import TrainPrior
from pipeline.train_vqvae import TrainVQVAE

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*/train_prior_level*.yaml"))


def prior_config(path: Path) -> PixelCNNConfig:
    """The model of a prior's YAML on the codes of the VQ-VAE beside it, with its condition."""
    prior = stage.parse(TrainPrior, ["--config", str(path), "--codes", "x", "--out", "y"])
    beside = path.parent / "train_vqvae.yaml"
    vqvae = stage.parse(TrainVQVAE, ["--config", str(beside), "--data", "x", "--out", "y"])
    level, sizes = int(path.stem[-1]), vqvae.model.codebook_sizes
    return dataclasses.replace(
        prior.model,
        codebook_size=sizes[level],
        coarser_codebook_sizes=sizes[:level],
        num_attributes=40 if prior.condition == "attributes" else 0,
        num_classes=10 if prior.condition == "class" else 0,
    )


def dependencies(model: PixelCNN, size: int, coarser=None) -> torch.Tensor:
    """(i, j, i', j'): whether the logits at (i, j) depend on the code at (i', j'), by gradients."""
    width = model.config.channels
    # four random inputs, as at one of them all units of a narrow ReLU layer may be off
    embedded = torch.randn(4, size, size, width, dtype=torch.float64, requires_grad=True)
    condition = model.condition(4, (size, size), coarser)
    logits = model.logits_from_embedding(embedded, condition)
    found = torch.zeros(size, size, size, size, dtype=torch.bool)
    for i, j in itertools.product(range(size), repeat=2):
        # a random projection, so that no gradient cancels by symmetry
        projection = torch.randn(logits.shape[1], dtype=torch.float64)
        output = (logits[:, :, i, j] @ projection).sum()
        (gradient,) = torch.autograd.grad(output, embedded, retain_graph=True)
        found[i, j] = gradient.abs().sum((0, -1)) > 0
    return found


def allowed(size: int, slope: int) -> torch.Tensor:
    """What a prior may depend on: t' < t on a front of this slope, and rows not below."""
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    t = j + slope * i
    return (t[None, None] < t[:, :, None, None]) & (i[None, None] <= i[:, :, None, None])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_config_is_causal_in_raster_and_wavefront_order(path):
    config = prior_config(path)
    model = PixelCNN(dataclasses.replace(config, channels=8)).double().eval()
    coarser = [torch.randint(size, (4, 4, 4)) for size in config.coarser_codebook_sizes]
    found, may = dependencies(model, 8, coarser), allowed(8, config.slope)
    assert not (found & ~may).any()
    # and it sees what a prior needs: the whole row to its left and its neighbours above
    for i, j in itertools.product(range(8), repeat=2):
        reach = (config.kernel_size // 2) * (config.layers + 1)
        assert found[i, j, i, max(0, j - reach) : j].all()
        if i:
            assert found[i, j, i - 1, max(0, j - 2) : j + 2].all()


@pytest.mark.parametrize("fault", ["own row", "own position"])
def test_a_wrong_mask_is_caught(fault, monkeypatch):
    """The test above must fail for the classic vertical stack, and for a mask that sees itself."""
    model = PixelCNN(PixelCNNConfig(channels=8, layers=3, codebook_size=11)).double().eval()
    if fault == "own row":

        def with_own_row(self, x):
            padded = torch.nn.functional.pad(x, (self.reach, self.reach, self.rows - 1, 0))
            return torch.nn.Conv2d.forward(self, padded)

        monkeypatch.setattr(UpwardConv, "forward", with_own_row)
    else:
        model.first_left.strict = False
        weight = model.first_left.weight
        model.first_left.weight = torch.nn.Parameter(torch.cat([weight, weight[..., :1]], -1))
    assert (dependencies(model, 6) & ~allowed(6, model.slope)).any()


def test_paper_size_priors_can_be_built():
    for path in (path for path in CONFIGS if path.parent.name == "celeba256"):
        config = prior_config(path)
        with torch.device("meta"):
            model = PixelCNN(config)
        assert sum(p.numel() for p in model.parameters()) > 10_000_000


def test_probabilities_of_all_images_sum_to_one():
    config = PixelCNNConfig(channels=8, layers=2, kernel_size=3, codebook_size=3, dropout=0.0)
    model = PixelCNN(config).double().eval()
    images = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    with torch.no_grad():
        logits = model.logits(images, model.condition(len(images), (2, 2)))
    log_p = -torch.nn.functional.cross_entropy(logits, images, reduction="none").sum((1, 2))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def naive_sample(model, condition, noise, temperature):
    """One whole forward pass per position, in raster order."""
    batch, _, height, width = noise.shape
    codes = torch.zeros(batch, height, width, dtype=torch.int64)
    for i, j in itertools.product(range(height), range(width)):
        logits = model.logits(codes, condition)[:, :, i, j]
        codes[:, i, j] = (logits / temperature + noise[:, :, i, j]).argmax(1)
    return codes


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (5, 7)])
@torch.no_grad()
def test_front_by_front_equals_raster_order(kernel_size, grid):
    config = PixelCNNConfig(
        channels=8, layers=3, kernel_size=kernel_size, codebook_size=13, coarser_codebook_sizes=(5,)
    )
    model = PixelCNN(config).double().eval()
    for parameter in model.parameters():
        parameter.mul_(2)  # so that the codes depend on each other strongly
    condition = model.condition(3, grid, [torch.randint(5, (3, 2, 2))])
    noise = torch.from_numpy(gumbel_noise(7, range(3), 0, 13, grid)).double()
    fast = sample_codes(model, condition, noise, 0.8)
    assert torch.equal(fast, naive_sample(model, condition, noise, 0.8))
    assert len(fast.unique()) > 1 or fast.numel() == 3


@torch.no_grad()
def test_samples_follow_the_model():
    """A 1x1 grid is one softmax: the drawn frequencies against its probabilities."""
    model = PixelCNN(PixelCNNConfig(channels=8, layers=1, codebook_size=4)).eval()
    model.head[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0, -1.0]))
    condition = model.condition(4000, (1, 1))
    noise = torch.from_numpy(gumbel_noise(0, range(4000), 0, 4, (1, 1)))
    drawn = sample_codes(model, condition, noise).flatten().bincount(minlength=4) / 4000
    codes = torch.zeros(1, 1, 1, dtype=torch.int64)
    expected = model.logits(codes, condition[:1]).softmax(1).flatten()
    assert (drawn - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_noise_is_keyed_by_seed_image_and_level_alone():
    both = gumbel_noise(3, [5, 9], 1, 6, (2, 4))
    assert (gumbel_noise(3, [9], 1, 6, (2, 4))[0] == both[1]).all()
    others = [(4, [5], 1), (3, [6], 1), (3, [5], 0)]
    for seed, images, level in others:
        assert (gumbel_noise(seed, images, level, 6, (2, 4)) != both[0]).any()
    big = gumbel_noise(0, range(50), 0, 64, (8, 8))
    # mean and variance of the standard Gumbel: Euler's constant and pi^2/6
    assert big.mean() == pytest.approx(0.5772, abs=0.01)
    assert big.var() == pytest.approx(1.6449, abs=0.02)


@torch.no_grad()
def test_conditions_matter_and_unknown_is_a_value_of_its_own():
    config = PixelCNNConfig(channels=8, layers=2, codebook_size=5, num_classes=3, num_attributes=2)
    model = PixelCNN(config).eval()
    codes = torch.randint(5, (2, 4, 4))
    labels, attributes = torch.tensor([0, 2]), torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    nats = model(codes, None, labels, attributes)
    for changed in (
        model(codes, None, torch.tensor([1, 2]), attributes),
        model(codes, None, labels, -attributes),
        model(codes, None, None, None),
    ):
        assert changed != nats
    unknown = torch.full((2,), -1)
    assert model(codes, None, None, None) == model(codes, None, unknown, torch.zeros(2, 2))


def test_a_finer_prior_needs_the_coarser_codes():
    model = PixelCNN(PixelCNNConfig(channels=8, layers=1, coarser_codebook_sizes=(5,)))
    with pytest.raises(ValueError, match="coarser"):
        model(torch.zeros(1, 4, 4, dtype=torch.int64))
