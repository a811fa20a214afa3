"""Every quantizer against the contract, its closed form, and each fault that its ancestors had."""

import copy
import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.models.quantizers import (
    CosineQuantizer,
    EMAQuantizer,
    FSQQuantizer,
    LearnedQuantizer,
    PlacedCodes,
    QuantizerName,
    SimVQQuantizer,
    Statistics,
    fsq_levels,
    make_quantizer,
    usage,
)
from pipeline.models.quantizers.contract import FRESH_MARGIN, rotation, straight_through

NAMES = get_args(QuantizerName)
PLACED = ("ema", "cosine", "learned")
NEAREST = (*PLACED, "simvq")
every_quantizer = pytest.mark.parametrize("name", NAMES)


def make(name, size=16, dim=4, decay=0.9, revival=0.0, gradient="straight_through", dtype=None):
    return make_quantizer(name, size, dim, decay, revival, gradient).to(dtype or torch.float32)


def state_of(quantizer):
    return {name: tensor.detach().clone() for name, tensor in quantizer.state_dict().items()}


def assert_same_state(quantizer, state):
    assert quantizer.state_dict().keys() == state.keys()
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def rows_of(images):
    """(B, D, H, W) -> (B·H·W, D)."""
    return images.detach().movedim(1, -1).flatten(0, 2)


def nothing(quantizer, dim=4):
    """The statistics of a batch in which no code was used."""
    size = quantizer.num_codes
    dtype = quantizer.counts.dtype
    zeros = torch.zeros(size, dim, dtype=dtype)
    return Statistics(torch.zeros(size, dtype=dtype), zeros, zeros.clone())


# The contract.


@every_quantizer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 4, 1, 1), (3, 4, 1, 7), (1, 4, 9, 2)])
def test_shapes_dtypes_and_the_range_of_codes(name, training, shape):
    quantizer = make(name).train(training)
    output = quantizer(3 * torch.randn(shape))
    assert output.quantized.shape == shape
    assert output.codes.shape == (shape[0], *shape[2:]) and output.codes.dtype == torch.int64
    assert output.codes.min() >= 0 and output.codes.max() < quantizer.num_codes
    assert output.vectors.shape[:3] == output.codes.shape
    for scalar in (output.commitment, output.codebook_loss, output.error):
        assert scalar.shape == () and scalar >= 0
    for value in (output.quantized, *output[2:]):
        assert value.dtype == torch.float32
    assert not output.vectors.requires_grad and not output.error.requires_grad


@every_quantizer
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_the_lookup_of_the_codes_is_what_was_quantized(name, gradient):
    quantizer = make(name, gradient=gradient).eval()
    latents = torch.randn(2, 4, 5, 3)
    output = quantizer(latents)
    assert torch.equal(quantizer.lookup(output.codes), output.quantized)
    trained = quantizer.train()(latents)  # the same up to the rounding of z + (e - z)
    assert torch.equal(trained.codes, output.codes)
    torch.testing.assert_close(trained.quantized, output.quantized, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NEAREST)
def test_a_code_is_its_own_nearest_code(name):
    quantizer = make(name).eval()
    codes = torch.arange(16).view(2, 4, 2)
    assert torch.equal(quantizer(quantizer.lookup(codes)).codes, codes)


