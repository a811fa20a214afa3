"""Priors over codes: causality by gradients at every position, exact probabilities, the layers
against other implementations of them, what they are conditioned on, and their config."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from scipy import special
from torch import nn
from torch.nn import functional as F

from pipeline import stage
from pipeline.models.priors import find_slope, make_prior
from pipeline.models.priors.causal import (
    CausalAttention,
    CausalConv,
    PreviousCode,
    above,
    comes_before,
    left,
    whole,
)
from pipeline.models.priors.fronts import dependency_slope, fronts
from pipeline.models.priors.pixelcnn import GatedLayer
from pipeline.models.priors.pixelsnail import AttentionLayer, ResidualLayer
from pipeline.models.priors.prior import CoarserCodes, Prior, PriorConfig
from pipeline.train_prior import TrainPrior
from pipeline.train_vqvae import TrainVQVAE

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*/train_prior_*level?.yaml"))
GRID = (6, 7)
SMALL = PriorConfig(
    channels=8, layers=3, kernel_size=3, attention_channels=8, heads=2, condition_layers=1,
    dropout=0.0, grid=GRID, codebook_size=5,
)  # fmt: skip
KINDS = {
    "pixelcnn": {"architecture": "pixelcnn"},
    "pixelcnn-raster": {"architecture": "pixelcnn", "order": "raster"},
    "pixelsnail": {"architecture": "pixelsnail", "attention_layers": 2, "output_layers": 1},
    "pixelsnail-raster": {"architecture": "pixelsnail", "attention_layers": 1, "order": "raster"},
    "transformer": {"architecture": "transformer"},
}


def small(kind: str, **changes) -> PriorConfig:
    return dataclasses.replace(SMALL, **{**KINDS[kind], **changes})


def random_prior(config: PriorConfig) -> Prior:
    """In float64, with random weights far from those it would start with."""
    model = make_prior(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def read_config(path: Path) -> PriorConfig:
    """The model of a prior's YAML on the codes of the VQ-VAE beside it, with its condition."""
    prior = stage.parse(TrainPrior, ["--config", str(path), "--codes", "x", "--out", "y"])
    beside = path.parent / "train_vqvae.yaml"
    vqvae = stage.parse(TrainVQVAE, ["--config", str(beside), "--data", "x", "--out", "y"])
    level, sizes = int(path.stem[-1]), vqvae.model.codebook_sizes
    return dataclasses.replace(
        prior.model,
        grid=vqvae.model.grids(vqvae.image_size, vqvae.image_size)[level],
        codebook_size=sizes[level],
        coarser_codebook_sizes=sizes[:level],
        num_attributes=40 if prior.condition == "attributes" else 0,
        num_classes=10 if prior.condition == "class" else 0,
    )


def narrow(config: PriorConfig) -> PriorConfig:
    """The same layers with little width on a small grid."""
    return dataclasses.replace(
        config, channels=8, residual_channels=8, attention_channels=8, heads=2, condition_layers=1,
        grid=GRID, codebook_size=5, coarser_codebook_sizes=(5,) * len(config.coarser_codebook_sizes)
    )  # fmt: skip


# Causality.


def dependencies(model: Prior) -> torch.Tensor:
    """(H·W, H·W) bool: whether the logits at a position (rows) depend on the code at another
    (columns), by gradients. Four random inputs, as at one of them all units of a narrow ReLU layer
    may be off; copy n is asked for position n alone, so that one backward pass finds all."""
    config = model.config
    places = torch.arange(math.prod(config.grid)).repeat(4)
    embedded = torch.randn(len(places), *config.grid, config.channels, dtype=torch.float64)
    coarser = [torch.randint(size, (len(places), 3, 4)) for size in config.coarser_codebook_sizes]
    condition = model.condition(len(places), coarser)
    logits = model.body(embedded.requires_grad_(), condition, whole)
    asked = logits.flatten(1, 2)[torch.arange(len(places)), places]
    projection = torch.randn(logits.shape[-1], dtype=torch.float64)  # nothing cancels by symmetry
    (gradient,) = torch.autograd.grad((asked @ projection).sum(), embedded)
    return (gradient != 0).any(-1).flatten(1).unflatten(0, (4, -1)).any(0)


