"""The codebooks' life in training: rows, k-means, statistics over ranks, revival, comparison.

Ranks are threads here that meet in `Ranks`, a stand-in for torch.distributed; one test runs real
processes.
"""

import copy
import itertools
import threading

import numpy as np
import pytest
import torch
import torch.distributed
from torch import multiprocessing
from torch.utils.checkpoint import checkpoint

from pipeline.models.quantizers import (
    CosineQuantizer,
    EMAQuantizer,
    PlacedCodes,
    make_quantizer,
)
from pipeline.models.vqvae import VQVAE, VQVAEConfig, loss
from pipeline.training.codebooks import (
    KMEANS_ITERATIONS,
    Codebooks,
    CodebookUse,
    Part,
    draw_rows,
    kmeans,
    num_start_images,
    pick,
    start_codebooks,
)

PLACED = ("ema", "cosine", "learned")
SMALL = {"channels": 8, "residual_channels": 4, "residual_layers": 1, "code_dim": 4}


class Ranks:
    """torch.distributed among threads: `run` calls a function on every rank and returns what each
    one returned. A reduction happens in `wait`, so that a result read before it is wrong."""

    def __init__(self, world_size, monkeypatch):
        self.world_size, self.here = world_size, threading.local()
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.slots = [None] * world_size
        self.sizes = []  # of the reductions, as rank 0 saw them
        for name in (
            "is_available",
            "is_initialized",
            "get_world_size",
            "all_reduce",
            "all_gather",
        ):
            monkeypatch.setattr(torch.distributed, name, getattr(self, name))

    def run(self, function):
        results, errors = [None] * self.world_size, []

        def on_rank(rank):
            self.here.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=on_rank, args=(r,)) for r in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        broken = (threading.BrokenBarrierError,)
        for error in sorted(errors, key=lambda error: isinstance(error, broken)):
            raise error  # the cause, rather than that the others waited in vain
        return results

    def is_available(self):
        return True

    is_initialized = is_available

    def get_world_size(self):
        return self.world_size

    def _of_all(self, tensor):
        self.slots[self.here.rank] = tensor.clone()
        self.barrier.wait()
        tensors = list(self.slots)
        self.barrier.wait()
        return tensors

    def all_reduce(self, tensor, async_op=False):
        if self.here.rank == 0:
            self.sizes.append(tensor.numel())
        work = Work(lambda: tensor.copy_(torch.stack(self._of_all(tensor)).sum(0)))
        return work if async_op else work.wait()

    def all_gather(self, tensors, tensor):
        for place, found in zip(tensors, self._of_all(tensor), strict=True):
            place.copy_(found)


class Work:
    def __init__(self, wait):
        self.wait = wait


def levels_of(*names, size=16, dim=4, dtype=torch.float64, **options):
    options = {"decay": 0.9, "revival": 0.0, "gradient": "straight_through"} | options
    return [make_quantizer(name, size, dim, **options).to(dtype) for name in names]


def outputs_of(quantizers, latents):
    return [quantizer(level) for quantizer, level in zip(quantizers, latents, strict=True)]


def states(quantizers):
    return [copy.deepcopy(quantizer.state_dict()) for quantizer in quantizers]


def assert_close_states(one, other, **tolerance):
    tolerance = {"rtol": 1e-12, "atol": 1e-12} | tolerance
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **tolerance)


def batch_of_latents(batch=8, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 3), (4, 6), (4, 6))
    return [torch.randn(batch, dim, *s, generator=generator, dtype=torch.float64) for s in sizes]


# Rows.


@pytest.mark.parametrize(
    ("count", "total"), [(8, 8), (8, 64), (7, 100), (1000, 1500), (1000, 1001), (512, 8192), (1, 5)]
)
def test_drawn_rows_are_distinct_and_one_of_each_part(count, total):
    for seed in range(20):
        rows = draw_rows(count, total, seed)
        assert rows.shape == (count,) and rows.dtype == torch.int64
        assert rows.min() >= 0 and rows.max() < total
        assert len(rows.unique()) == count
        parts = torch.arange(count, dtype=torch.float64) * total / count
        assert (rows >= parts.floor()).all() and (rows < (parts + total / count).ceil()).all()