@pytest.mark.parametrize("name", NEAREST)
def test_errors_and_losses_are_means_over_vectors_and_dimensions(name):
    quantizer = make(name, dtype=torch.float64)
    output = quantizer(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    expected = (rows_of(quantizer.lookup(output.codes)) - output.vectors.flatten(0, 2)).square()
    torch.testing.assert_close(output.error, expected.mean())
    torch.testing.assert_close(output.commitment, expected.mean())
    moved_by_gradients = name in ("learned", "simvq")
    torch.testing.assert_close(
        output.codebook_loss.detach(), expected.mean() * moved_by_gradients, rtol=1e-12, atol=0
    )


@every_quantizer
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_at_least_fp32_under_bf16_autocast(name, gradient):
    """In bf16 neighbouring latents round together; codes have to be those of fp32, and a decoder
    has to get the same vectors from `lookup` as in training."""
    quantizer = make(name, gradient=gradient)
    latents = torch.randn(2, 4, 3, 3).bfloat16()
    for training in (True, False):
        quantizer.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            output = quantizer(latents)
        for value in (output.quantized, *output[2:]):
            assert value.dtype == torch.float32
        assert torch.equal(output.codes, quantizer(latents.float()).codes)
    with torch.autocast("cpu", torch.bfloat16):
        looked_up = quantizer.lookup(output.codes)
    assert looked_up.dtype == torch.float32
    assert torch.equal(looked_up, output.quantized)


@every_quantizer
def test_float64_stays_float64(name):
    quantizer = make(name, dtype=torch.float64)
    output = quantizer(torch.randn(1, 4, 2, 2, dtype=torch.float64))
    assert all(value.dtype == torch.float64 for value in (output.quantized, *output[2:]))
    assert quantizer.lookup(output.codes).dtype == torch.float64


@every_quantizer
def test_the_forward_pass_changes_nothing(name):
    quantizer = make(name)
    before = state_of(quantizer)
    for training in (True, False):
        quantizer.train(training)
        for _ in range(2):
            output = quantizer(torch.randn(2, 4, 3, 3, requires_grad=True))
            quantizer.lookup(output.codes)
            if training:
                (output.quantized.sum() + output.commitment + output.codebook_loss).backward()
    assert_same_state(quantizer, before)


@every_quantizer
def test_the_memory_layout_does_not_matter(name):
    quantizer = make(name).eval()
    latents = torch.randn(2, 4, 6, 10)
    other = latents.contiguous(memory_format=torch.channels_last)
    for some, same in ((latents, other), (latents[..., ::2], other[..., ::2].clone())):
        assert torch.equal(quantizer(some).codes, quantizer(same).codes)
        torch.testing.assert_close(quantizer(some).quantized, quantizer(same).quantized)


@every_quantizer
def test_codes_stay_in_range_where_latents_are_not_finite(name):
    """Such a step is skipped, but a code out of range would be an illegal access on a GPU."""
    quantizer = make(name).eval()
    latents = torch.randn(1, 4, 2, 2)
    latents[0, 0] = torch.tensor([[torch.nan, torch.inf], [-torch.inf, 1e38]])
    codes = quantizer(latents).codes
    assert codes.min() >= 0 and codes.max() < 16


@every_quantizer
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_compiled_without_a_graph_break(name, gradient):
    if name == "fsq" and gradient == "rotation":
        pytest.skip("fsq has no nearest code to rotate to")
    plain = make(name, size=32, dim=8, gradient=gradient).train()
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    latents, found = torch.randn(2, 8, 4, 4), []
    for model in (compiled, plain):
        x = latents.clone().requires_grad_()
        output = model(x)
        weight = torch.linspace(-1, 1, x.numel()).view_as(x)
        total = (output.quantized * weight).sum() + output.commitment + output.codebook_loss
        gradients = torch.autograd.grad(total, [x, *model.parameters()])
        found.append((output.codes, gradients))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)


@every_quantizer
def test_the_state_dict_is_everything(name):
    quantizer, other = make(name, decay=0.5), make(name, decay=0.5)
    expected = {
        "ema": {"codebook", "counts", "sums"},
        "cosine": {"codebook", "counts", "sums"},
        "learned": {"anchors", "moves", "counts"},
        "simvq": {"basis", "linear.weight"},
        "fsq": {f"{name}_levels.{part}" for name in ("to", "from") for part in ("weight", "bias")},
    }
    assert set(quantizer.state_dict()) == expected[name]
    if isinstance(quantizer, PlacedCodes):
        some = Statistics(torch.rand(16), torch.randn(16, 4), torch.randn(16, 4))
        quantizer.update(some, 128)
    other.load_state_dict(quantizer.state_dict())
    latents = torch.randn(2, 4, 3, 3)
    for one, two in zip(quantizer(latents), other(latents), strict=True):
        assert torch.equal(one, two)
    if isinstance(quantizer, PlacedCodes):
        for one in (quantizer, other):
            one.update(some, 128)
        assert_same_state(other, state_of(quantizer))


