"""benchmarks/loading.py, resume.py, scaling.py: who disagrees is not timed, the formulas count."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import loading
import results
import resume
import scaling

from pipeline.data import shards
from pipeline.data.images import open_images
from pipeline.data.index import read_index
from pipeline.data.shards import ShardReader
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.training.checkpoint import training_tensors
from pipeline.training.codebooks import Codebooks
from pipeline.training.weight_average import WeightAverage


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return loading.face_shards(tmp_path_factory.mktemp("faces"), 7)


def sets_of(root):
    return [open_images(root, "train", 32, cache=cache, progress=False) for cache in (False, True)]


def test_webdataset_and_both_of_ours_have_the_same_pixels(faces):
    sets = sets_of(faces)
    samples = list(loading.usual_samples(faces, sets[0]))
    assert len(samples) == len(sets[0]) == 7
    assert samples[0][1].shape == (32, 32, 3) and samples[0][1].std() > 10
    loading.check_same_pixels(samples, 7, *sets)
    loading.check_same_pixels(samples, 3, *sets)


@pytest.mark.parametrize("fault", ["pixel", "key", "fewer", "more"])
def test_contender_with_other_images_is_refused(faces, fault):
    sets = sets_of(faces)
    samples = [list(sample) for sample in loading.usual_samples(faces, sets[0])]
    if fault == "pixel":
        samples[5][1] = samples[5][1].copy()
        samples[5][1][0, 0, 0] ^= 1
    if fault == "key":
        samples[5][0] = "another"
    if fault == "fewer":
        samples.pop()
    if fault == "more":
        samples.append(samples[0])
    with pytest.raises(SystemExit, match="image"):
        loading.check_same_pixels(samples, 8, *sets)


def test_a_turn_takes_the_given_number_of_batches():
    taken = {"webdataset": 0, "ours": 0}

    def batches(name):
        while True:
            taken[name] += 1
            yield

    ways = {"webdataset": (batches("webdataset"), 2), "ours": (batches("ours"), 6)}
    rows = loading.compare(ways, "case", rounds=3)
    assert taken["ours"] == 3 * taken["webdataset"] > 0
    assert [row["contender"] for row in rows] == ["webdataset", "ours"]
    assert rows[0]["speedup"] == 1 and rows[1]["target"] == 50


def test_simulated_shards_are_read_as_true_ones(tmp_path):
    root = resume.simulate_shards(tmp_path, 150, shard_size=50)
    index = read_index(root)
    assert index.num_samples("train") == 150 and len({s.name for s in index.shards("train")}) == 3
    first, _, last = [ShardReader(root / shard.name, shard) for shard in index.shards("train")]
    assert first.read(7) == last.read(7) != last.read(8)


def test_a_start_gives_time_and_memory(tmp_path):
    root = resume.simulate_shards(tmp_path, 70, shard_size=70)
    found = resume.first_batch(root, start=64 * 1001)
    assert found["ms"] > 0 and found["cpu_ms"] > 0 and 0 <= found["mib"] < 200


def test_a_start_opens_no_more_shards_than_its_first_batch_has(tmp_path, monkeypatch):
    root = resume.simulate_shards(tmp_path, 64_000, shard_size=100)  # 640 shards
    opened = []
    read_table = shards.read_table
    monkeypatch.setattr(shards, "read_table", lambda path: opened.append(path) or read_table(path))
    resume.first_batch(root, start=64 * 1001)
    assert 0 < len(opened) <= 64 and len(set(opened)) == len(opened)


# What follows counts what the formulas say.


def ring_all_reduce(ranks: int, size: int) -> list[int]:
    """How many elements each rank sends until all have the sums."""
    values = np.random.default_rng(0).integers(0, 100, (ranks, size))
    buffers, sent = values.copy().reshape(ranks, ranks, -1), [0] * ranks
    for first, add in ((0, True), (1, False)):  # reduce-scatter, then all-gather
        for step in range(ranks - 1):
            before = buffers.copy()
            for rank in range(ranks):
                chunk, receiver = (rank + first - step) % ranks, (rank + 1) % ranks
                sent[rank] += before[rank, chunk].size
                buffers[receiver, chunk] = before[rank, chunk] + add * before[receiver, chunk]
    assert (buffers.reshape(ranks, -1) == values.sum(0)).all()
    return sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_bytes_of_a_ring_are_what_each_rank_sends(ranks):
    assert ring_all_reduce(ranks, size=24) == [scaling.ring_bytes(24, ranks)] * ranks


def small_model() -> VQVAE:
    return VQVAE(VQVAEConfig(channels=8, residual_channels=4, codebook_size=(16,), code_dim=4))


def network_of(model: VQVAE, statistics: int = 0) -> scaling.Network:
    return scaling.Network(
        name="small", **scaling.count(model), statistics=statistics, training_flop=1e9, batch_size=8
    )


def trained(model: VQVAE) -> tuple[WeightAverage, torch.optim.Adam]:
    average = WeightAverage(model, 100)
    adam = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3, 32, 32)).reconstructions.sum().backward()
    adam.step()
    return average, adam


def test_checkpoint_and_memory_are_those_of_a_run():
    model = small_model()
    average, adam = trained(model)
    groups = training_tensors(model, average.model, adam)
    saved = sum(
        tensor.nbytes
        for group in groups.values()
        for name, tensor in group.items()
        if not name.endswith(".step")
    )
    assert scaling.checkpoint_bytes(network_of(model)) == saved

    weights = list(model.parameters())
    moments = [m for s in adam.state.values() for m in s.values() if m.ndim]
    gradients = [w.grad for w in weights if w.grad is not None]
    kept = sum(t.nbytes for t in [*weights, *average.model.parameters(), *moments, *gradients])
    own = network_of(model).parameters
    assert scaling.kept_bytes(own, 1, "ddp") == scaling.kept_bytes(own, 8, "ddp") == kept
    # the parts of all ranks are one whole: only what every rank has again is more
    for engine in ("zero1", "zero2"):
        extra = scaling.kept_bytes(own, 8, engine) - scaling.kept_bytes(own, 10**9, engine)
        parts = {"zero1": 3, "zero2": 4}[engine]
        assert 8 * extra == pytest.approx(4 * own * parts, rel=1e-6)


def test_statistics_of_the_codebooks_are_what_is_summed_over_ranks():
    model = small_model()
    codebooks = Codebooks(model.quantizers, batch_size=2)
    codebooks.observe(model(torch.rand(2, 3, 32, 32)).levels, 0, 0)
    summed = sum(part.numel() for level in codebooks.statistics for part in level)
    sizes, dim = model.config.codebook_sizes, model.config.code_dim
    assert summed == sum(codes * (1 + 2 * dim) for codes in sizes) > 0


def test_limit_of_a_step_is_its_longest_part():
    network = network_of(small_model())._replace(training_flop=1e15)
    assert scaling.step_row(network, 8)["limit"] == "compute"
    assert scaling.step_row(network, 16)["limit"] == "batch size"  # 8 images
    assert scaling.step_row(network._replace(training_flop=1.0), 8)["limit"] == "latency"
    large = network._replace(training_flop=1.0, parameters=10**9)
    assert scaling.step_row(large, 8)["limit"] == "bandwidth"


def test_backward_costs_twice_the_forward():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    inputs = torch.rand(1, 3, 8, 8, requires_grad=True)
    forward = scaling.forward_flop(layer, input=inputs)
    assert forward == 2 * 5 * 3 * 9 * 64  # multiplications and additions

    class Step(torch.nn.Module):
        def forward(self, x):
            layer(x).sum().backward()

    assert scaling.forward_flop(Step(), x=inputs) == 3 * forward


def test_the_scaling_page_is_what_template_and_figures_give():
    docs = ROOT / "docs"
    template = (docs / "scaling.template.md").read_text()
    page = results.render(template, docs / "benchmarks")
    assert page == (docs / "scaling.md").read_text(), "make results writes it anew"


def test_every_template_gives_its_page(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/small.json").write_text(json.dumps({"rows": [{"k": 5}]}))
    for name in ("one", "two"):
        text = name + ' {{ load("small").rows[0].k }}\n'
        (tmp_path / f"{name}.template.md").write_text(text)
    monkeypatch.setattr(results, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py"])
    results.main()
    for name in ("one", "two"):
        assert (tmp_path / f"{name}.md").read_text() == f"{name} 5\n"
    (tmp_path / "two.md").unlink()
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    with pytest.raises(SystemExit, match=r"two\.md"):
        results.main()
