"""The sampling engine against one whole pass per code, the distributions that it should draw from
by enumeration, and its noise against an implementation in plain integers."""

import itertools
import math

import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.nn import functional as F

from pipeline.models.priors import make_prior, sampling
from pipeline.models.priors.fronts import fronts
from pipeline.models.priors.noise import gumbel_noise, image_keys, mix
from pipeline.models.priors.prior import Prior, PriorConfig
from pipeline.models.priors.sampling import (
    MAX_GUIDANCE,
    MIN_TEMPERATURE,
    Draw,
    FrontNetwork,
    Sampled,
    log_likelihood,
    resample_codes,
    sample_codes,
    truncated,
)

GRIDS = [(1, 1), (1, 6), (6, 1), (5, 7)]
KINDS = {
    "pixelcnn": {"architecture": "pixelcnn"},
    "pixelcnn-5": {"architecture": "pixelcnn", "kernel_size": 5},
    "pixelcnn-raster": {"architecture": "pixelcnn", "order": "raster"},
    "pixelsnail": {"architecture": "pixelsnail", "attention_layers": 2, "output_layers": 1},
    "pixelsnail-raster": {"architecture": "pixelsnail", "attention_layers": 1, "order": "raster"},
    "transformer": {"architecture": "transformer"},
}
FRONTED = [kind for kind in KINDS if kind != "pixelcnn-raster"]  # its features know no fronts


def methods(kind: str) -> list[str]:
    return ["naive", "rows-above"] + ["raster", "wavefront"] * (kind in FRONTED)


def random_prior(kind: str, std: float = 0.4, **changes) -> Prior:
    """A small one in float64, whose codes depend on each other strongly."""
    sizes = {"channels": 8, "layers": 2, "kernel_size": 3, "attention_channels": 8, "heads": 2}
    sizes |= {"condition_layers": 1, "grid": (5, 7), "codebook_size": 13, "dropout": 0.5}
    model = make_prior(PriorConfig(**{**sizes, **KINDS[kind], **changes})).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def random_codes(model: Prior, batch: int) -> torch.Tensor:
    return torch.randint(model.config.codebook_size, (batch, *model.config.grid))


def keys_of(batch: int, seed: int = 7) -> torch.Tensor:
    return image_keys(seed, torch.arange(batch), 0)


def all_grids(grid: tuple[int, int], codebook_size: int) -> torch.Tensor:
    """(K^(H·W), H, W): every grid of codes there is."""
    return torch.cartesian_prod(*[torch.arange(codebook_size)] * math.prod(grid)).view(-1, *grid)