def test_fewer_rows_than_are_drawn_are_drawn_repeatedly():
    for total in (1, 3, 7):
        rows = draw_rows(8, total, seed=0)
        assert rows.min() >= 0 and rows.max() < total
        assert len(rows.unique()) == total  # each of them


def test_drawn_rows_are_the_same_at_every_call_whatever_the_global_generator():
    before = torch.get_rng_state()
    rows = draw_rows(64, 6400, seed=3)
    assert torch.equal(torch.get_rng_state(), before)  # a resumed run draws what it would have
    torch.manual_seed(99)
    assert torch.equal(draw_rows(64, 6400, seed=3), rows)
    assert not torch.equal(draw_rows(64, 6400, seed=4), rows)


def test_drawn_rows_are_everywhere_in_their_part():
    offsets = torch.stack([draw_rows(10, 1000, seed) for seed in range(400)]) % 100
    shares = offsets.flatten().bincount(minlength=100) / offsets.numel()
    assert offsets.min() == 0 and offsets.max() == 99 and shares.max() < 0.03


@pytest.mark.parametrize("cuts", [[], [10], [1, 2, 3], [5, 5, 17], [19]])
def test_picked_rows_summed_over_any_partition_are_the_rows(cuts):
    vectors = torch.randn(20, 3)
    rows = draw_rows(6, 20, seed=1)
    bounds = [0, *cuts, 20]
    pieces = [pick(vectors[a:b], rows, a) for a, b in itertools.pairwise(bounds) if a < b]
    assert torch.equal(sum(pieces), vectors[rows])


def test_a_row_that_is_not_there_does_not_spoil_the_sum():
    """Rows elsewhere are zeros even where the vector that was read instead is not a number."""
    vectors = torch.full((2, 3), torch.nan)
    assert torch.equal(pick(vectors, torch.tensor([7, 9]), first=0), torch.zeros(2, 3))


# k-means.


def lloyd(vectors, centres, iterations):
    """Lloyd's algorithm by all distances, for clusters that never are empty."""
    for _ in range(iterations):
        codes = ((vectors[:, None] - centres) ** 2).sum(-1).argmin(1)
        counts = np.bincount(codes, minlength=len(centres))
        assert counts.all()
        centres = np.stack([vectors[codes == k].mean(0) for k in range(len(centres))])
    return centres, counts


def test_kmeans_against_brute_force_in_float64():
    vectors = np.random.default_rng(0).standard_normal((600, 3))
    pieces = [(torch.from_numpy(vectors)[:250], 0), (torch.from_numpy(vectors)[250:], 250)]
    (quantizer,) = levels_of("ema", size=9, dim=3)
    centres = kmeans(pieces, 600, quantizer, seed=0)
    start = vectors[draw_rows(9, 600, seed=0).numpy()]
    expected, _ = lloyd(vectors, start, KMEANS_ITERATIONS)
    np.testing.assert_allclose(centres, expected, rtol=1e-10)
    assert np.abs(start - expected).max() > 0.1


def test_kmeans_finds_well_separated_clusters():
    middles = 100 * torch.eye(6, dtype=torch.float64)
    vectors = middles.repeat_interleave(50, 0) + 0.1 * torch.randn(300, 6, dtype=torch.float64)
    (quantizer,) = levels_of("ema", size=6, dim=6)
    centres = kmeans([(vectors, 0)], 300, quantizer, seed=5)
    torch.testing.assert_close(centres, vectors.view(6, 50, 6).mean(1), rtol=1e-10, atol=1e-10)