@every_quantizer
def test_a_codebook_of_one_code(name):
    if name == "fsq":
        with pytest.raises(ValueError, match="codebook_size 1 "):
            make(name, size=1)
        return
    quantizer = make(name, size=1)
    assert quantizer(torch.randn(2, 4, 3, 3)).codes.eq(0).all()


# Gradients.


@pytest.mark.parametrize("name", ["ema", "learned", "simvq"])
def test_straight_through_gradient_is_the_identity(name):
    quantizer = make(name).train()
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized = quantizer(latents).quantized
    weight = torch.randn_like(quantized)
    (quantized * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight, rtol=0, atol=0)
    # the reconstruction does not move the codes
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())


def test_straight_through_alone_is_the_code_with_the_gradient_of_the_latents():
    latents = torch.randn(2, 4, 3, requires_grad=True)
    quantized = torch.randn(2, 4, 3)
    value = straight_through(latents, quantized)
    torch.testing.assert_close(value, quantized)
    value.backward(quantized)
    assert torch.equal(latents.grad, quantized)


def rotation_matrix(old, new):
    """The rotation in the plane of two vectors that takes the direction of the first to that of the
    second, by Rodrigues' formula: I + A + A²/(1 + cos), with A = ê ẑ' - ẑ ê'."""
    old, new = old / old.norm(), new / new.norm()
    turn = torch.outer(new, old) - torch.outer(old, new)
    return torch.eye(len(old), dtype=old.dtype) + turn + turn @ turn / (1 + old @ new)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_the_rotation_trick_has_a_rotation_as_its_jacobian(dim):
    for _ in range(10):
        z, e = torch.randn(2, dim, dtype=torch.float64)
        value = rotation(z[None], e[None])[0]
        torch.testing.assert_close(value, e, rtol=1e-12, atol=1e-12)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, e=e: rotation(x[None], e[None])[0], z
        )
        matrix = rotation_matrix(z, e)
        torch.testing.assert_close(jacobian, e.norm() / z.norm() * matrix, rtol=1e-9, atol=1e-9)
        found = jacobian * z.norm() / e.norm()
        identity = torch.eye(dim, dtype=torch.float64)
        torch.testing.assert_close(found @ found.T, identity, rtol=1e-9, atol=1e-9)
        assert torch.linalg.det(found).item() == pytest.approx(1)
        torch.testing.assert_close(found @ (z / z.norm()), e / e.norm(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NEAREST)
def test_a_quantizer_turns_the_gradient_of_every_vector(name):
    quantizer = make(name, gradient="rotation", dtype=torch.float64).train()
    latents = torch.randn(2, 4, 3, 1, dtype=torch.float64)
    vectors = rows_of(quantizer(latents).vectors.movedim(-1, 1))
    if name == "cosine":  # so that scaling to length 1 does not stand between
        latents = vectors.view(2, 3, 1, 4).movedim(-1, 1)
    latents = latents.clone().requires_grad_()
    output = quantizer(latents)
    weight = torch.randn_like(output.quantized)
    (output.quantized * weight).sum().backward()
    codes = rows_of(quantizer.lookup(output.codes))
    for found, z, e, g in zip(rows_of(latents.grad), vectors, codes, rows_of(weight), strict=True):
        expected = e.norm() / z.norm() * rotation_matrix(z, e).T @ g
        if name == "cosine":
            expected = expected - z * (z @ expected)  # the sphere has no gradient along z
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


OPPOSITE = {"opposite": -1.0, "opposite and shorter": -0.3, "opposite and longer": -7.7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [*OPPOSITE, "zero", "tiny", "zero code", "both zero", "equal"])
def test_where_there_is_no_rotation_value_and_gradient_are_sound(case, dtype):
    """No angle, or two directions that cancel but for their rounding. The value has to be the code
    all the same, for the decoder knows nothing else, and one vector must not spoil the step."""
    e = 10 * torch.randn(50, 6, dtype=dtype)
    z = torch.randn_like(e)
    z = {
        "zero": 0 * z, "both zero": 0 * z, "tiny": 1e-30 * z, "zero code": z, "equal": e,
    }.get(case, OPPOSITE.get(case, 0) * e)  # fmt: skip
    e = 0 * e if case in ("zero code", "both zero") else e
    z = z.clone().requires_grad_()
    value = rotation(z, e)
    torch.testing.assert_close(value.detach(), e, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["ema", "cosine", "learned", "simvq"])
def test_the_beta_term_pulls_the_latents_and_nothing_else(name):
    """The widely copied fault puts beta on the codebook's term."""
    quantizer = make(name, dtype=torch.float64).train()
    latents = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    if name == "cosine":
        latents = F.normalize(latents, dim=1)
    latents.requires_grad_()
    output = quantizer(latents)
    output.commitment.backward()
    difference = latents.detach() - quantizer.lookup(output.codes).detach()
    expected = 2 * difference / latents.numel()
    if name == "cosine":
        expected = expected - latents.detach() * (latents.detach() * expected).sum(1, keepdim=True)
    torch.testing.assert_close(latents.grad, expected)
    assert all(p.grad is None for p in quantizer.parameters())
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())
    if name in ("ema", "cosine"):
        assert list(quantizer.parameters()) == [] and output.codebook_loss == 0