def fits(numbers: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Whether draws of numbers 0, 1, ... look like the probabilities, by a chi-square test; those
    expected less than five times are counted together."""
    expected = len(numbers) * probabilities
    found = numbers.bincount(minlength=len(expected)).double()
    rare = expected < 5
    found, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (found, expected))
    kept = expected > 0
    assert kept.sum() > 2 and not found[~kept].any()
    return stats.chisquare(found[kept], expected[kept]).pvalue > 1e-3


# The engine.


def most_probable(log_p: list[float], draw: Draw) -> list[bool]:
    """Which codes top-k and then top-p leave, one code after another."""
    order = sorted(range(len(log_p)), key=lambda code: -log_p[code])
    order = order[: draw.top_k or None]
    total = sum(math.exp(log_p[code]) for code in order)
    kept, reached = [], 0.0
    for code in order:
        if reached < draw.top_p or draw.top_p == 1:
            kept.append(code)
        reached += math.exp(log_p[code]) / total
    return [code in kept for code in range(len(log_p))]


@torch.no_grad()
def drawn_slowly(model, condition, keys, draw=None, unconditional=None, given=None) -> Sampled:
    """One whole pass per code in raster order, every step spelled out."""
    draw = draw or Draw()
    height, width = model.config.grid
    codes = torch.zeros(len(keys), height, width, dtype=torch.int64)
    score = torch.zeros(len(keys), dtype=torch.float64)
    for i, j in itertools.product(range(height), range(width)):
        logits = model.logits(codes, condition)[:, i, j]
        if unconditional is not None:
            without = model.logits(codes, unconditional)[:, i, j]
            logits = without + draw.guidance * (logits - without)
        log_p = torch.from_numpy(special.log_softmax(logits.numpy() / draw.temperature, axis=-1))
        noise = gumbel_noise(keys, torch.tensor([i * width + j]), logits.shape[-1])[:, 0]
        for b, row in enumerate(log_p):
            kept = torch.tensor(most_probable(row.tolist(), draw))
            codes[b, i, j] = (row + noise[b]).masked_fill(~kept, -math.inf).argmax()
            if given is not None and given[1][b, i, j]:
                codes[b, i, j] = given[0][b, i, j]
                score[b] += row[codes[b, i, j]]
    return Sampled(codes, score)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_methods_draw_the_same_codes_in_float64(kind, grid):
    model = random_prior(kind, grid=grid, num_attributes=3)
    condition = model.condition(4, attributes=torch.randn(4, 3).sign())
    expected = drawn_slowly(model, condition, keys_of(4))
    assert len(expected.codes.unique()) > 1
    for method in methods(kind):
        found = sample_codes(model, condition, keys_of(4), method=method)
        assert torch.equal(found.codes, expected.codes), method
        assert not found.given_log_prob.any()


ALL_AT_ONCE = Draw(temperature=1.3, top_k=9, top_p=0.9, guidance=1.7)


def everything(kind: str, grid=(5, 7)) -> tuple[Prior, dict]:
    """A prior and arguments of `sample_codes` with all that there is: coarser codes, class and
    attributes, guidance, truncation, and given codes anywhere."""
    model = random_prior(
        kind, grid=grid, num_attributes=3, num_classes=4, coarser_codebook_sizes=(6, 5)
    )
    coarser = [torch.randint(6, (4, 2, 2)), torch.randint(5, (4, 3, 4))]
    attributes, labels = torch.randn(4, 3).sign(), torch.tensor([0, 3, -1, 2])
    return model, {
        "condition": model.condition(4, coarser, labels, attributes),
        "unconditional": model.condition(4, coarser),
        "keys": keys_of(4),
        "draw": ALL_AT_ONCE,
        "given": (random_codes(model, 4), torch.rand(4, *grid) < 0.3),
    }


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_methods_agree_with_everything_at_once(kind, grid):
    model, arguments = everything(kind, grid)
    expected = drawn_slowly(model, **arguments)
    for method in methods(kind):
        found = sample_codes(model, **arguments, method=method)
        assert torch.equal(found.codes, expected.codes), method
        torch.testing.assert_close(found.given_log_prob, expected.given_log_prob)


@pytest.mark.parametrize(
    "draw",
    [
        Draw(temperature=0.5), Draw(top_k=1), Draw(top_k=4), Draw(top_k=99), Draw(top_p=0.5),
        Draw(top_p=1e-9), Draw(top_k=5, top_p=0.7, temperature=2.0),
    ],
    ids=lambda draw: f"{draw.temperature}-{draw.top_k}-{draw.top_p}",
)  # fmt: skip
def test_every_way_to_draw_agrees_with_the_slow_one(draw):
    model = random_prior("pixelcnn")
    expected = drawn_slowly(model, model.condition(4), keys_of(4), draw)
    assert torch.equal(sample_codes(model, model.condition(4), keys_of(4), draw).codes, expected[0])


@pytest.mark.parametrize("kind", FRONTED)
def test_a_front_network_works_in_any_order_from_its_slope_to_raster(kind):
    model = random_prior(kind)
    codes, condition = random_codes(model, 3), model.condition(3)
    expected = model.logits(codes, condition).flatten(1, 2)
    for slope in range(model.slope, 8):
        found = teacher_forced(FrontNetwork(model, condition, slope), codes)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def teacher_forced(network: FrontNetwork, codes: torch.Tensor) -> torch.Tensor:
    """Logits (B, H·W, K) of a network that is told these codes, one front after another."""
    flat = codes.flatten(1)
    logits = torch.empty(*flat.shape, network.model.config.codebook_size, dtype=torch.float64)
    for positions in fronts(codes.shape[1:], network.slope):
        logits[:, positions] = network.logits(positions).double()
        network.tell(positions, flat[:, positions])
    return logits


@pytest.mark.parametrize("conditioned_on", ["nothing", "a map"])
@pytest.mark.parametrize("kind", FRONTED)
def test_teacher_forced_logits_in_fp32_are_those_of_the_whole_network(kind, conditioned_on):
    coarser = (5,) if conditioned_on == "a map" else ()
    model = random_prior(kind, coarser_codebook_sizes=coarser, channels=32, layers=5, std=0.2)
    model.float()
    codes = random_codes(model, 3)
    condition = model.condition(3, [torch.randint(5, (3, 2, 2)) for _ in coarser])
    expected = model.logits(codes, condition).flatten(1, 2).double()
    assert expected.std() > 0.2
    for slope in (model.slope, 7):
        found = teacher_forced(FrontNetwork(model, condition, slope), codes)
        assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_in_fp32_a_code_differs_only_where_the_noise_leaves_two_nearly_equal(kind):
    """Each code drawn in fp32, given those drawn before it, is the best in float64 to within 2e-4,
    and so is the first one in which two methods differ."""
    model = random_prior(kind, std=0.3)
    condition, keys = model.condition(32), keys_of(32)
    noise = gumbel_noise(keys, torch.arange(35), 13)
    for method in methods(kind):
        codes = sample_codes(model.float(), condition.float(), keys, method=method).codes
        perturbed = model.double().logits(codes, condition).flatten(1, 2) + noise
        taken = perturbed.gather(-1, codes.flatten(1)[..., None])[..., 0]
        assert (perturbed.amax(-1) - taken).max() < 2e-4, method


@pytest.mark.parametrize("method", ["wavefront", "raster"])
@pytest.mark.parametrize("kind", FRONTED)
def test_fronts_padded_to_one_size_draw_the_same_codes(kind, method, monkeypatch):
    """What CUDA graphs need: one buffer of positions, its rest at the scratch place, and the same
    steps for whatever is in it; a warm-up that leaves no traces."""

    def in_one_buffer(step, order, scratch, device):
        recorded.append(step)
        buffer = torch.full((max(map(len, order)) + 2,), scratch, device=device)
        for _ in range(3):
            step(buffer)

        def again(positions):
            buffer.fill_(scratch)[: len(positions)] = positions
            step(buffer)

        return again

    class AsIfOnCuda(torch.Tensor):
        is_cuda = True

    recorded = []
    model, arguments = everything(kind)
    expected = sample_codes(model, **arguments, method=method)
    monkeypatch.setattr(sampling, "as_graph", in_one_buffer)
    arguments["keys"] = arguments["keys"].as_subclass(AsIfOnCuda)
    found = sample_codes(model, **arguments, method=method)
    assert len(recorded) == 1 and torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.given_log_prob, expected.given_log_prob)


@pytest.mark.parametrize("method", ["wavefront", "raster"])
def test_the_classic_model_is_refused_by_caches(method):
    model = random_prior("pixelcnn-raster")
    with pytest.raises(ValueError, match="sample with method rows-above"):
        sample_codes(model, model.condition(1), keys_of(1), method=method)


def test_a_front_network_refuses_a_slope_below_that_of_its_convolutions():
    model = random_prior("pixelcnn-5")
    network = FrontNetwork(model, model.condition(1), 1)
    with pytest.raises(ValueError, match="later fronts"):
        network.logits(torch.tensor([0]))


@pytest.mark.parametrize(("method", "steps"), [("wavefront", 15), ("raster", 35), ("naive", 35)])
def test_progress_counts_every_position_once(method, steps):
    model, told = random_prior("pixelcnn"), []
    assert model.slope == 2
    sample_codes(model, model.condition(2), keys_of(2), method=method, progress=told.append)
    assert len(told) == steps and sum(told) == 35


# What is drawn.


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_codes_follow_the_softmax_on_a_grid_of_one(kind):
    model = random_prior(kind, grid=(1, 1), std=0.7)
    drawn = sample_codes(model, model.condition(20_000), keys_of(20_000)).codes.flatten()
    logits = model.logits(torch.zeros(1, 1, 1, dtype=torch.int64), model.condition(1))
    assert fits(drawn, torch.from_numpy(special.softmax(logits.flatten().numpy())))
    hotter = torch.from_numpy(special.softmax(logits.flatten().numpy() / 1.2))
    assert not fits(drawn, hotter)  # that the test can fail


@pytest.mark.parametrize("kind", FRONTED)
@torch.no_grad()
def test_grids_follow_the_joint_distribution(kind):
    model = random_prior(kind, grid=(2, 2), codebook_size=3)
    every = all_grids((2, 2), 3)
    probabilities = log_likelihood(model, every, model.condition(81)).sum((1, 2)).exp()
    drawn = sample_codes(model, model.condition(20_000), keys_of(20_000)).codes
    place = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    assert torch.equal(every[place], drawn)
    assert fits(place, probabilities)


@pytest.mark.parametrize("draw", [Draw(temperature=1e-6), Draw(top_k=1), Draw(top_p=1e-7)])
def test_the_limit_of_every_truncation_is_the_most_probable_code(draw):
    model = random_prior("pixelsnail")
    codes = torch.zeros(1, 5, 7, dtype=torch.int64)
    with torch.no_grad():
        for i, j in itertools.product(range(5), range(7)):
            codes[0, i, j] = model.logits(codes, model.condition(1))[0, i, j].argmax()
    found = sample_codes(model, model.condition(3), keys_of(3), draw).codes
    assert torch.equal(found, codes.expand(3, 5, 7))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 8, 9])
def test_truncation_against_one_code_after_another(top_k, top_p):
    draw = Draw(top_k=top_k, top_p=top_p)
    logits = 2 * torch.randn(20, 3, 8, dtype=torch.float64)
    found = truncated(logits, draw)
    for row, result in zip(logits.flatten(0, 1), found.flatten(0, 1), strict=True):
        kept = torch.tensor(most_probable(row.log_softmax(0).tolist(), draw))
        assert torch.equal(result.isfinite(), kept)
        assert torch.equal(result[kept], row[kept]) and (result[~kept] == -math.inf).all()


def test_truncation_at_known_probabilities():
    def kept(logits, **draw):
        return truncated(logits, Draw(**draw)).isfinite().nonzero().flatten().tolist()

    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    for top_p, codes in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3])):
        assert kept(logits, top_p=top_p) == codes
    assert kept(logits, top_k=2, top_p=0.5) == [1]  # of the two that are left it has 4/7
    tie = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    assert kept(tie, top_k=3) == [0, 1, 2, 3, 4] and kept(tie, top_k=2) == [1, 3]


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
@torch.no_grad()
def test_guidance_draws_from_the_formula(guidance):
    """p(code | c)^g · p(code)^(1-g), normalised (Ho & Salimans 2022)."""
    model = random_prior("pixelcnn", grid=(1, 1), num_classes=2, codebook_size=5)
    label, nothing = torch.tensor([1]), torch.zeros(1, 1, 1, dtype=torch.int64)
    with_class = model.logits(nothing, model.condition(1, labels=label)).softmax(-1).flatten()
    without = model.logits(nothing, model.condition(1)).softmax(-1).flatten()
    expected = with_class**guidance * without ** (1 - guidance)
    drawn = sample_codes(
        model, model.condition(20_000, labels=label.expand(20_000)), keys_of(20_000),
        Draw(guidance=guidance), unconditional=model.condition(20_000),
    ).codes  # fmt: skip
    assert fits(drawn.flatten(), expected / expected.sum())
    assert not fits(drawn.flatten(), with_class)


def test_guidance_needs_the_condition_without_class_and_attributes():
    model = random_prior("pixelcnn")
    with pytest.raises(ValueError, match="guidance needs the condition without"):
        sample_codes(model, model.condition(1), keys_of(1), Draw(guidance=2.0))


@torch.no_grad()
def test_log_likelihood_is_that_of_the_softmax_and_sums_to_one():
    model = random_prior("pixelsnail", grid=(2, 2), codebook_size=3)
    every = all_grids((2, 2), 3)
    found = log_likelihood(model, every, model.condition(81))
    log_p = special.log_softmax(model.logits(every, model.condition(81)).numpy(), axis=-1)
    for place in itertools.product(range(81), range(2), range(2)):
        assert found[place].item() == pytest.approx(log_p[(*place, every[place])], abs=1e-12)
    assert found.sum((1, 2)).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_likelihood_in_bf16_is_normalised_in_fp32(kind):
    model = random_prior(kind).bfloat16()
    codes = random_codes(model, 2)
    logits = model.logits(codes, model.condition(2))
    found = log_likelihood(model, codes, model.condition(2))
    expected = -F.cross_entropy(logits.double().movedim(-1, 1), codes, reduction="none")
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# Given codes.


@pytest.mark.parametrize("method", ["wavefront", "raster"])
@pytest.mark.parametrize("kind", FRONTED)
def test_given_codes_stay_and_their_likelihood_is_counted(kind, method):
    model = random_prior(kind)
    condition, given = model.condition(3), random_codes(model, 3)
    for mask in (torch.rand(3, 5, 7) < 0.4, torch.ones(3, 5, 7, dtype=torch.bool)):
        found = sample_codes(model, condition, keys_of(3), given=(given, mask), method=method)
        assert torch.equal(found.codes[mask], given[mask])
        each = log_likelihood(model, found.codes, condition)
        expected = torch.where(mask, each, 0).sum((1, 2))
        torch.testing.assert_close(found.given_log_prob, expected)


@pytest.mark.parametrize("kind", FRONTED)
def test_codes_before_the_first_given_one_do_not_know_of_it(kind):
    model = random_prior(kind)
    free = sample_codes(model, model.condition(16), keys_of(16)).codes
    mask = torch.zeros(16, 5, 7, dtype=torch.bool)
    mask[:, 2, 3] = mask[:, 3:, 2:5] = True
    given = (free + 1) % 13
    found = sample_codes(model, model.condition(16), keys_of(16), given=(given, mask)).codes
    assert torch.equal(found.flatten(1)[:, :17], free.flatten(1)[:, :17])  # (2, 3) is the 17th
    later = ~mask
    later.view(16, -1)[:, :17] = False
    assert (found != free)[later].any()


@pytest.mark.parametrize("kind", FRONTED)
def test_a_prefix_of_a_sample_is_continued_as_it_was(kind):
    model = random_prior(kind)
    free = sample_codes(model, model.condition(4), keys_of(4)).codes
    prefix = torch.arange(35).view(5, 7).lt(17).expand(4, 5, 7)
    hidden = torch.where(prefix, free, 12)  # what is not given is not looked at
    found = sample_codes(model, model.condition(4), keys_of(4), given=(hidden, prefix)).codes
    assert torch.equal(found, free)


HALF = torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)


@torch.no_grad()
def posterior(model: Prior, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All grids of a 3x3 prior with K = 2 that have the given codes where HALF is set, (N, 3, 3);
    the log-probability with which each is drawn left to right; and that of the given codes."""
    every = all_grids((3, 3), 2)
    every = every[(every == given)[:, HALF].all(1)]
    each = log_likelihood(model, every, model.condition(len(every)))
    return every, each[:, ~HALF].sum(1), each[:, HALF].sum(1)


def numbers_of(codes: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
    """Which of `every` grid each grid is."""
    found = (codes[:, None] == every).all((2, 3))
    assert (found.sum(1) == 1).all()
    return found.int().argmax(1)


def resampled(model: Prior, given: torch.Tensor, fillings: int, count: int) -> torch.Tensor:
    """`count` results of resampling, each from its own `fillings`."""
    fixed = given.expand(count, 3, 3), HALF.expand(count, 3, 3)

    def fill(number: int) -> Sampled:
        keys = image_keys(5, torch.arange(count), 0, purpose=number + 1)
        return sample_codes(model, model.condition(count), keys, given=fixed)

    return resample_codes(fill, fillings, image_keys(5, torch.arange(count), 0))


GIVEN = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0]])  # where HALF is set


