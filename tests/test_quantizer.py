"""The EMA quantizer against hand-computed steps, and each fault that its ancestors had."""

import copy

import pytest
import torch

from pipeline.models.quantizer import EMAQuantizer, Statistics, commit, usage


def make(size=8, dim=4, decay=0.9, revival=0.0, dtype=torch.float32):
    quantizer = EMAQuantizer(size, dim, decay, revival).to(dtype)
    quantizer.commits += 1  # as after the first commit, which sets the codebook to latents
    return quantizer


def test_straight_through_gradient_is_the_identity():
    quantizer = make().train()
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized = quantizer(latents).quantized
    weight = torch.randn_like(quantized)
    (quantized * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight, rtol=0, atol=0)


def test_beta_term_pulls_the_latents_to_their_codes_and_nothing_else():
    """The widely copied fault puts beta on the codebook's term; here that term does not exist."""
    quantizer = make(dtype=torch.float64).train()
    latents = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    output = quantizer(latents)
    output.commitment.backward()
    codes = quantizer.lookup(output.codes)
    torch.testing.assert_close(latents.grad, 2 * (latents.detach() - codes) / latents.numel())
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())
    assert list(quantizer.parameters()) == []


def test_ema_update_against_a_hand_computed_step():
    quantizer = make(size=2, dim=1, decay=0.5)
    quantizer.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    quantizer.sums.copy_(quantizer.codebook)
    # vectors 1, 2, 3 fall to code 0, none to code 1: N = .5*1 + .5*3 = 2, m = .5*0 + .5*6 = 3
    counts, sums = torch.tensor([3.0, 0.0]), torch.tensor([[6.0], [0.0]])
    statistics = Statistics(counts, sums, torch.zeros(2, 1))
    quantizer.update(statistics, batch_size=128)
    torch.testing.assert_close(quantizer.counts, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(quantizer.sums, torch.tensor([[3.0], [5.0]]))
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[1.5], [10.0]]), rtol=2e-5, atol=0)


def test_the_decay_is_scaled_to_the_batch():
    whole, halves = make(), make()
    halves.load_state_dict(whole.state_dict())
    zero = Statistics(torch.zeros(8), torch.zeros(8, 4), torch.zeros(8, 4))
    whole.update(zero, batch_size=128)
    halves.update(zero, batch_size=64)
    halves.update(zero, batch_size=64)
    torch.testing.assert_close(whole.counts, halves.counts)


def test_unused_codes_stay_where_they_are():
    """From zero counts an unused code would be thrown to m/eps, 1e5 times too far."""
    quantizer = make(size=64, dim=4)
    before = quantizer.codebook.clone()
    latents = quantizer.codebook[3].expand(32, 4) + 0.01 * torch.randn(32, 4)
    quantizer.train()(latents.T.reshape(1, 4, 32, 1))
    commit([quantizer], batch_size=128)
    unused = torch.arange(64) != 3
    torch.testing.assert_close(quantizer.codebook[unused], before[unused], rtol=1e-3, atol=1e-4)


def test_smoothing_is_not_written_back_into_the_counts():
    quantizer = make(size=4, dim=2, decay=0.99)
    empty = Statistics(torch.tensor([4.0, 0, 0, 0]), torch.zeros(4, 2), torch.zeros(4, 2))
    for _ in range(200):
        quantizer.update(empty, batch_size=128)
    torch.testing.assert_close(quantizer.counts[1:], torch.full((3,), 0.99**200))


def test_the_ema_state_is_in_the_state_dict_and_survives():
    quantizer = make().train()
    quantizer(torch.randn(2, 4, 3, 3))
    commit([quantizer], batch_size=2)
    state = quantizer.state_dict()
    assert set(state) == {"codebook", "counts", "sums", "commits"}
    other = make()
    other.load_state_dict(state)
    latents = torch.randn(2, 4, 3, 3)
    for one in (quantizer, other):
        one.train()(latents)
        commit([one], batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.buffers(), other.buffers(), strict=True))


def test_the_forward_pass_never_changes_the_codebook():
    quantizer = make()
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    for training in (True, False):
        quantizer.train(training)
        quantizer(torch.randn(2, 4, 3, 3))
        quantizer(torch.randn(2, 4, 3, 3))
    for name, buffer in quantizer.named_buffers():
        assert torch.equal(buffer, before[name])
    quantizer.pending = None
    with pytest.raises(RuntimeError, match="forward pass in training mode"):
        quantizer.eval()(torch.randn(2, 4, 3, 3))
        quantizer.statistics(0, 1)


