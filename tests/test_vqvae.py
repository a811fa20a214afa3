"""VQ-VAE and VQ-VAE-2 with one, two and three levels."""

import copy
from typing import get_args

import pytest
import torch

from pipeline.models.quantizers import Quantized, QuantizerName
from pipeline.models.vqvae import VQVAE, VQVAEConfig, VQVAEOutput, loss
from pipeline.train_vqvae import TrainVQVAE, levels_kept
from pipeline.training.codebooks import Codebooks

SMALL = {"channels": 8, "residual_channels": 4, "residual_layers": 1, "code_dim": 4}
LEVELS = {1: (4,), 2: (2, 4), 3: (2, 2, 4)}


def make(levels, **options):
    options = {"ratios": LEVELS[levels], "codebook_size": (16,)} | SMALL | options
    return VQVAE(VQVAEConfig(**options))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_shapes_and_grids(levels, size):
    model = make(levels)
    output = model(torch.rand(3, 3, *size))
    assert output.reconstructions.shape == (3, 3, *size)
    assert [tuple(c.shape[1:]) for c in output.codes] == model.config.grids(*size)
    assert output.codes[-1].shape[1] == size[0] // 4
    assert len(output.levels) == levels


@pytest.mark.parametrize("quantizer", get_args(QuantizerName))
def test_a_step_of_every_quantizer_and_back_through_the_codes(quantizer):
    """The loss falls on the batch that was seen, and the codes alone give the reconstruction."""
    model = make(2, quantizer=(quantizer,)).train()
    codebooks = Codebooks(model.quantizers, 8)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, errors = torch.rand(8, 3, 1, 1).expand(8, 3, 16, 16), []
    for step in range(25):
        output = model(images)
        codebooks.observe(output.levels, 0, 8 * step)
        total, mse = loss(output, images, 0.1, 0.25)
        adam.zero_grad()
        total.backward()
        adam.step()
        codebooks.commit()
        errors.append(mse.item())
    assert errors[-1] < 0.8 * errors[0]
    model.eval()
    with torch.no_grad():
        reconstructions = model(images).reconstructions
        assert torch.equal(model.decode_codes(model.encode_codes(images)), reconstructions)


@pytest.mark.parametrize("quantizer", get_args(QuantizerName))
@pytest.mark.parametrize("levels", LEVELS)
def test_decode_of_encode_is_forward(levels, quantizer):
    model = make(levels, quantizer=(quantizer,)).eval()
    images = torch.rand(4, 3, 32, 32)
    reconstructions, encoded = model(images).reconstructions, model.encode(images)
    vectors = model.decode([level.quantized for level in encoded])
    codes = model.decode_codes([level.codes for level in encoded])
    assert torch.equal(vectors, codes) and torch.equal(codes, reconstructions)
    for one, other in zip(model.encode_codes(images), encoded, strict=True):
        assert torch.equal(one, other.codes)


@pytest.mark.parametrize(
    ("levels", "quantizer"),
    [(1, "ema"), (3, "ema"), *((2, quantizer) for quantizer in get_args(QuantizerName))],
)
def test_every_parameter_gets_a_gradient(levels, quantizer):
    model = make(levels, quantizer=(quantizer,)).train()
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


# Level dropout.


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("kept", [1, 2])
def test_levels_that_are_not_kept_do_not_influence_the_reconstruction(levels, kept):
    model = make(levels).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for quantizer in list(other.quantizers)[kept:]:
            quantizer.codebook.normal_(std=5)
    count = torch.full((2,), kept)
    one, two = model(images, count), other(images, count)
    assert torch.equal(one.reconstructions, two.reconstructions)
    if kept < levels:
        assert not torch.equal(model(images).reconstructions, other(images).reconstructions)
        assert not torch.equal(model(images).reconstructions, one.reconstructions)


@pytest.mark.parametrize("levels", LEVELS)
def test_all_levels_kept_is_no_dropout(levels):
    model, images = make(levels).train(), torch.rand(2, 3, 32, 32)
    plain, kept = model(images), model(images, torch.full((2,), levels))
    assert torch.equal(plain.reconstructions, kept.reconstructions)