def test_resampling_nears_the_exact_posterior():
    """Total variation between the results and p(all | given) by enumeration of a 3x3 grid, which
    falls with the number of fillings down to what so many exact draws would leave."""
    model = random_prior(
        "pixelsnail", grid=(3, 3), codebook_size=2, std=0.8, layers=1, attention_layers=1,
        channels=4, attention_channels=4,
    )  # fmt: skip
    every, proposal, weight = posterior(model, GIVEN)
    exact, count = (proposal + weight).softmax(0), 1_500
    distances = []
    for fillings in (1, 4, 32):
        drawn = numbers_of(resampled(model, GIVEN, fillings, count), every)
        frequencies = drawn.bincount(minlength=len(every)) / count
        distances.append(0.5 * (frequencies - exact).abs().sum().item())
    chance = 0.5 * (exact / count).sqrt().sum().item()  # E|frequency - p| <= sqrt(p / count)
    assert distances[0] > 2 * distances[1] > 4 * distances[2] and distances[0] > 10 * chance
    assert distances[2] < chance


def test_resampling_of_one_and_two_fillings_is_exactly_that_of_enumeration():
    model = random_prior("pixelcnn", grid=(3, 3), codebook_size=2, std=0.6)
    every, proposal, weight = posterior(model, GIVEN)
    once = proposal.exp()
    assert once.sum().item() == pytest.approx(1, abs=1e-12)
    # of a pair (a, b), b is taken with probability w(b) / (w(a) + w(b)), and it may be twice b
    taken = torch.sigmoid(weight - weight[:, None])
    twice = 2 * once * (once[:, None] * taken).sum(0)
    assert twice.sum().item() == pytest.approx(1, abs=1e-12)
    one, two = (numbers_of(resampled(model, GIVEN, r, 6_000), every) for r in (1, 2))
    assert fits(one, once) and fits(two, twice)
    assert not fits(one, twice) and not fits(two, once)
    assert not fits(two, (proposal + weight).softmax(0))