# EMA.


def test_ema_update_against_a_hand_computed_step():
    quantizer = EMAQuantizer(2, 1, decay=0.5, revival=0.0)
    quantizer.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    quantizer.sums.copy_(quantizer.codebook)
    # vectors 1, 2, 3 fall to code 0, none to code 1: N = .5*1 + .5*3 = 2, m = .5*0 + .5*6 = 3
    counts, sums = torch.tensor([3.0, 0.0]), torch.tensor([[6.0], [0.0]])
    quantizer.update(Statistics(counts, sums, torch.zeros(2, 1)), batch_size=128)
    assert torch.equal(quantizer.counts, torch.tensor([2.0, 0.5]))
    assert torch.equal(quantizer.sums, torch.tensor([[3.0], [5.0]]))
    assert torch.equal(quantizer.codebook, torch.tensor([[1.5], [10.0]]))  # no smoothing


@pytest.mark.parametrize("name", PLACED)
def test_the_decay_is_scaled_to_the_batch(name):
    whole = make(name)
    halves = copy.deepcopy(whole)
    whole.update(nothing(whole), batch_size=128)
    halves.update(nothing(whole), batch_size=64)
    halves.update(nothing(whole), batch_size=64)
    assert whole.counts[0] == pytest.approx(0.9)
    torch.testing.assert_close(whole.counts, halves.counts)


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("batch_size", [128, 24])
def test_an_unused_code_stays_exactly_where_it_is(name, batch_size):
    """From zero counts an unused code would be thrown to m/eps, 1e5 times too far; and count and
    sum, which shrink alike, must not wear it down over the thousands of steps of a run."""
    quantizer = make(name, decay=0.99)
    codes = torch.arange(16).view(1, 4, 4)
    before = quantizer.lookup(codes).detach().clone()
    one_used = nothing(quantizer)
    one_used.counts[3], one_used.sums[3] = 32.0, 32 * quantizer.lookup(codes)[0, :, 0, 3].detach()
    for _ in range(3000):
        quantizer.update(one_used, batch_size)
    unused = codes.flatten() != 3
    after = quantizer.lookup(codes)
    assert torch.equal(rows_of(after)[unused], rows_of(before)[unused])
    torch.testing.assert_close(after[0, :, 0, 3], before[0, :, 0, 3])