def test_the_centres_of_a_cosine_codebook_lie_on_the_sphere():
    (quantizer,) = levels_of("cosine", size=6, dim=3)
    vectors = quantizer.project(torch.randn(300, 3, dtype=torch.float64), 1)
    centres = kmeans([(vectors, 0)], 300, quantizer, seed=0)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(6, dtype=torch.float64))
    # the best directions: every centre is that of the sum of what has the largest cosine with it
    codes = (vectors @ centres.T).argmax(1)
    sums = torch.zeros(6, 3, dtype=torch.float64).index_add_(0, codes, vectors)
    assert (quantizer.project(sums, 1) * centres).sum(1).min() > 0.99


def test_empty_clusters_start_anew_from_the_data():
    """Four of five initial rows are one and the same vector."""
    same = torch.full((400, 2), 50.0, dtype=torch.float64)
    spread = 50 + 10 * torch.randn(100, 2, dtype=torch.float64)
    (quantizer,) = levels_of("ema", size=20, dim=2)
    centres = kmeans([(torch.cat([same, spread]), 0)], 500, quantizer, seed=0)
    assert len(centres.unique(dim=0)) > 8  # 5 rows were distinct
    assert centres.min() > 5  # an empty cluster's mean would be 0


def test_kmeans_with_fewer_vectors_than_codes():
    (quantizer,) = levels_of("ema", size=8, dim=2)
    vectors = torch.randn(3, 2, dtype=torch.float64)
    centres = kmeans([(vectors, 0)], 3, quantizer, seed=0)
    assert centres.isfinite().all()
    assert (centres[:, None] == vectors).all(-1).any(1).all()  # nothing but the vectors


# The start.


def tiny_model(*quantizers, sizes=(12,)):
    """A float64 model, so that the cut of a batch shows in the last digits only."""
    torch.manual_seed(0)
    config = VQVAEConfig(
        ratios=(2, 2, 4)[-len(quantizers) :], codebook_size=sizes, quantizer=quantizers, **SMALL
    )
    return VQVAE(config).double()