def distances(grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows up and how many columns to the right of a position (rows) others (columns) are,
    each (H·W, H·W)."""
    place = torch.arange(math.prod(grid))
    i, j = place // grid[1], place % grid[1]
    return i[:, None] - i, j - j[:, None]


def allowed(grid: tuple[int, int], slope: int) -> torch.Tensor:
    """t' < t, for t = j + slope·i, and rows not below."""
    up, right = distances(grid)
    return (right < slope * up) & (up >= 0)


def should_see(config: PriorConfig) -> torch.Tensor:
    """What the architecture is for: with attention all that its order allows; with n convolutions
    that reach r what their arithmetic says."""
    reach, steps = config.kernel_size // 2, config.layers + 1
    if config.architecture == "transformer":
        return allowed(config.grid, config.grid[1])
    if config.attention_layers:
        slope = config.grid[1] if config.order == "raster" else min(reach + 1, config.grid[1])
        return allowed(config.grid, slope)
    up, right = distances(config.grid)
    farthest = torch.tensor(reach * steps)
    above_right = farthest
    if config.order == "wavefront" or config.architecture == "pixelsnail":
        above_right = reach * torch.minimum(up, torch.tensor(steps))  # each step right goes up, too
    seen_above = (up > 0) & (up <= farthest) & (right <= above_right)
    return (seen_above | (up == 0) & (right < 0)) & (right >= -farthest)


def smallest_slope(seen: torch.Tensor, grid: tuple[int, int]) -> int:
    return next(s for s in range(1, grid[1] + 1) if not (seen & ~allowed(grid, s)).any())


def holds_what_it_promises(model: Prior) -> None:
    found = dependencies(model)
    assert not (found & ~allowed(GRID, model.slope)).any()
    assert torch.equal(found, should_see(model.config))
    assert model.slope == smallest_slope(found, GRID)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_config_sees_what_it_should_and_nothing_else(path):
    config = read_config(path)
    holds_what_it_promises(make_prior(narrow(config)).double().eval())
    # the slope of the real sizes, with six rows of the arithmetic
    slope = find_slope(config)
    rows = (min(config.grid[0], 6), config.grid[1])
    assert slope == smallest_slope(should_see(dataclasses.replace(config, grid=rows)), rows)


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sees_what_it_should_and_nothing_else(kind, kernel_size, layers):
    attention = min(layers, KINDS[kind].get("attention_layers", 0))
    config = small(kind, kernel_size=kernel_size, layers=layers, attention_layers=attention)
    model = make_prior(config).double().eval()
    holds_what_it_promises(model)
    if kind in ("pixelcnn", "pixelsnail"):
        assert model.slope == {3: 2, 5: 3, 7: 4}[kernel_size]
    elif layers == 6 or kind != "pixelcnn-raster":  # a shallow classic one does not reach the end
        assert model.slope == GRID[1]


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (2, 2), (2, 3), (3, 2), (9, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_on_odd_grids_the_slope_is_the_smallest(kind, grid):
    """Where a single output shows the slope, and no ReLU may hide it."""
    for layers, kernel_size in itertools.product((2, 3, 5), (3, 5)):
        config = small(kind, grid=grid, layers=layers, kernel_size=kernel_size)
        assert make_prior(config).slope == smallest_slope(should_see(config), grid)


@pytest.mark.parametrize(
    "offsets",
    [((-1, 0),), ((-1, 3), (-2, 6)), ((-2, 5), (0, -2)), ((-3, 4), (-1, -2)), ((-1, -4),)],
)
def test_the_scan_finds_the_slope_of_given_offsets(offsets):
    conv = CausalConv(2, 3, (*offsets, (0, -1))).double()
    inputs = torch.randn(2, 6, 9, 2, dtype=torch.float64)
    expected = next(s for s in range(1, 9) if all(j + s * i < 0 for i, j in offsets))
    assert dependency_slope(conv, inputs) == expected


def sees_itself(model):
    model.first_left = CausalConv(8, 8, left(3, strict=False))


def sees_its_row_to_the_right(model):
    model.first_up = CausalConv(8, 8, above(3, own_row=True))


def sees_the_row_below(model):
    model.layers[1].up = CausalConv(8, 16, ((1, 0),))


def attends_to_itself(model):
    for layer in model.layers:
        if isinstance(layer, AttentionLayer):
            layer.attention.mask = comes_before(GRID, model.slope, strict=False)


def attends_to_rows_below(model):
    up, right = distances(GRID)
    earlier = F.pad(right < model.slope * up, (0, 1), value=True)
    for layer in model.layers:
        if isinstance(layer, AttentionLayer):
            layer.attention.mask = earlier


def knows_its_own_code(model):
    model.previous = nn.Identity()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("pixelcnn", sees_itself),
        ("pixelcnn", sees_its_row_to_the_right),
        ("pixelcnn", sees_the_row_below),
        ("pixelsnail", attends_to_itself),
        ("pixelsnail-raster", attends_to_itself),
        ("pixelsnail", attends_to_rows_below),
        ("transformer", knows_its_own_code),
    ],
)
def test_a_network_that_is_not_causal_is_caught(kind, fault):
    model = make_prior(small(kind))
    fault(model)
    model.double()
    raster = allowed(GRID, GRID[1])
    assert (dependencies(model) & ~raster).any()
    inputs = torch.randn(4, *GRID, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the output at \(\d, \d\) depends on \(\d, \d\)"):
        dependency_slope(lambda x: model.body(x, model.condition(4), whole), inputs)


def test_a_network_whose_gradients_say_nothing_is_refused():
    """One that is cut off would seem to need no order at all."""
    inputs = torch.randn(4, *GRID, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not depend on"):
        dependency_slope(lambda x: 0 * x, inputs)


def the_classic_vertical_stack(model):
    for layer in model.layers:
        layer.up = CausalConv(8, 16, above(3, own_row=True))


def attends_to_later_fronts(model):
    for layer in model.layers:
        if isinstance(layer, AttentionLayer):
            layer.attention.mask = comes_before(GRID, model.slope + 1, strict=True)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("pixelcnn", the_classic_vertical_stack), ("pixelsnail", attends_to_later_fronts)],
)
def test_a_network_that_is_causal_in_raster_order_only_is_caught(kind, fault):
    model = make_prior(small(kind))
    fault(model)
    found = dependencies(model.double())
    assert (found & ~allowed(GRID, model.slope)).any()
    assert not (found & ~allowed(GRID, GRID[1])).any()
    inputs = torch.randn(4, *GRID, 8, dtype=torch.float64)
    slope = dependency_slope(lambda x: model.body(x, model.condition(4), whole), inputs)
    assert slope == smallest_slope(found, GRID) > model.slope