def test_a_code_long_unused_follows_its_first_vectors_at_once():
    quantizer = make("ema", decay=0.9)
    for _ in range(1000):  # until its count is all but zero, a denormal number of fp32
        quantizer.update(nothing(quantizer), batch_size=128)
    assert quantizer.counts.max() < 1e-38
    used = nothing(quantizer)
    used.counts[5], used.sums[5] = 4.0, torch.tensor([4.0, 8.0, -4.0, 0.0])
    quantizer.update(used, batch_size=128)
    torch.testing.assert_close(quantizer.codebook[5], torch.tensor([1.0, 2.0, -1.0, 0.0]))
    assert quantizer.codebook.isfinite().all()


def test_nothing_but_the_decay_is_in_the_counts():
    """Smoothing that is written back into the counts keeps dead codes alive."""
    quantizer = make("ema", size=4, dim=2, decay=0.99)
    used = Statistics(torch.tensor([4.0, 0, 0, 0]), torch.zeros(4, 2), torch.zeros(4, 2))
    for _ in range(200):
        quantizer.update(used, batch_size=128)
    torch.testing.assert_close(quantizer.counts[1:], torch.full((3,), 0.99**200))


# Revival, for all whose codes are placed.


@pytest.mark.parametrize("name", PLACED)
def test_a_dead_code_starts_anew_at_its_candidate(name):
    quantizer = make(name, decay=0.5, revival=0.5)
    if isinstance(quantizer, LearnedQuantizer):
        torch.nn.init.normal_(quantizer.moves, std=0.1)
    counts = torch.full((16,), 10.0)
    counts[[2, 7]] = 0.0  # .5*1 + .5*0 is below half of the mean 8.75, .5*1 + .5*10 is not
    candidates = F.normalize(torch.randn(16, 4), dim=1)
    sums = counts[:, None] * quantizer.vectors_of_codes().detach()
    before = copy.deepcopy(quantizer)
    assert quantizer.update(Statistics(counts, sums, candidates), 128, revive=False) == 0
    without = quantizer.vectors_of_codes().detach()
    quantizer = before
    moves = {key: parameter.clone() for key, parameter in quantizer.named_parameters()}
    revived = quantizer.update(Statistics(counts, sums, candidates), 128)
    assert revived == 2 and revived.dtype == torch.int64

    codes = quantizer.vectors_of_codes().detach()
    dead = counts == 0
    torch.testing.assert_close(codes[dead], candidates[dead], rtol=0, atol=1e-7)
    assert torch.equal(codes[~dead], without[~dead])
    for key, parameter in quantizer.named_parameters():
        assert torch.equal(parameter, moves[key])  # an optimizer may hold its own copy
    fresh = FRESH_MARGIN * 0.5 * counts.sum() / 16
    torch.testing.assert_close(quantizer.counts[dead], fresh.expand(2))
    torch.testing.assert_close(quantizer.counts[~dead], torch.full((14,), 5.5))
    if isinstance(quantizer, EMAQuantizer):
        torch.testing.assert_close(quantizer.sums[dead], fresh * candidates[dead])


@pytest.mark.parametrize("name", PLACED)
def test_a_fresh_code_is_not_dead_before_it_could_be_used(name):
    quantizer = make(name, decay=0.99, revival=0.1)
    all_to_one = nothing(quantizer)
    all_to_one.counts[0] = 160.0
    deaths = [int(quantizer.update(all_to_one, 128)) for _ in range(30)]
    first = next(step for step, count in enumerate(deaths) if count)
    # log(1.1)/(1 - γ) steps later the ones still unused are replaced, not before
    assert deaths[first : first + 10] == [15] + [0] * 9 and 15 in deaths[first + 10 : first + 12]


@pytest.mark.parametrize("name", PLACED)
def test_without_revival_no_code_ever_starts_anew(name):
    quantizer = make(name, decay=0.5, revival=0.0)
    for _ in range(2000):
        assert quantizer.update(nothing(quantizer), 128) == 0


# Cosine.


