"""VQ-VAE and VQ-VAE-2 with one, two and three levels."""

import pytest
import torch

from pipeline.models.quantizer import commit
from pipeline.models.vqvae import VQVAE, VQVAEConfig, VQVAEOutput, loss

SMALL = {"channels": 8, "residual_channels": 4, "residual_layers": 1, "code_dim": 4}
LEVELS = {1: (4,), 2: (2, 4), 3: (2, 2, 4)}


def make(levels, **options):
    return VQVAE(VQVAEConfig(ratios=LEVELS[levels], codebook_size=(16,), **SMALL, **options))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_shapes_and_grids(levels, size):
    model = make(levels)
    output = model(torch.rand(3, 3, *size))
    assert output.reconstructions.shape == (3, 3, *size)
    assert [tuple(c.shape[1:]) for c in output.codes] == model.config.grids(*size)
    assert output.codes[-1].shape[1] == size[0] // 4
    assert len(output.commitments) == levels


@pytest.mark.parametrize("levels", LEVELS)
def test_decode_of_encode_is_forward(levels):
    model = make(levels).train()
    images = torch.rand(4, 3, 32, 32)
    model(images)
    commit(model.quantizers, 4)
    model.eval()
    torch.testing.assert_close(
        model.decode_codes(model.encode_codes(images)), model(images).reconstructions
    )


@pytest.mark.parametrize("levels", LEVELS)
def test_every_parameter_gets_a_gradient(levels):
    model = make(levels).train()
    images = torch.rand(4, 3, 32, 32)
    loss(model(images), images, 0.1, 0.25)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_finer_latents_are_conditioned_on_coarser_codes():
    model = make(2).eval()
    images = torch.rand(1, 3, 32, 32)
    before = model.encode_codes(images)
    with torch.no_grad():
        model.quantizers[0].codebook.mul_(-50)
    after = model.encode_codes(images)
    assert not torch.equal(before[1], after[1])


def test_all_levels_feed_the_decoder():
    model = make(3).eval()
    codes = [torch.zeros(1, s, s, dtype=torch.int64) for s in (2, 4, 8)]
    base = model.decode_codes(codes)
    for level in range(3):
        changed = [c + (i == level) for i, c in enumerate(codes)]
        assert not torch.allclose(base, model.decode_codes(changed))


def test_loss_in_closed_form():
    images = torch.zeros(2, 3, 4, 4)
    output = VQVAEOutput(torch.full_like(images, 0.5), [], [torch.tensor(2.0), torch.tensor(3.0)])
    total, mse = loss(output, images, data_variance=0.125, beta=0.25)
    assert mse == 0.25
    assert total == 0.25 / 0.125 + 0.25 * 5


def test_a_float64_model_is_float64_throughout():
    model = make(2).double().train()
    output = model(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    assert output.reconstructions.dtype == torch.float64
    assert all(q.codebook.dtype == torch.float64 for q in model.quantizers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "model.channels must be at least 1"),
        ({"ratios": ()}, "model.ratios needs"),
        ({"ratios": (3, 4)}, "power of two"),
        ({"codebook_size": (4, 4, 4)}, "one for each of 2 levels"),
        ({"codebook_size": (70000,)}, "1..65536"),
        ({"decay": 1.0}, "model.decay"),
        ({"revival": -0.1}, "model.revival"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**options)


def test_image_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="divisible"):
        VQVAEConfig().grids(60, 64)