# Noise.


WORD = 2**64


def signed(word: int) -> int:
    return (word + WORD // 2) % WORD - WORD // 2


def finalised(word: int) -> int:
    """The finaliser of SplitMix64 in Python's integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def unfinalised(word: int) -> int:
    """Its inverse."""
    word ^= (word >> 31) ^ (word >> 62)
    word = word * pow(0x94D049BB133111EB, -1, WORD) % WORD
    word ^= (word >> 27) ^ (word >> 54)
    word = word * pow(0xBF58476D1CE4E5B9, -1, WORD) % WORD
    return word ^ (word >> 30) ^ (word >> 60)


def test_mix_is_the_finaliser_of_splitmix64():
    words = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, WORD - 1]
    words += [finalised(word) for word in range(500)]
    found = mix(torch.tensor([signed(word) for word in words])).tolist()
    assert found == [signed(finalised(word)) for word in words]
    assert [unfinalised(finalised(word)) for word in words] == words
    # the first numbers of the generator with seed 1234567, as published
    counters = [signed(1234567 + number * 0x9E3779B97F4A7C15) for number in range(1, 6)]
    assert [each % WORD for each in mix(torch.tensor(counters)).tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip


def test_noise_is_keyed_by_seed_image_level_purpose_and_position_alone():
    keys, positions = image_keys(3, torch.tensor([5, 9, 2]), 1), torch.tensor([0, 4, 7, 63])
    noise = gumbel_noise(keys, positions, 6)
    assert noise.shape == (3, 4, 6) and noise.dtype == torch.float32
    for batch, places in itertools.product([[0], [2, 0], [1, 1, 2, 0]], [[3], [2, 0, 1], [1, 1]]):
        part = gumbel_noise(keys[batch], positions[places], 6)
        assert torch.equal(part, noise[batch][:, places])
    assert torch.equal(image_keys(3, torch.tensor([9]), 1), keys[1:2])
    for seed, image, level, purpose in ((4, 5, 1, 0), (3, 6, 1, 0), (3, 5, 0, 0), (3, 5, 1, 1)):
        other = gumbel_noise(image_keys(seed, torch.tensor([image]), level, purpose), positions, 6)
        assert not (other[0] == noise[0]).any()


def test_noise_is_that_of_the_standard_gumbel_distribution():
    noise = gumbel_noise(keys_of(64), torch.arange(64), 32).double()
    flat = noise.flatten().numpy()
    assert stats.kstest(flat, stats.gumbel_r.cdf).pvalue > 0.01
    error = 4 / len(flat) ** 0.5
    assert flat.mean() == pytest.approx(stats.gumbel_r.mean(), abs=error * stats.gumbel_r.std())
    # the variance of a sample variance is (kurtosis + 2) σ^4 / n
    assert flat.var() == pytest.approx(
        stats.gumbel_r.var(), abs=error * (5.4 + 2) ** 0.5 * stats.gumbel_r.var()
    )
    uniform = torch.from_numpy(stats.gumbel_r.cdf(noise.numpy())) - 0.5
    for one, next_one in (
        (uniform[1:], uniform[:-1]),  # images
        (uniform[:, 1:], uniform[:, :-1]),  # positions
        (uniform[:, 8:], uniform[:, :-8]),  # rows of an 8x8 grid
        (uniform[..., 1:], uniform[..., :-1]),  # codes
    ):
        correlation = (one * next_one).mean() * 12
        assert correlation.abs() < 4 / one.numel() ** 0.5


def test_noise_of_one_key_never_comes_again_in_another():
    """Pairs of neighbours are compared, as single fp32 values are equal by chance; a counter that
    runs on from one position or image into the next would repeat them."""
    keys = torch.cat([
        image_keys(seed, torch.arange(4), level, purpose)
        for seed, level, purpose in itertools.product(range(4), range(3), range(3))
    ])  # fmt: skip
    assert len(keys.unique()) == len(keys)
    pairs = gumbel_noise(keys, torch.arange(30), 16).unfold(-1, 2, 1).reshape(-1, 2)
    assert len(pairs.unique(dim=0)) == len(pairs)
    many = torch.cat([image_keys(0, torch.arange(50_000), level) for level in range(3)])
    assert len(many.unique()) == len(many)


def test_large_and_negative_seeds_and_images_have_noise_of_their_own():
    ends = [0, 1, -1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63)]
    keys = torch.stack([image_keys(seed, torch.tensor(ends), 0) for seed in ends])
    assert len(keys.unique()) == len(ends) ** 2
    noise = gumbel_noise(keys.flatten(), torch.arange(4), 16)
    assert noise.isfinite().all()
    assert stats.kstest(noise.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 0.01


@pytest.mark.parametrize("bits", [0, 1, 2**63, WORD - 1])
def test_noise_is_finite_whatever_the_hash(bits):
    """The key whose first hash is `bits`, by going back."""
    key = unfinalised((unfinalised(bits) - 0x9E3779B97F4A7C15) % WORD)
    noise = gumbel_noise(torch.tensor([signed(key)]), torch.tensor([0]), 1).item()
    uniform = (bits + 0.5) / WORD
    assert math.isfinite(noise)
    if bits == 2**63:
        assert noise == pytest.approx(stats.gumbel_r.ppf(uniform), rel=1e-6)
    assert -4 < noise < 40


@pytest.mark.parametrize("kind", FRONTED)
def test_an_image_is_the_same_alone_in_any_batch_and_under_any_number_of_companions(kind):
    model = random_prior(kind, num_classes=5)
    images, labels = torch.tensor([3, 100, 7, 2**40, 0]), torch.arange(5)

    def draw(which):
        condition = model.condition(len(which), labels=labels[which])
        return sample_codes(model, condition, image_keys(1, images[which], 0)).codes

    together = draw([0, 1, 2, 3, 4])
    assert len(together.unique(dim=0)) == 5
    for which in ([0], [3], [4, 2], [1, 0, 3, 2]):
        assert torch.equal(draw(which), together[which])


def test_the_coldest_and_most_guided_draw_of_float32_is_that_of_float64():
    model = random_prior("pixelcnn", num_classes=3)
    coldest = Draw(temperature=MIN_TEMPERATURE, guidance=MAX_GUIDANCE)

    def draw() -> torch.Tensor:
        given, without = model.condition(3, labels=torch.arange(3)), model.condition(3)
        return sample_codes(model, given, keys_of(3), coldest, unconditional=without).codes

    exact = draw()
    model.float()
    assert torch.equal(draw(), exact) and len(exact.unique(dim=0)) == 3


@pytest.mark.parametrize("method", ["wavefront", "rows-above", "likelihood"])
def test_no_tf32_while_priors_are_evaluated(method, monkeypatch):
    """Which is on for convolutions unless told otherwise, as on any machine with CUDA."""
    model, seen = random_prior("pixelcnn"), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        model, "body", lambda *args: seen.append(torch.backends.cudnn.allow_tf32) or body(*args)
    )
    body, condition = type(model).body.__get__(model), model.condition(1)
    if method == "likelihood":
        log_likelihood(model, torch.zeros(1, 5, 7, dtype=torch.int64), condition)
    else:
        sample_codes(model, condition, keys_of(1), method=method)
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


# Draw.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and at least 1e-06, got 0.0"),
        ({"temperature": -1.0}, "temperature must be finite and at least 1e-06, got -1.0"),
        ({"temperature": 1e-7}, "temperature must be finite and at least 1e-06, got 1e-07"),
        ({"temperature": math.inf}, "temperature must be finite and at least 1e-06, got inf"),
        ({"temperature": math.nan}, "temperature must be finite and at least 1e-06, got nan"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
        ({"guidance": -0.5}, r"guidance must be in 0..10,000, got -0.5"),
        ({"guidance": 10_001}, r"guidance must be in 0..10,000, got 10001"),
        ({"guidance": math.inf}, r"guidance must be in 0..10,000, got inf"),
        ({"guidance": math.nan}, r"guidance must be in 0..10,000, got nan"),
    ],
)
def test_an_impossible_draw_names_the_field_and_its_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Draw(**changes)