def test_the_nearest_code_has_the_largest_cosine():
    quantizer = CosineQuantizer(64, 6, decay=0.9, revival=0.0)
    quantizer.codebook.mul_(torch.rand(64, 1) * 10 + 0.1)  # lengths must not matter
    latents = torch.randn(4, 6, 5, 5) * torch.rand(4, 1, 5, 5) * 100
    output = quantizer.eval()(latents)
    codes, vectors = quantizer.codebook.double(), rows_of(latents).double()
    cosines = F.normalize(vectors, dim=1) @ F.normalize(codes, dim=1).T
    assert torch.equal(output.codes.flatten(), cosines.argmax(1))
    torch.testing.assert_close(output.quantized.norm(dim=1), torch.ones(4, 5, 5))
    torch.testing.assert_close(output.vectors.norm(dim=-1), torch.ones(4, 5, 5))
    assert torch.equal(quantizer(1000 * latents).codes, output.codes)


def test_a_cosine_code_is_the_direction_of_the_sum_of_its_latents():
    quantizer = CosineQuantizer(2, 2, decay=0.5, revival=0.0)
    quantizer.codebook.copy_(torch.eye(2))
    quantizer.sums.copy_(torch.eye(2))
    # code 0 gets (.6, .8) and (.8, -.6): m = .5*(1, 0) + .5*(1.4, .2) = (1.2, .1)
    sums = torch.tensor([[1.4, 0.2], [0.0, 0.0]])
    quantizer.update(Statistics(torch.tensor([2.0, 0.0]), sums, sums), 128)
    expected = torch.tensor([[1.2, 0.1], [0.0, 1.0]], dtype=torch.float64)
    expected = F.normalize(expected, dim=1).float()
    torch.testing.assert_close(quantizer.vectors_of_codes(), expected)
    assert torch.equal(quantizer.lookup(torch.tensor([[[1]]])), expected[1].view(1, 2, 1, 1))


def test_a_zero_latent_has_a_finite_cosine_step():
    quantizer = CosineQuantizer(8, 4, 0.9, 0.0).train()
    latents = torch.zeros(1, 4, 2, 2, requires_grad=True)
    output = quantizer(latents)
    (output.quantized.sum() + output.commitment).backward()
    assert all(value.isfinite().all() for value in (*output, latents.grad))


# Learned.


def test_the_two_term_loss_has_the_gradients_of_the_paper():
    quantizer = LearnedQuantizer(8, 4, decay=0.9, revival=0.0).double().train()
    torch.nn.init.normal_(quantizer.moves)
    latents = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    beta = 0.25
    output = quantizer(latents)
    (output.codebook_loss + beta * output.commitment).backward()
    vectors, codes = rows_of(latents), output.codes.flatten()
    difference = vectors - quantizer.vectors_of_codes().detach()[codes]
    torch.testing.assert_close(rows_of(latents.grad), 2 * beta * difference / latents.numel())
    expected = torch.zeros(8, 4, dtype=torch.float64)
    expected.index_add_(0, codes, -2 * difference / latents.numel())
    torch.testing.assert_close(quantizer.moves.grad, expected)
    assert len(codes.unique()) < 8 and not expected[codes.bincount(minlength=8) == 0].any()


def test_the_optimizer_goes_on_from_where_a_learned_code_was_placed():
    quantizer = LearnedQuantizer(4, 2, decay=0.5, revival=0.5)
    adam = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    latents = torch.randn(4, 2, 5, 5)
    for _ in range(3):
        adam.zero_grad()
        quantizer(latents).codebook_loss.backward()
        adam.step()
    everywhere = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        quantizer.place(everywhere, 5 + torch.randn(4, 2), torch.ones(4))
    placed = quantizer.vectors_of_codes().detach()
    assert placed.min() > 0
    adam.zero_grad()
    quantizer(latents).codebook_loss.backward()
    adam.step()
    # a step of Adam from there, not back to where the parameter stood
    moved = (quantizer.vectors_of_codes().detach() - placed).abs().max()
    assert 0 < moved < 0.5
    assert not quantizer.anchors.requires_grad