def test_the_first_commit_sets_the_codebook_to_latents_of_the_batch():
    quantizer = EMAQuantizer(16, 4, 0.99, 0.1).train()
    latents = 50 + torch.randn(4, 4, 5, 5)
    quantizer(latents)
    commit([quantizer], batch_size=4)
    vectors = latents.movedim(1, -1).reshape(-1, 4)
    same = (quantizer.codebook[:, None] == vectors[None]).all(-1)
    assert same.any(1).all()


def test_dead_codes_start_anew_with_their_statistics():
    quantizer = make(size=8, dim=4, decay=0.5, revival=0.1).train()
    quantizer.codebook[5:] += 1000  # never the nearest
    quantizer.sums.copy_(quantizer.codebook)
    for _ in range(20):
        latents = torch.randn(8, 4, 6, 6)
        quantizer(latents)
        commit([quantizer], batch_size=128)
    assert quantizer.codebook.abs().max() < 10
    torch.testing.assert_close(
        quantizer.sums / quantizer.counts[:, None], quantizer.codebook, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_statistics_do_not_depend_on_the_number_of_ranks(world_size):
    torch.manual_seed(1)
    latents = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    quantizer = make(size=16, dtype=torch.float64).train()
    totals = None
    for rank, part in enumerate(latents.chunk(world_size)):
        quantizer(part)
        share = quantizer.statistics(rank, world_size)
        totals = share if totals is None else [a + b for a, b in zip(totals, share, strict=True)]
    quantizer(latents)
    for total, expected in zip(totals, quantizer.statistics(0, 1), strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_one_flat_all_reduce_for_all_levels():
    """Two ranks that see the same batch: their sum is twice the statistics, so the same codes."""
    calls = []

    def all_reduce(flat):
        calls.append(flat.shape)
        flat *= 2

    def trained(reduce):
        torch.manual_seed(2)
        levels = [make(size=8), make(size=5, dim=3)]
        torch.manual_seed(3)
        for level in levels:
            level.train()(torch.randn(2, level.codebook.shape[1], 3, 3))
        # decay 0.9^(2/128) per step; with twice the statistics the codes still are their means
        commit(levels, batch_size=2, all_reduce=reduce)
        return levels

    alone, summed = trained(None), trained(all_reduce)
    assert calls == [(8 + 8 * 4 + 8 * 4 + 5 + 5 * 3 + 5 * 3,)]
    for one, two in zip(alone, summed, strict=True):
        weight = 1 - one.decay ** (2 / 128)
        gained_one = one.counts - (1 - weight)
        gained_two = two.counts - (1 - weight)
        torch.testing.assert_close(gained_two, 2 * gained_one)
        assert one.sums.shape == two.sums.shape and not torch.equal(one.sums, two.sums)


def test_an_island_of_fp32_under_autocast():
    quantizer = make().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(torch.randn(2, 4, 3, 3).bfloat16())
    assert output.quantized.dtype == output.commitment.dtype == torch.float32
    commit([quantizer], batch_size=2)
    assert all(b.dtype == torch.float32 for b in (quantizer.codebook, quantizer.sums))
    assert make(dtype=torch.float64)(torch.randn(1, 4, 2, 2)).quantized.dtype == torch.float64


def test_usage_of_known_distributions():
    assert usage(torch.tensor([5, 5, 5, 5])) == pytest.approx((4.0, 0.0, 4))
    assert usage(torch.tensor([9, 0, 0, 0])) == pytest.approx((1.0, 0.75, 1))
    perplexity, unused, used = usage(torch.tensor([3, 1]))
    assert perplexity == pytest.approx((4 / 3) ** 0.75 * 4**0.25) and (unused, used) == (0, 2)


def test_compiled_without_a_graph_break():
    plain = make(size=32, dim=8).train()
    quantizer = copy.deepcopy(plain)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        latents = torch.randn(2, 8, 4, 4)
        gradients = []
        for model in (compiled, plain):
            x = latents.clone().requires_grad_()
            output = model(x)
            (output.quantized.sum() + output.commitment).backward()
            gradients.append((x.grad, output.codes))
        assert torch.equal(gradients[0][1], gradients[1][1])
        torch.testing.assert_close(gradients[0][0], gradients[1][0])
        commit([quantizer], batch_size=2)
        commit([plain], batch_size=2)
        assert torch.equal(quantizer.codebook, plain.codebook)
