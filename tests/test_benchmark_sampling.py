"""benchmarks/sampling.py lets nobody be timed who disagrees, and extrapolates fairly."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sampling
from sampling import METHODS, PARTS, check, make_samplers, shortfall, timed_steps

from pipeline.models.priors.noise import gumbel_noise, image_keys
from pipeline.models.priors.prior import PriorConfig

CONFIG = PriorConfig(
    channels=8, layers=2, kernel_size=3, condition_layers=1, grid=(3, 5), codebook_size=11,
    coarser_codebook_sizes=(7,), num_attributes=4,
)  # fmt: skip


class Faulty:
    """A network with a fault at one step."""

    def __init__(self, network, fault: str):
        self.network, self.fault, self.slope = network, fault, network.slope

    def logits(self, positions):
        logits = self.network.logits(positions)
        if self.fault == "off" and 14 in positions:
            logits[-1, -1, 3] += 2e-4
        if self.fault == "nan" and 14 in positions:
            logits[0, 0, 0] = torch.nan
        return logits

    def tell(self, positions, codes):
        if self.fault == "forgets" and 6 in positions:
            codes = (codes + 1) % CONFIG.codebook_size
        self.network.tell(positions, codes)


def test_samplers_that_agree_are_let_through():
    columns = check(make_samplers(CONFIG, 2, "cpu", bf16=True))
    for name, row in columns.items():
        if name.endswith("-bf16"):
            assert 1e-4 < row["max_logit_diff"] < 0.5
        else:
            assert row["max_logit_diff"] < 1e-5
            assert row["mismatch"] == 0
    assert columns.keys() == METHODS.keys() | {f"{name}-bf16" for name in METHODS}


@pytest.mark.parametrize("fault", ["off", "nan", "forgets"])
@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_disagrees_is_refused(name, fault, monkeypatch, capsys):
    right = sampling.make_network

    def wrong(model, condition, method):
        network = right(model, condition, method)
        return Faulty(network, fault) if method == METHODS[name] else network

    monkeypatch.setattr(sampling, "make_network", wrong)
    with pytest.raises(SystemExit) as stop:
        check(make_samplers(CONFIG, 2, "cpu", bf16=False))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"{name}: logits are wrong by")


@pytest.mark.parametrize("name", ["raster-cached", "ours"])
def test_a_call_that_draws_another_code_is_refused(name, monkeypatch, capsys):
    right = sampling.sample_codes

    def wrong(*args, method):
        sampled = right(*args, method=method)
        if method == METHODS[name]:
            sampled.codes[1, 2, 4] = (sampled.codes[1, 2, 4] + 1) % CONFIG.codebook_size
        return sampled

    monkeypatch.setattr(sampling, "sample_codes", wrong)
    with pytest.raises(SystemExit):
        check(make_samplers(CONFIG, 2, "cpu", bf16=False))
    assert capsys.readouterr().err.startswith(f"{name}: drew codes")


def test_how_far_a_code_is_from_the_best():
    keys, positions = image_keys(0, torch.arange(2), 0), torch.tensor([3, 8])
    perturbed = torch.tensor([1.0, 4.0, 3.9999, -2.0])
    logits = perturbed - gumbel_noise(keys, positions, 4)
    codes = torch.tensor([[1, 2], [0, 3]])
    torch.testing.assert_close(
        shortfall(codes, logits, positions, keys), torch.tensor([[0, 1e-4], [3, 6]]),
        atol=1e-6, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("size", [8, 16, 64])
def test_slices_stand_for_the_whole_call(size):
    count = size * size
    costs = {
        "naive": [size] * count,
        "rows-above": [1 + number // size for number in range(count)],
        "raster": [1] * count,
    }
    for method, cost in costs.items():
        found = sum(weight * cost[number] for number, weight in timed_steps(count, PARTS[method]))
        assert found == pytest.approx(sum(cost), rel=1 / count)
    sizes = [len(front) for front in sampling.fronts((size, size), 3)]
    found = sum(weight * sizes[n] for n, weight in timed_steps(len(sizes), PARTS["wavefront"]))
    assert found == pytest.approx(count, rel=0.05)