# SimVQ.


def test_the_gradient_of_simvq_reaches_the_linear_map_only():
    quantizer = SimVQQuantizer(8, 4).double().train()
    assert [name for name, _ in quantizer.named_parameters()] == ["linear.weight"]
    basis = quantizer.basis.clone()
    latents = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    output = quantizer(latents)
    output.codebook_loss.backward()
    assert latents.grad is None  # |sg[z] - e|^2
    codes = output.codes.flatten()
    difference = basis[codes] @ quantizer.linear.weight.detach().T - rows_of(latents)
    expected = 2 / latents.numel() * difference.T @ basis[codes]
    torch.testing.assert_close(quantizer.linear.weight.grad, expected)

    used, before = codes.unique(), quantizer.vectors_of_codes().detach()
    adam.step()
    moved = (quantizer.vectors_of_codes().detach() - before).abs().amax(1) > 0
    assert len(used) < 8 and moved.all()  # the unused ones too
    assert torch.equal(quantizer.basis, basis)


# FSQ.


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (3, (3,)), (8, (8,)), (128, (8, 4, 4)), (240, (8, 6, 5)), (512, (8, 8, 8)),
        (1000, (8, 5, 5, 5)), (2048, (8, 8, 8, 4)), (4375, (7, 5, 5, 5, 5)),
        (15360, (8, 8, 8, 6, 5)), (64000, (8, 8, 8, 5, 5, 5)), (65536, (8, 8, 8, 8, 4, 4)),
    ],
)  # fmt: skip
def test_fsq_levels(size, levels):
    assert fsq_levels(size) == levels and math.prod(levels) == size


@pytest.mark.parametrize("size", [1, 2, 10, 11, 13 * 64, 511, 65521])
def test_a_size_that_fsq_cannot_have_is_refused_in_plain_words(size):
    with pytest.raises(ValueError, match=f"codebook_size {size} is not a product of numbers from"):
        fsq_levels(size)


def test_every_other_size_has_levels():
    products = {1}
    for _ in range(8):
        products |= {p * factor for p in products for factor in range(3, 9) if p * factor < 3000}
    for size in products - {1}:
        levels = fsq_levels(size)
        assert math.prod(levels) == size and all(3 <= level <= 8 for level in levels)


def bare_fsq(size, dtype=torch.float64):
    """An FSQ whose linear maps are the identity."""
    dims = len(fsq_levels(size))
    quantizer = FSQQuantizer(size, dims).to(dtype).eval()
    with torch.no_grad():
        for linear in (quantizer.to_levels, quantizer.from_levels):
            linear.weight.copy_(torch.eye(dims))
            linear.bias.zero_()
    return quantizer