def images_of(count, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def parts_of(images, num_batches, rank, world_size):
    """This rank's parts of the global batches, as the loader cuts them."""
    batches = images.chunk(num_batches)
    size = len(batches[0])
    first = size * rank // world_size
    return [
        Part(batch.chunk(world_size)[rank], number * size + first)
        for number, batch in enumerate(batches)
    ]


@pytest.mark.parametrize("quantizers", [("ema", "cosine", "learned"), ("ema", "fsq")])
def test_the_start_does_not_depend_on_the_number_of_ranks(quantizers, monkeypatch):
    images, model = images_of(24), tiny_model(*quantizers)
    found = {}
    for world_size in (1, 2, 4):
        ranks = Ranks(world_size, monkeypatch)

        def start(rank, world_size=world_size):
            own = copy.deepcopy(model)
            start_codebooks(own, parts_of(images, 3, rank, world_size), batch_size=8)
            return states(own.quantizers)

        all_states = ranks.run(start)
        for one in all_states[1:]:  # bit for bit on all ranks of a run
            assert_close_states(one, all_states[0], rtol=0, atol=0)
        found[world_size] = all_states[0]
    assert_close_states(found[2], found[1], rtol=1e-9, atol=1e-11)
    assert_close_states(found[4], found[1], rtol=1e-9, atol=1e-11)
    for level, before in enumerate(states(model.quantizers)):
        for name, tensor in found[1][level].items():
            placed = name not in ("moves",) and quantizers[level] != "fsq"
            assert torch.equal(tensor, before[name]) != placed, (level, name)


def test_the_start_is_kmeans_of_each_level_after_the_coarser_ones():
    """In any other order the finer latents would still be conditioned on random codes."""
    model, images = tiny_model("ema", "cosine", "learned"), images_of(24)
    start_codebooks(model, parts_of(images, 3, 0, 1), batch_size=8)
    with torch.no_grad():
        outputs = model.encode(images)
    for level, (quantizer, output) in enumerate(zip(model.quantizers, outputs, strict=True)):
        vectors = output.vectors.flatten(0, 2)
        centres = kmeans([(vectors, 0)], len(vectors), quantizer, seed=level)
        torch.testing.assert_close(quantizer.vectors_of_codes().detach(), centres)
        # as fresh ones: just above the threshold, whatever k-means counted
        share = len(vectors) / 3 / quantizer.num_codes
        fresh = torch.full_like(quantizer.counts, 1.1 * quantizer.revival * share)
        torch.testing.assert_close(quantizer.counts, fresh)
        if isinstance(quantizer, EMAQuantizer):
            torch.testing.assert_close(quantizer.sums, centres * quantizer.counts[:, None])


def test_the_start_uses_the_codes_well():
    model, images = tiny_model("ema", "ema"), images_of(64)

    def shares_of_variance():
        with torch.no_grad():
            return [float(o.error / o.vectors.var((0, 1, 2)).mean()) for o in model.encode(images)]

    before = shares_of_variance()
    start_codebooks(model, parts_of(images, 4, 0, 1), batch_size=16)
    after = shares_of_variance()
    assert all(b < 0.6 < a for a, b in zip(before, after, strict=True))


def test_enough_images_for_every_level():
    def images(sizes, vectors, names=("ema", "learned")):
        pairs = zip(names, sizes, strict=True)
        made = [make_quantizer(name, k, 4, 0.9, 0.1, "straight_through") for name, k in pairs]
        return num_start_images(made, vectors)

    assert images([512, 512], [64, 256]) == 320  # 40 vectors per code at the coarsest
    assert images([16, 4096], [64, 256]) == 640
    assert images([3], [1000], ["ema"]) == 1
    assert images([512, 64], [64, 256], ["fsq", "ema"]) == 10  # no codes are placed at level 0
    assert images([512], [64], ["simvq"]) == 0


# Statistics and commits.


def observed(quantizers, latents, cuts=1, first_image=0, batch_size=8, images_seen=64):
    """Codebooks that saw a batch in so many micro-batches."""
    codes = Codebooks(quantizers, batch_size)
    for part in zip(*[level.chunk(cuts) for level in latents], strict=True):
        codes.observe(outputs_of(quantizers, part), first_image, images_seen)
        first_image += len(part[0])
    return codes


@pytest.mark.parametrize("cuts", [2, 4, 8])
def test_micro_batches_equal_one_batch(cuts):
    quantizers = levels_of(*PLACED, decay=0.5, revival=0.9)
    whole, parts = quantizers, copy.deepcopy(quantizers)
    latents = batch_of_latents()
    revived = [
        observed(whole, latents).commit(),
        observed(parts, latents, cuts).commit(),
    ]
    assert torch.equal(*revived) and revived[0].min() > 0
    assert_close_states(states(whole), states(parts))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("cuts", [1, 2])
def test_ranks_equal_one_process(world_size, cuts, monkeypatch):
    alone = levels_of(*PLACED, decay=0.5, revival=0.9)
    initial, latents = copy.deepcopy(alone), batch_of_latents()
    expected = observed(alone, latents).commit()
    ranks = Ranks(world_size, monkeypatch)

    def step(rank):
        own = copy.deepcopy(initial)
        part = [level.chunk(world_size)[rank] for level in latents]
        codes = observed(own, part, cuts, first_image=8 * rank // world_size)
        codes.start_reduction()
        revived = codes.commit()
        codes.check_equal()
        return revived, states(own)

    for revived, found in ranks.run(step):
        assert torch.equal(revived, expected)
        assert_close_states(found, states(alone))
    assert ranks.sizes == [3 * (16 + 16 * 4 + 16 * 4)]  # all levels in one flat reduction


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_discarded_batch_is_forgotten(world_size, monkeypatch):
    initial, latents = levels_of(*PLACED), batch_of_latents()
    ranks = Ranks(world_size, monkeypatch)

    def step(rank, skips):
        own = copy.deepcopy(initial)
        codes = Codebooks(own, 8)
        if skips:
            for reduces in (False, True):
                bad = [torch.full_like(level, torch.nan) for level in latents]
                codes.observe(outputs_of(own, bad), 0, 0)
                if reduces:
                    codes.start_reduction()
                codes.discard()
            assert_close_states(states(own), states(initial), rtol=0, atol=0)
        codes.observe(outputs_of(own, latents), 0, 64)
        codes.start_reduction()
        codes.commit()
        return states(own)

    # a discarded reduction may or may not be waited for, but on all ranks alike
    with_skips, without = (ranks.run(lambda r, s=s: step(r, s))[0] for s in (True, False))
    assert_close_states(with_skips, without, rtol=0, atol=0)


def test_a_commit_forgets_its_batch():
    quantizers, latents = levels_of(*PLACED), batch_of_latents()
    codes = observed(quantizers, latents)
    codes.commit()
    again = copy.deepcopy(quantizers)
    outputs = outputs_of(quantizers, latents)
    codes.observe(outputs, 0, 128)
    codes.commit()
    fresh = Codebooks(again, 8)
    fresh.observe(outputs, 0, 128)
    fresh.commit()
    assert_close_states(states(quantizers), states(again), rtol=0, atol=0)


def test_a_commit_of_nothing_fails_and_changes_nothing():
    quantizers, latents = levels_of(*PLACED), batch_of_latents()
    codes = observed(quantizers, latents)
    codes.commit()
    before = states(quantizers)
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        codes.commit()
    assert_close_states(states(quantizers), before, rtol=0, atol=0)


def test_levels_without_placed_codes_are_passed_over():
    quantizers = levels_of("fsq", "ema", "simvq")
    before = states(quantizers)
    revived = observed(quantizers, batch_of_latents()).commit()
    assert revived.tolist() == [0, 0, 0]
    after = states(quantizers)
    for level, changes in enumerate((False, True, False)):
        same = all(torch.equal(after[level][name], before[level][name]) for name in before[level])
        assert same != changes
    none = levels_of("fsq", "simvq", "fsq")
    codes = observed(none, batch_of_latents())
    codes.start_reduction()
    codes.check_equal()
    assert codes.commit().tolist() == [0, 0, 0]


@pytest.mark.parametrize("names", [("fsq", "simvq"), ("fsq", "ema")])
def test_the_counts_of_revived_codes_are_on_the_device_of_the_model(names):
    """Else a model without placed codes could not be trained on a GPU."""
    quantizers = [quantizer.to("meta") for quantizer in levels_of(*names)]
    assert Codebooks(quantizers, 8).device.type == "meta"


def test_the_batch_size_is_that_of_the_decay():
    quantizers, latents = levels_of("ema", decay=0.5), batch_of_latents()[:1]
    observed(quantizers, latents, batch_size=64).commit()
    # 64 of the 128 images that the decay is given for
    assert quantizers[0].counts.sum() == pytest.approx(0.5**0.5 * 16 + (1 - 0.5**0.5) * 48)


# Revival.


@pytest.mark.parametrize("name", PLACED)
def test_revived_codes_come_from_the_batch_with_their_statistics_reset(name):
    quantizers, latents = levels_of(name, size=8, decay=0.5, revival=0.5), batch_of_latents()[1:2]
    (quantizer,) = quantizers
    far = torch.zeros(8, dtype=torch.bool)
    far[5:] = True
    with torch.no_grad():
        if isinstance(quantizer, CosineQuantizer):
            centre = torch.tensor([10.0, 0, 0, 0], dtype=torch.float64)
            latents = [level + centre[:, None, None] for level in latents]
            away = -centre.expand(8, 4)
        else:
            away = torch.full((8, 4), 1000.0, dtype=torch.float64)
        quantizer.place(far, away, torch.full((8,), 1e-6, dtype=torch.float64))
    output = quantizer(latents[0])
    counts = output.codes.flatten().bincount(minlength=8)
    expected = (0.5 ** (8 / 128) * quantizer.counts + (1 - 0.5 ** (8 / 128)) * counts) < (
        0.5 * counts.sum() / 8
    )
    assert expected[far].all()
    codes = Codebooks(quantizers, 8)
    codes.observe([output], 0, images_seen=64)
    revived = codes.commit()
    assert revived.tolist() == [int(expected.sum())]
    rows = draw_rows(8, output.codes.numel(), seed=64)
    vectors = output.vectors.flatten(0, 2)[rows]
    table = quantizer.vectors_of_codes().detach()
    torch.testing.assert_close(table[expected], vectors[expected], rtol=0, atol=1e-12)
    assert len(table.unique(dim=0)) == 8  # not two at one place
    fresh = (1.1 * 0.5 * counts.sum() / 8).double()
    torch.testing.assert_close(quantizer.counts[expected], fresh.expand(int(expected.sum())))
    if isinstance(quantizer, EMAQuantizer):
        torch.testing.assert_close(quantizer.sums[expected], fresh * vectors[expected])


def test_codes_far_away_come_back_and_do_not_when_they_may_not():
    for revive in (True, False):
        (quantizer,) = levels_of("ema", size=8, decay=0.5, revival=0.1)
        with torch.no_grad():
            far = torch.arange(8) >= 5
            place = torch.full((8, 4), 1000.0, dtype=torch.float64)
            quantizer.place(far, place, torch.ones(8, dtype=torch.float64))
        total = 0
        for step in range(40):
            codes = Codebooks([quantizer], 128)
            latents = torch.randn(8, 4, 6, 6, dtype=torch.float64)
            codes.observe([quantizer(latents)], 0, images_seen=128 * step)
            total += int(codes.commit(revive))
        assert (quantizer.codebook.abs().max() < 10) == revive
        assert (total >= 3) == revive and (total == 0) != revive
        torch.testing.assert_close(quantizer.sums / quantizer.counts[:, None], quantizer.codebook)


def test_one_vector_in_the_whole_batch():
    quantizers = levels_of(*PLACED, decay=0.5, revival=0.5)
    latents = [torch.randn(1, 4, 1, 1, dtype=torch.float64)] * 3
    for step in range(5):
        codes = Codebooks(quantizers, 1)
        codes.observe(outputs_of(quantizers, latents), 0, step)
        codes.commit()
    for state in states(quantizers):
        assert all(tensor.isfinite().all() for tensor in state.values())


# Passes that must not count.


@pytest.mark.parametrize("name", PLACED)
def test_activation_checkpointing_gives_the_same_step(name):
    """The backward pass runs the model a second time; an EMA inside the forward pass would move
    twice."""
    initial, images = tiny_model(name, name).train(), images_of(8)
    found = []
    for saves_memory in (False, True):
        model = copy.deepcopy(initial)
        codes = Codebooks(model.quantizers, 8)
        output = checkpoint(model, images, use_reentrant=False) if saves_memory else model(images)
        codes.observe(output.levels, 0, 0)
        codes.start_reduction()
        loss(output, images, 0.1, 0.25)[0].backward()
        codes.commit()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        found.append((states(model.quantizers), [gradients]))
    for one, other in zip(*found, strict=True):
        assert_close_states(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", PLACED)
def test_eval_mode_cannot_change_anything(name):
    """Neither the state, nor the step that is under way."""
    initial, images = tiny_model(name, name), images_of(8)

    def step(looks):
        model = copy.deepcopy(initial).train()
        codes = Codebooks(model.quantizers, 8)
        codes.observe(model(images).levels, 0, 0)
        if looks:
            before = copy.deepcopy(model.state_dict())
            model.eval()
            other = images_of(3, seed=9)
            with torch.no_grad():
                model.decode_codes(model.encode_codes(other))
                model(other)
            for key, tensor in model.state_dict().items():
                assert torch.equal(tensor, before[key]), key
            model.train()
        codes.commit()
        return states(model.quantizers)

    assert_close_states(step(looks=True), step(looks=False), rtol=0, atol=0)


# Comparison of ranks.


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("tensor", ["anchors", "moves", "counts"])
def test_a_codebook_that_differs_is_named_on_every_rank(world_size, tensor, monkeypatch):
    initial, ranks = levels_of("ema", "fsq", "learned"), Ranks(world_size, monkeypatch)

    def compare(rank, differs):
        own = copy.deepcopy(initial)
        if rank == differs:
            with torch.no_grad():
                value = own[2].state_dict()[tensor]
                value.view(-1)[3] = torch.nextafter(value.view(-1)[3], torch.tensor(9.0).double())
        try:
            Codebooks(own, 8).check_equal()
        except RuntimeError as error:
            return str(error)
        return None

    assert ranks.run(lambda rank: compare(rank, None)) == [None] * world_size
    messages = set(ranks.run(lambda rank: compare(rank, world_size - 1)))
    (message,) = messages  # all the same, so that all ranks stop
    assert "level 2" in message and f"{world_size - 1}" in message
    if world_size > 2:  # of two, nobody can tell which one is wrong
        assert f"on rank {world_size - 1} differs" in message


def test_several_differing_ranks_are_named(monkeypatch):
    initial, ranks = levels_of("ema"), Ranks(5, monkeypatch)

    def compare(rank):
        own = copy.deepcopy(initial)
        if rank in (1, 4):
            own[0].codebook[0] += rank
        with pytest.raises(RuntimeError, match=r"level 0 on ranks? 1, 4 "):
            Codebooks(own, 8).check_equal()

    ranks.run(compare)


def _in_a_process(rank, world_size, store, latents, initial, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    try:
        quantizers = copy.deepcopy(initial)
        part = [level.chunk(world_size)[rank] for level in latents]
        codes = observed(quantizers, part, cuts=2, first_image=8 * rank // world_size)
        codes.start_reduction()
        revived = codes.commit()
        codes.check_equal()
        torch.save((revived, states(quantizers)), results / f"{rank}.pt")
        if rank == 1:
            quantizers[1].codebook[0, 0] += 1e-6
        with pytest.raises(RuntimeError, match="the codebook of level 1 on rank"):
            codes.check_equal()
        torch.distributed.barrier()  # no rank takes its side down while the other still talks
    finally:
        torch.distributed.destroy_process_group()


def test_two_real_processes_equal_one(tmp_path):
    initial, latents = levels_of(*PLACED, decay=0.5, revival=0.9), batch_of_latents()
    alone = copy.deepcopy(initial)
    expected = observed(alone, latents, cuts=4).commit()
    arguments = (2, tmp_path / "store", latents, initial, tmp_path)
    multiprocessing.spawn(_in_a_process, arguments, nprocs=2)
    for rank in range(2):
        revived, found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(revived, expected)
        assert_close_states(found, states(alone))


# Use.


def test_the_use_of_codes_is_over_all_ranks_and_one_window(monkeypatch):
    ranks = Ranks(2, monkeypatch)

    def report(rank):
        use = CodebookUse([4, 8], torch.device("cpu"))
        # level 0: each rank its own two codes; level 1: all to code 7
        own = torch.tensor([2 * rank, 2 * rank + 1]).view(1, 1, 2)
        for _ in range(3):
            use.add([own, torch.full((1, 2, 2), 7)], torch.tensor([1, 0]))
        return use.values(), use.values()

    for first, second in ranks.run(report):
        assert first["codebook/level0/perplexity"] == pytest.approx(4)
        assert first["codebook/level0/unused_fraction"] == 0
        assert first["codebook/level0/revived"] == 3
        assert first["codebook/level1/perplexity"] == pytest.approx(1)
        assert first["codebook/level1/unused_fraction"] == 7 / 8
        assert first["codebook/level1/revived"] == 0
        assert second["codebook/level0/unused_fraction"] == 1
        assert second["codebook/level0/revived"] == 0


def test_what_is_placed_is_what_is_moved_by_statistics():
    for name in ("ema", "cosine", "learned", "simvq", "fsq"):
        (quantizer,) = levels_of(name)
        assert isinstance(quantizer, PlacedCodes) == (name in PLACED)