def test_every_image_has_its_own_number_of_levels():
    model, images = make(3).double().eval(), torch.rand(3, 3, 32, 32, dtype=torch.float64)
    mixed = model(images, torch.tensor([1, 3, 2])).reconstructions
    for image, kept in enumerate((1, 3, 2)):
        alone = model(images[image : image + 1], torch.tensor([kept])).reconstructions
        torch.testing.assert_close(mixed[image : image + 1], alone)


@pytest.mark.parametrize("levels", [2, 3])
def test_dropout_is_the_decoders_alone(levels):
    """The codes, which the codebooks follow, are those that `encode` will find."""
    model, images = make(levels).train(), torch.rand(4, 3, 32, 32)
    plain, dropped = model(images), model(images, torch.tensor([1, 1, 2, levels]))
    for one, other in zip(plain.levels, dropped.levels, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.vectors, other.vectors)


def test_the_levels_kept_do_not_depend_on_the_number_of_ranks():
    config = TrainVQVAE(
        data="", out="", batch_size=64, level_dropout=0.5, model=VQVAEConfig(ratios=LEVELS[3])
    )
    cpu = torch.device("cpu")
    whole = levels_kept(config, 640, slice(0, 64), cpu)
    parts = [levels_kept(config, 640, slice(16 * rank, 16 * rank + 16), cpu) for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)
    assert set(whole.tolist()) == {1, 2, 3} and 0.3 < (whole < 3).double().mean() < 0.7
    assert not torch.equal(levels_kept(config, 704, slice(0, 64), cpu), whole)


# The loss.


def test_loss_in_closed_form():
    images = torch.zeros(2, 3, 4, 4)
    nothing = torch.zeros(())
    levels = [
        Quantized(nothing, nothing, torch.tensor(2.0), torch.tensor(7.0), nothing, nothing),
        Quantized(nothing, nothing, torch.tensor(3.0), torch.tensor(0.0), nothing, nothing),
    ]
    output = VQVAEOutput(torch.full_like(images, 0.5), levels)
    total, mse = loss(output, images, data_variance=0.125, beta=0.25)
    assert mse == 0.25
    assert total == 0.25 / 0.125 + 0.25 * 5 + 7  # beta is not on the codebook's term


def test_a_float64_model_is_float64_throughout():
    model = make(3, quantizer=("ema", "fsq", "simvq")).double().train()
    output = model(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    assert output.reconstructions.dtype == torch.float64
    assert all(level.quantized.dtype == torch.float64 for level in output.levels)


# The config.


def test_one_value_serves_all_levels_or_each_has_its_own():
    config = VQVAEConfig(ratios=(2, 2, 4), codebook_size=(16,), quantizer=("cosine",))
    assert config.codebook_sizes == (16, 16, 16) and config.quantizers == ("cosine",) * 3
    own = {"codebook_size": (8, 64, 30), "quantizer": ("ema", "fsq", "learned")}
    config = VQVAEConfig(ratios=(2, 2, 4), **own)
    assert (config.codebook_sizes, config.quantizers) == tuple(own.values())
    model = make(3, **own)
    assert [quantizer.num_codes for quantizer in model.quantizers] == [8, 64, 30]
    names = [type(quantizer).__name__ for quantizer in model.quantizers]
    assert names == ["EMAQuantizer", "FSQQuantizer", "LearnedQuantizer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "model.channels must be at least 1"),
        ({"ratios": ()}, "model.ratios needs"),
        ({"ratios": (3, 4)}, "power of two"),
        ({"codebook_size": (4, 4, 4)}, "model.codebook_size needs one value, or .* of 2 levels"),
        ({"codebook_size": ()}, "model.codebook_size needs one value, or .* of 2 levels"),
        ({"codebook_size": (70000,)}, "1..65536"),
        ({"quantizer": ("ema", "ema", "fsq")}, "model.quantizer needs one value, or .* 2 levels"),
        ({"quantizer": ("fsq",), "codebook_size": (22,)}, "codebook_size 22 is not a product"),
        ({"quantizer": ("ema", "fsq"), "codebook_size": (512, 509)}, "509 is not a product"),
        ({"decay": 1.0}, "model.decay"),
        ({"revival": -0.1}, "model.revival"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**options)


def test_a_size_that_only_another_level_gives_to_fsq_is_fine():
    VQVAEConfig(quantizer=("ema", "fsq"), codebook_size=(509, 512))


def test_image_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="divisible"):
        VQVAEConfig().grids(60, 64)