@pytest.mark.parametrize("slope", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (5, 7)])
def test_fronts_hold_every_position_once_in_the_order_of_t(grid, slope):
    found = [front.tolist() for front in fronts(grid, slope)]
    t = [{place % grid[1] + slope * (place // grid[1]) for place in front} for front in found]
    assert all(len(each) == 1 for each in t)
    order = [each.pop() for each in t]
    assert order == sorted(set(order))
    assert sorted(itertools.chain(*found)) == list(range(math.prod(grid)))


def test_the_number_of_steps_is_that_of_the_formula():
    assert sum(1 for _ in fronts((64, 64), 3)) == 63 + 3 * 63 + 1 == 253
    assert [front.tolist() for front in fronts((2, 3), 3)] == [[place] for place in range(6)]


# Probabilities.


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_probabilities_of_all_grids_sum_to_one(kind):
    model = random_prior(small(kind, grid=(2, 2), codebook_size=3, num_classes=2))
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    logits = model.logits(grids, model.condition(81, labels=torch.ones(81, dtype=torch.int64)))
    log_p = -F.cross_entropy(logits.movedim(-1, 1), grids, reduction="none").sum((1, 2))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_p.exp().max() > 2 / 81  # far from uniform


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_the_mean_negative_log_likelihood_in_nats(kind):
    model = random_prior(small(kind))
    codes = torch.randint(5, (3, *GRID))
    logits = model.logits(codes, model.condition(3)).numpy()
    assert logits.shape == (3, *GRID, 5)
    log_p = special.log_softmax(logits, axis=-1)
    chosen = [
        log_p[(*place, codes[place])] for place in itertools.product(*map(range, codes.shape))
    ]
    assert model(codes).item() == pytest.approx(-sum(chosen) / len(chosen), rel=1e-6)


# Layers.


def square_kernel(weight: torch.Tensor, offsets, size: int) -> torch.Tensor:
    """(C_out, C_in, size, size) of an ordinary convolution: zeros where nothing is looked at."""
    kernel = weight.new_zeros(*weight.shape[:2], size, size)
    for number, (down, right) in enumerate(offsets):
        kernel[:, :, size // 2 + down, size // 2 + right] = weight[:, :, number]
    return kernel


def ordinary_conv(conv: CausalConv, x: torch.Tensor, size: int) -> torch.Tensor:
    kernel = square_kernel(conv.weight, conv.offsets, size)
    out = F.conv2d(x.movedim(-1, 1), kernel, conv.bias, padding=size // 2)
    return out.movedim(1, -1)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (2, 3), (5, 7)])
@pytest.mark.parametrize("size", [3, 5, 7])
@torch.no_grad()
def test_a_causal_convolution_is_an_ordinary_one_with_zeros_in_its_kernel(size, grid):
    reach = size // 2
    left_strictly = [(0, -column) for column in range(reach, 0, -1)]
    left_and_own = [*left_strictly, (0, 0)]
    wide = range(-reach, reach + 1)
    strictly_above = list(itertools.product(range(-reach, 0), wide))
    assert sorted(above(size)) == sorted(strictly_above)
    assert sorted(above(size, own_row=True)) == sorted([*strictly_above, *((0, c) for c in wide)])
    assert list(left(size, strict=True)) == left_strictly
    assert list(left(size, strict=False)) == left_and_own
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    for offsets in (
        above(size), above(size, own_row=True), left(size, strict=True), left(size, strict=False),
        above(size) + left(size, strict=True), above(size) + left(size, strict=False), ((0, 0),),
    ):  # fmt: skip
        conv = CausalConv(3, 4, offsets).double()
        torch.testing.assert_close(conv(x), ordinary_conv(conv, x, size), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_previous_code_is_that_of_raster_order():
    x = torch.randn(2, 4, 5, 3)
    flat = [torch.zeros(2, 3), *x.view(2, 20, 3).unbind(1)][:20]
    assert torch.equal(PreviousCode(3)(x), torch.stack(flat, 1).view(2, 4, 5, 3))


@pytest.mark.parametrize("slope", [1, 2, 5])
@pytest.mark.parametrize("own_codes", [False, True])
@torch.no_grad()
def test_attention_is_that_of_torch_with_a_zero_key_and_value(own_codes, slope):
    """nn.MultiheadAttention with add_zero_attn, which is the null position."""
    grid, width = (4, 5), 6
    layer = CausalAttention(width, width, 2, grid, slope, own_codes).double()
    features, codes = torch.randn(2, 3, *grid, width, dtype=torch.float64).unbind(0)
    inputs = torch.cat([features, codes], -1) if own_codes else features
    size = inputs.shape[-1]
    peer = nn.MultiheadAttention(
        width, 2, bias=True, kdim=size, vdim=size, add_zero_attn=True, batch_first=True
    ).double()
    key, value = layer.key_value.weight.chunk(2)
    if own_codes:
        peer.q_proj_weight.copy_(layer.query.weight)
        peer.k_proj_weight.copy_(key)
        peer.v_proj_weight.copy_(value)
    else:
        peer.in_proj_weight.copy_(torch.cat([layer.query.weight, key, value]))
    peer.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key_value.bias]))
    peer.out_proj.weight.copy_(torch.eye(width))
    peer.out_proj.bias.zero_()
    hidden = torch.ones(20, 20, dtype=torch.bool)
    for a, b in itertools.product(range(20), repeat=2):
        (i, j), (i2, j2) = divmod(a, 5), divmod(b, 5)
        t, t2 = j + slope * i, j2 + slope * i2
        hidden[a, b] = not ((t2 < t or (t2 == t and not own_codes)) and i2 <= i)
    if not own_codes:
        assert not hidden.diagonal().any()
    memory = inputs.flatten(1, 2)
    expected, _ = peer(features.flatten(1, 2), memory, memory, attn_mask=hidden)
    found = layer(features, codes if own_codes else None).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if own_codes:  # the first position sees the null position alone
        assert not found[:, 0].any()


@torch.no_grad()
def test_a_transformer_block_is_that_of_torch():
    """nn.TransformerEncoderLayer with the normalisation first, and a null position to attend to."""
    block = random_prior(small("transformer")).layers[0]
    peer = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
    ).double()
    peer.self_attn = nn.MultiheadAttention(8, 2, add_zero_attn=True, batch_first=True).double()
    attention = block.attention
    for theirs, ours in (
        (peer.self_attn.in_proj_weight, [attention.query.weight, attention.key_value.weight]),
        (peer.self_attn.in_proj_bias, [attention.query.bias, attention.key_value.bias]),
    ):
        theirs.copy_(torch.cat(ours))
    for theirs, ours in (
        (peer.self_attn.out_proj, block.out), (peer.linear1, block.mlp_in),
        (peer.linear2, block.mlp_out), (peer.norm1, block.norm_attention),
        (peer.norm2, block.norm_mlp),
    ):  # fmt: skip
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *GRID, 8, dtype=torch.float64)
    later = torch.ones(42, 42, dtype=torch.bool).triu(1)
    expected = peer(x.flatten(1, 2), src_mask=later).view_as(x)
    torch.testing.assert_close(block(x, whole), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_gated_layer_is_that_of_the_equations():
    """Van den Oord et al. 2016, figure 2 with eq. 2 and 4, both stacks residual."""
    layer = GatedLayer(3, 5, dropout=0.0).double()
    v, h, y = torch.randn(3, 2, 5, 7, 3, dtype=torch.float64).unbind(0)
    weight_v, weight_h = layer.condition.weight.split(6)
    bias_v, bias_h = layer.condition.bias.split(6)

    def gated(x):  # the first half of the channels is f, the second g
        return torch.tanh(x[..., :3]) * torch.special.expit(x[..., 3:])

    def linear(x, module):
        return x @ module.weight.T + module.bias

    from_above = ordinary_conv(layer.up, v, 5) + y @ weight_v.T + bias_v
    expected_v = v + linear(gated(from_above), layer.out_v)
    from_left = ordinary_conv(layer.left, h, 5) + linear(expected_v, layer.across)
    expected_h = h + linear(gated(from_left + y @ weight_h.T + bias_h), layer.out_h)
    found_v, found_h = layer(v, h, y, whole)
    torch.testing.assert_close(found_v, expected_v, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_h, expected_h, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_residual_layer_of_a_pixelsnail_is_that_of_its_formula():
    layer = ResidualLayer(3, 4, 3, dropout=0.0).double()
    x, y = torch.randn(2, 2, 5, 7, 3, dtype=torch.float64).unbind(0)

    def elu(x):
        return torch.where(x > 0, x, x.exp() - 1)

    inner = ordinary_conv(layer.conv, elu(x), 3) + y @ layer.condition.weight.T
    out = elu(inner + layer.condition.bias) @ layer.out.weight.T + layer.out.bias
    expected = x + out[..., :3] * torch.special.expit(out[..., 3:])
    torch.testing.assert_close(layer(x, y, whole), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layers", "attention_layers"), [(6, 0), (6, 2), (7, 3), (4, 4), (5, 1)])
def test_attention_layers_are_spread_evenly(layers, attention_layers):
    config = small("pixelsnail", layers=layers, attention_layers=attention_layers)
    kinds = [isinstance(layer, AttentionLayer) for layer in make_prior(config).layers]
    assert len(kinds) == layers + attention_layers + config.output_layers
    assert sum(kinds) == attention_layers and not kinds[0]
    places = [place for place, attention in enumerate(kinds) if attention]
    gaps = [b - a for a, b in itertools.pairwise([-1, *places])]
    assert not gaps or max(gaps) - min(gaps) <= 1


# Conditions.


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_part_of_the_condition_matters_and_unknown_is_a_value_of_its_own(kind):
    model = random_prior(
        small(kind, num_classes=3, num_attributes=2, coarser_codebook_sizes=(4, 6))
    )
    codes = torch.randint(5, (2, *GRID))
    coarser = [torch.randint(4, (2, 2, 2)), torch.randint(6, (2, 3, 4))]
    labels, attributes = torch.tensor([0, 2]), torch.tensor([[1.0, -1.0], [0.0, 1.0]])

    def nats(coarser=coarser, labels=labels, attributes=attributes):
        return model(codes, coarser, labels, attributes).item()

    unknown, none_known = torch.full((2,), -1), torch.zeros(2, 2)
    values = [nats(), nats(attributes=none_known)]
    values += [nats(labels=torch.full((2,), label)) for label in (-1, 0, 1, 2)]
    values += [nats(attributes=attributes * sign) for sign in torch.tensor([[-1, 1], [1, -1]])]
    values += [nats([(coarser[0] + 1) % 4, coarser[1]]), nats([coarser[0], (coarser[1] + 1) % 6])]
    assert len(set(values)) == len(values)
    assert nats(labels=None) == nats(labels=unknown)
    assert nats(attributes=None) == nats(attributes=none_known)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_conditioned_on_is_the_same_everywhere(kind):
    model = make_prior(small(kind))
    batch = torch.tensor([3, 1])
    assert torch.equal(
        model.condition(2, labels=batch, attributes=torch.ones(2, 9)), model.condition(2)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_finer_prior_needs_the_codes_of_all_coarser_levels(kind):
    model = make_prior(small(kind, coarser_codebook_sizes=(4, 6)))
    codes = torch.zeros(1, *GRID, dtype=torch.int64)
    with pytest.raises(ValueError, match="coarser"):
        model(codes)
    with pytest.raises(ValueError):
        model(codes, [torch.zeros(1, 2, 2, dtype=torch.int64)])


@pytest.mark.parametrize(
    "grids", [[(6, 7)], [(3, 1)], [(1, 1), (2, 7), (3, 7)], [(2, 3), (5, 4)], [(12, 14)], [(4, 5)]]
)
@torch.no_grad()
def test_coarser_codes_of_any_number_and_ratio_are_enlarged_by_nearest(grids):
    sizes = tuple(range(3, 3 + len(grids)))
    layer = CoarserCodes(dataclasses.replace(SMALL, coarser_codebook_sizes=sizes))
    coarser = [torch.randint(size, (2, *grid)) for size, grid in zip(sizes, grids, strict=True)]
    assert layer(coarser).shape == (2, *GRID, 8)
    layer.body = nn.Identity()
    expected = torch.zeros(2, *GRID, 8)
    for (h, w), codes, embed in zip(grids, coarser, layer.embeddings, strict=True):
        for i, j in itertools.product(*map(range, GRID)):
            expected[:, i, j] += embed.weight[codes[:, i * h // GRID[0], j * w // GRID[1]]]
    torch.testing.assert_close(layer(coarser), expected)


@torch.no_grad()
def test_coarser_codes_are_seen_from_all_sides():
    """They come before every code of this level, so those below and to the right inform, too."""
    model = random_prior(small("pixelcnn", coarser_codebook_sizes=(4,)))
    codes, coarser = torch.randint(5, (1, *GRID)), torch.randint(4, (1, *GRID))
    for change in ((2, 3), (3, 2), (4, 3), (3, 4), (3, 3)):
        other = coarser.clone()
        other[0][change] = (other[0][change] + 1) % 4
        one, two = (model.logits(codes, model.condition(1, [c])) for c in (coarser, other))
        assert (one[0, 3, 3] != two[0, 3, 3]).any()


# Training.


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_gradients_for_a_second_forward_pass(kind):
    """With dropout, whose masks have to be the same the second time."""
    model = random_prior(small(kind, dropout=0.3, num_classes=3)).train()
    codes, labels = torch.randint(5, (2, *GRID)), torch.tensor([0, 2])
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    model.layers[-1].register_forward_pre_hook(count)
    results = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(codes, labels=labels)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        assert passes == len(results) * (len(results) + 1) // 2  # one, then two more
    for plain, again in zip(*results, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, again, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_alone(kind):
    model = random_prior(small(kind, dropout=0.5))
    codes = torch.randint(5, (2, *GRID))
    assert model(codes) == model(codes)
    model.train()
    assert model(codes) != model(codes)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_attributes_are_together_as_loud_as_a_code_at_first(count):
    model = make_prior(small("pixelcnn", channels=256, num_attributes=count))
    assert model.attributes is not None
    with torch.no_grad():
        heard = model.attributes(torch.randint(2, (400, count)) * 2.0 - 1) - model.attributes.bias
    assert 0.8 < float(heard.std() / model.embed.weight.std()) < 1.25


def test_building_a_prior_leaves_the_random_numbers_alone():
    """The scan of a twin draws numbers of its own."""
    config = small("pixelcnn", kernel_size=5, grid=(4, 11))
    torch.manual_seed(1)
    first = make_prior(config).state_dict()  # with a scan
    torch.manual_seed(1)
    second = make_prior(config).state_dict()  # the slope is known
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("mode", "grid"), [(torch.no_grad, (3, 12)), (torch.inference_mode, (3, 13))]
)
def test_a_prior_can_be_built_where_gradients_are_off(mode, grid):
    """The scan needs them; the grids are of this test alone, as slopes are remembered."""
    with mode():
        assert make_prior(small("pixelcnn", grid=grid)).slope == 2
        assert not torch.is_grad_enabled()


# Config.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "model.channels must be at least 1, got 0"),
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"attention_channels": 0}, "model.attention_channels must be at least 1, got 0"),
        ({"heads": 0}, "model.heads must be at least 1, got 0"),
        ({"codebook_size": 0}, "model.codebook_size must be at least 1, got 0"),
        ({"attention_layers": -1}, "model.attention_layers must be at least 0, got -1"),
        ({"output_layers": -1}, "model.output_layers must be at least 0, got -1"),
        ({"condition_layers": -1}, "model.condition_layers must be at least 0, got -1"),
        ({"residual_channels": 0}, "model.residual_channels must be at least 1 or null, got 0"),
        ({"kernel_size": 4}, "model.kernel_size must be odd and >= 3, got 4"),
        ({"kernel_size": 1}, "model.kernel_size must be odd and >= 3, got 1"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"model.dropout must be in \[0, 1\), got -0.1"),
        ({"dropout": float("nan")}, r"model.dropout must be in \[0, 1\), got nan"),
        ({"grid": (0, 4)}, r"model.grid must be 1 x 1 to 128 x 128, got \(0, 4\)"),
        ({"attention_layers": 1}, "architecture pixelsnail, not of pixelcnn"),
        ({"architecture": "transformer", "output_layers": 1}, "pixelsnail, not of transformer"),
        ({"architecture": "pixelsnail", "layers": 2, "attention_layers": 3},
         "model.attention_layers must be at most model.layers, 2, got 3"),
        ({"architecture": "pixelsnail", "attention_channels": 20},
         "model.attention_channels must be a multiple of model.heads, 8, got 20"),
        ({"architecture": "transformer", "channels": 20},
         "model.channels must be a multiple of model.heads, 8, got 20"),
    ],
)  # fmt: skip
def test_an_impossible_config_names_the_field_and_its_range(changes, message):
    with pytest.raises(ValueError, match=message):
        PriorConfig(**changes)


def test_heads_matter_only_to_those_that_have_them():
    PriorConfig(architecture="pixelcnn", channels=20, attention_channels=20)
    PriorConfig(architecture="pixelsnail", channels=20)
    PriorConfig(architecture="transformer", attention_channels=20)


def test_a_transformer_hears_positions_and_layers_from_the_first_step():
    """Beside codes of size 1, positions or layers that start at a hundredth are learnt late."""
    model = make_prior(
        small("transformer", channels=124, heads=4, layers=6, grid=(8, 8))
    ).requires_grad_(False)
    codes = torch.randint(model.config.codebook_size, (16, 8, 8))
    tokens, positions = model.embed(codes), model.positions
    before = after = tokens + positions
    for layer in model.layers:
        after = layer(after, whole)
    assert float(positions.std() / tokens.std()) == pytest.approx(1, rel=0.1)
    assert 0.3 < float((after - before).std() / before.std()) < 1