def fsq_by_hand(values, levels):
    """Bounded, rounded and the code of `values` (N, dimensions), each dimension by itself."""
    bounded, rounded = np.empty_like(values), np.empty_like(values)
    codes = np.zeros(len(values), dtype=np.int64)
    for d, count in enumerate(levels):
        half = (count - 1) * 1.001 / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        bounded[:, d] = half * np.tanh(values[:, d] + np.arctanh(offset / half)) - offset
        rounded[:, d] = np.rint(bounded[:, d])
        codes += (rounded[:, d].astype(np.int64) + count // 2) * math.prod(levels[:d])
    return bounded, rounded, codes


@pytest.mark.parametrize("size", [3, 240, 512, 1000, 4375, 15360])
def test_fsq_against_the_paper_in_float64(size):
    quantizer, levels = bare_fsq(size), fsq_levels(size)
    values = 3 * np.random.default_rng(0).standard_normal((2 * 7 * 5, len(levels)))
    latents = torch.from_numpy(values).view(2, 7, 5, -1).movedim(-1, 1)
    output = quantizer(latents)
    bounded, rounded, codes = fsq_by_hand(values, levels)
    np.testing.assert_allclose(output.vectors.flatten(0, 2), bounded, rtol=1e-12, atol=1e-12)
    assert np.array_equal(output.codes.flatten(), codes)
    half_width = np.array([count // 2 for count in levels])
    np.testing.assert_allclose(rows_of(output.quantized), rounded / half_width, atol=1e-12)
    assert float(output.error) == pytest.approx(np.mean((bounded - rounded) ** 2))
    assert output.commitment == output.codebook_loss == 0


def test_fsq_against_vector_quantize_pytorch():
    module = pytest.importorskip("vector_quantize_pytorch")
    for size in (240, 1000, 4375):
        levels = fsq_levels(size)
        peer = module.FSQ(list(levels)).double().eval()
        latents = 2 * torch.randn(2, len(levels), 6, 5, dtype=torch.float64)
        output = bare_fsq(size)(latents)
        quantized, codes = peer(latents)
        assert torch.equal(output.codes, codes.long())
        # its own arithmetic is fp32 inside
        torch.testing.assert_close(output.quantized, quantized.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [3, 35, 240, 512, 1000])
def test_every_fsq_code_is_reachable_and_decodes_to_its_own_vector(size):
    quantizer, levels = bare_fsq(size), fsq_levels(size)
    values = []
    for count in levels:  # the inverse of the bound at every level
        half, offset = (count - 1) * 1.001 / 2, 0.5 if count % 2 == 0 else 0.0
        steps = np.arange(count) - count // 2
        values.append(np.arctanh((steps + offset) / half) - np.arctanh(offset / half))
    grid = np.stack(np.meshgrid(*values, indexing="ij"), -1).reshape(-1, len(levels))
    output = quantizer(torch.from_numpy(grid).T[None, ..., None])
    assert torch.equal(output.codes.flatten().sort().values, torch.arange(size))
    every = torch.arange(size).view(1, 1, size)
    assert len(rows_of(quantizer.lookup(every)).unique(dim=0)) == size
    assert quantizer.lookup(every).abs().max() <= 1
    wide = FSQQuantizer(size, 16)
    assert len(rows_of(wide.lookup(every)).unique(dim=0)) == size


def test_fsq_bounds_any_latent_and_zero_is_a_level():
    quantizer = bare_fsq(1000, torch.float32)
    output = quantizer(torch.tensor([1e30, -1e30, 0.0]).view(3, 1, 1, 1).expand(3, 4, 1, 1))
    assert output.codes.flatten().tolist() == [999, 0, 4 + 8 * (2 + 5 * (2 + 5 * 2))]
    torch.testing.assert_close(output.vectors[2].flatten(), torch.zeros(4), rtol=0, atol=1e-6)


def test_the_fsq_gradient_passes_the_rounding_but_not_the_bound():
    quantizer = bare_fsq(240).train()
    values = torch.randn(5, 3, dtype=torch.float64)
    latents = values.view(5, 3, 1, 1).clone().requires_grad_()
    weight = torch.randn(5, 3, 1, 1, dtype=torch.float64)
    (quantizer(latents).quantized * weight).sum().backward()
    levels = torch.tensor(fsq_levels(240)).double()
    half, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) / 2
    slope = half * (1 - (values + (offset / half).atanh()).tanh().square()) / (levels // 2)
    torch.testing.assert_close(rows_of(latents.grad), weight.flatten(1) * slope)
    assert quantizer.to_levels.weight.grad.any() and quantizer.from_levels.weight.grad.any()


# Usage.


def test_usage_of_known_distributions():
    assert usage(torch.tensor([5, 5, 5, 5])) == pytest.approx((4.0, 0.0, 4))
    assert usage(torch.tensor([9, 0, 0, 0])) == pytest.approx((1.0, 0.75, 1))
    perplexity, unused, used = usage(torch.tensor([3, 1]))
    assert perplexity == pytest.approx((4 / 3) ** 0.75 * 4**0.25) and (unused, used) == (0, 2)
    assert usage(torch.zeros(4)) == (1.0, 1.0, 0)
