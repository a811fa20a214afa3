"""The stacked VAEs and IWAEs of benchmarks/iwae_mnist.py: against separate models, numerical
integration, and runs without an interruption. Tiny ones: P = 6 pixels, D = 2 latents."""

import gzip
import json
import math
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import iwae_mnist
from iwae_mnist import Group, Stack, Trained, active_units, evaluate, learning_rate, train

from pipeline.data import idx
from pipeline.stage import UserError

PIXELS = 6


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(iwae_mnist, "HIDDEN", 5)
    monkeypatch.setattr(iwae_mnist, "LATENTS", 2)


def random_images(count: int = 40, pixels: int = PIXELS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (count, pixels), np.uint8))


def random_bits(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(0, 2, (count, PIXELS))).double()


def lively_stack() -> Stack:
    """Float64, two members whose posteriors are wide and depend on the image."""
    stack = Stack(torch.full((PIXELS,), 0.3), [0, 1], 5, 2).double()
    with torch.no_grad():
        for weight in stack.parameters():
            weight.mul_(1.5).add_(0.2 * torch.randn_like(weight))
        stack.log_std.weight.mul_(0.1)
        stack.log_std.bias.fill_(0.4)
        stack.mean.weight.mul_(0.5)
    return stack


class Separate(nn.Module):
    """One member as an ordinary model."""

    def __init__(self, stack: Stack, member: int):
        super().__init__()

        def linear(layer) -> nn.Linear:
            one = nn.Linear(*layer.weight.shape[1:]).double()
            one.weight.data = layer.weight[member].detach().T.clone()
            one.bias.data = layer.bias[member, 0].detach().clone()
            return one

        self.encoder = nn.Sequential(
            linear(stack.encoder1), nn.Tanh(), linear(stack.encoder2), nn.Tanh()
        )
        self.mean, self.log_std = linear(stack.mean), linear(stack.log_std)
        self.decoder = nn.Sequential(
            linear(stack.decoder1), nn.Tanh(), linear(stack.decoder2), nn.Tanh(),
            linear(stack.logits),
        )  # fmt: skip

    def posterior(self, images: torch.Tensor) -> Normal:
        hidden = self.encoder(images)
        return Normal(self.mean(hidden), self.log_std(hidden).exp())

    def log_joint(self, images: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        likelihood = Bernoulli(logits=self.decoder(latents)).log_prob(images).sum(-1)
        return likelihood + Normal(0, 1).log_prob(latents).sum(-1)

    def log_weights(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """images (B, P), noise (k, B, D) -> (k, B)."""
        posterior = self.posterior(images)
        latents = posterior.mean + posterior.stddev * noise
        return self.log_joint(images, latents) - posterior.log_prob(latents).sum(-1)


def test_a_stack_trains_like_separate_models() -> None:
    group = Group(3, random_images(), seeds=(4, 9))
    group.stack.double()
    separate = [Separate(group.stack, member) for member in range(4)]
    adams = [torch.optim.Adam(model.parameters(), eps=1e-4) for model in separate]
    for update in range(1, 6):
        rate = 1e-2 / update
        images, noise = (part.double() for part in group.draw(update))
        found = group.step(images, noise, rate)
        for member, (model, adam) in enumerate(zip(separate, adams, strict=True)):
            weights = model.log_weights(images[member], noise[member].transpose(0, 1))
            bound = weights.mean(0) if member < 2 else weights.exp().mean(0).log()
            torch.testing.assert_close(found[member], bound.detach(), rtol=1e-12, atol=1e-12)
            adam.param_groups[0]["lr"] = rate
            adam.zero_grad()
            (-bound).sum().backward()
            adam.step()
    for member, model in enumerate(separate):
        trained = Separate(group.stack, member).state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(trained[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


def test_estimates_agree_with_integrals_over_the_latents(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(iwae_mnist, "NUM_SAMPLES", 20_000)
    stack, images = lively_stack(), random_bits(4)
    found = evaluate(stack, images, tmp_path / "evaluation")
    axis = torch.linspace(-9, 9, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_area = 2 * math.log(float(axis[1] - axis[0]))
    with torch.no_grad():
        for member in range(2):
            model = Separate(stack, member)
            for row, image in enumerate(images):
                joint = model.log_joint(image, grid) + log_area
                posterior = model.posterior(image).log_prob(grid).sum(-1) + log_area
                weight, q = joint - posterior, posterior.exp()
                assert float(q.sum()) == pytest.approx(1, abs=1e-6)
                exact = float(joint.logsumexp(0))
                relative_variance = float(((weight - exact).exp().square() * q).sum()) - 1
                error = 5 * math.sqrt(relative_variance / 20_000)
                assert float(found[row, 0, member]) == pytest.approx(exact, abs=error)
                assert error < 0.1
                elbo = float((q * weight).sum())
                error = 5 * math.sqrt(float((q * (weight - elbo).square()).sum()) / 20_000)
                assert float(found[row, 1, member]) == pytest.approx(elbo, abs=error)
                assert exact - elbo > 2 * error  # else the two could be mistaken for each other


def test_the_published_schedule() -> None:
    assert iwae_mnist.num_passes(8) == 3280
    rates = [learning_rate(passes) for passes in range(3280)]
    counts = [rates.count(rate) for rate in sorted(set(rates), reverse=True)]
    assert counts == [3**i for i in range(8)]
    assert (rates[0], rates[-1]) == pytest.approx((1e-3, 1e-4), rel=1e-12)
    assert rates[3] / rates[4] == pytest.approx(10 ** (1 / 7), rel=1e-12)


def test_a_member_does_not_depend_on_those_beside_it() -> None:
    pair, alone = (Group(5, random_images(), seeds) for seeds in ((0, 7), (7,)))
    for group in (pair, alone):
        group.stack.double()
        for update in range(1, 5):  # into the second pass
            group.step(*(part.double() for part in group.draw(update)), 1e-3)
    for name, tensor in pair.stack.state_dict().items():
        own = alone.stack.state_dict()[name]
        torch.testing.assert_close(tensor[[1, 3]], own, rtol=1e-12, atol=1e-12, msg=name)
        if name.endswith("weight"):
            assert not torch.isclose(tensor[0], tensor[1]).any()
            assert not torch.equal(tensor[1], tensor[3])
    images, noise = pair.draw(1)
    for part in (images, noise):
        assert torch.equal(part[:2], part[2:]) and not torch.equal(part[0], part[1])


def test_every_pass_has_all_images_in_a_new_order() -> None:
    bits = (np.arange(60)[:, None] >> np.arange(PIXELS)) & 1
    group = Group(1, torch.from_numpy((255 * bits).astype(np.uint8)), seeds=(2,))
    numbers = [group.draw(update)[0][0] @ 2.0 ** torch.arange(6) for update in range(1, 7)]
    first, second = torch.cat(numbers[:3]), torch.cat(numbers[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(60))
    assert not torch.equal(first, second)


def test_binarization_and_noise_are_fresh_draws_of_the_right_law() -> None:
    pixels = torch.tensor([0, 1, 60, 128, 254, 255], dtype=torch.uint8)
    group = Group(1, pixels.repeat(20, 1), seeds=(1,))
    draws = [group.draw(update) for update in range(1, 301)]
    images = torch.cat([images[0] for images, _ in draws])
    assert set(images.unique().tolist()) == {0.0, 1.0}
    probability = pixels.double() / 255
    error = (images.double().mean(0) - probability).abs()
    assert bool((error <= 4.5 * (probability * (1 - probability) / len(images)).sqrt()).all())
    noise = torch.cat([noise[0] for _, noise in draws]).flatten().numpy()
    assert len(np.unique(noise)) > 0.99 * len(noise)
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-4


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    checkpoint = iwae_mnist.Checkpoints(out).newest()
    return {
        f"{part}.{name}": tensor
        for part in ("model", "optimizer")
        for name, tensor in checkpoint.tensors(part).items()
    }


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch) -> None:
    whole = train(Group(5, random_images()), 3, tmp_path / "whole")
    assert whole.images_seen == 13 * 40 and whole.sec > 0 < whole.cpu_sec

    class Interrupted(Group):
        def step(self, images, noise, learning_rate):
            calls.append(learning_rate)
            if len(calls) == 12:
                raise KeyboardInterrupt
            return super().step(images, noise, learning_rate)

    calls, out = [], tmp_path / "broken"
    monkeypatch.setattr(iwae_mnist, "SAVE_EVERY_SEC", 0)
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted(5, random_images()), 3, out)
    assert calls == [learning_rate(0)] * 2 + [learning_rate(1)] * 6 + [learning_rate(4)] * 4
    kept = sorted((out / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["images-000000200", "images-000000220"]
    shutil.rmtree(kept[-1])  # one update is made again
    resumed = train(Group(5, random_images()), 3, out)
    assert resumed.images_seen == whole.images_seen
    expected = tensors_of(tmp_path / "whole")
    assert len(expected) == 14 + 3 * 14
    for name, tensor in tensors_of(out).items():
        assert torch.equal(tensor, expected[name]), name

    again = Group(5, random_images())
    assert train(again, 3, out) == resumed  # nothing left to do, and the model is there
    assert torch.equal(again.stack.mean.weight, expected["model.mean.weight"])


def test_more_stages_go_on_and_fewer_or_other_seeds_are_refused(tmp_path) -> None:
    train(Group(1, random_images()), 2, tmp_path / "whole")
    train(Group(1, random_images()), 1, tmp_path / "staged")
    train(Group(1, random_images()), 2, tmp_path / "staged")
    expected = tensors_of(tmp_path / "whole")
    for name, tensor in tensors_of(tmp_path / "staged").items():
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(UserError, match="trained beyond --stages 1"):
        train(Group(1, random_images()), 1, tmp_path / "staged")
    with pytest.raises(UserError, match=r"seeds \(was \[0, 1, 2\], now \[5\]\)"):
        train(Group(1, random_images(), seeds=(5,)), 2, tmp_path / "staged")


def test_a_diverged_run_ends_and_is_not_saved(tmp_path) -> None:
    group = Group(1, random_images())
    group.stack.mean.bias.data[2, 0, 1] = math.inf
    with pytest.raises(UserError, match="k=1 diverged"):
        train(group, 1, tmp_path)
    assert not list(tmp_path.rglob("images-*"))


def test_an_evaluation_goes_on_with_more_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(iwae_mnist, "NUM_SAMPLES", 30)
    stack, images = lively_stack(), random_bits(5)
    images[1] = images[0]
    whole = evaluate(stack, images, tmp_path / "whole")
    assert not torch.isclose(whole[0], whole[1]).any()  # each image meets its own noise
    assert torch.equal(evaluate(stack, images[:2], tmp_path / "part"), whole[:2])
    assert torch.equal(evaluate(stack, images, tmp_path / "part"), whole)
    monkeypatch.setattr(iwae_mnist, "importance_log_likelihood", None)  # nothing is computed anew
    assert torch.equal(evaluate(stack, images[:3], tmp_path / "part"), whole[:3])


def test_active_units() -> None:
    stack, images = lively_stack(), random_bits(50)
    with torch.no_grad():
        spread = Separate(stack, 0).posterior(images).mean.numpy().var(0)
        # member 0: variances just above and just below 0.01; member 1: a unit that never moves
        stack.mean.weight[0] *= torch.from_numpy(np.sqrt(np.array([0.0101, 0.0099]) / spread))
        stack.mean.weight[1, :, 0] = 0
    assert active_units(stack, images).tolist() == [1, 1]


def test_the_table() -> None:
    group = Group(5, random_images(), seeds=(0, 1))
    values = np.random.default_rng(0).normal(90, 5, (7, 2, 4))  # images, estimates, members
    active = torch.tensor([1, 2, 3, 4])
    trained = Trained(0, 7200.0, 3600.0)
    vae, iwae = iwae_mnist.table(group, trained, torch.from_numpy(-values), active)
    assert (vae["model"], iwae["model"]) == ("VAE", "IWAE")
    assert vae["nll_of_seeds"] == pytest.approx(values[:, 0, :2].mean(0), abs=0.0051)
    assert iwae["nll"] == pytest.approx(values[:, 0, 2:].mean())
    assert iwae["negative_elbo"] == pytest.approx(values[:, 1, 2:].mean())
    per_image = values[:, 0].reshape(7, 2, 2).mean(-1)
    assert vae["standard_error"] == pytest.approx(scipy.stats.sem(per_image[:, 0]))
    gain = per_image[:, 0] - per_image[:, 1]
    assert iwae["gain"] == pytest.approx(gain.mean()) == pytest.approx(vae["nll"] - iwae["nll"])
    assert iwae["gain_standard_error"] == pytest.approx(scipy.stats.sem(gain))
    assert (vae["active_units"], iwae["active_units"]) == ([1, 2], [3, 4])
    assert (iwae["published"], iwae["published_active_units"]) == (85.54, 22)
    assert (vae["hours"], vae["cpu_hours"]) == (2, 1) and "gain" not in vae


def write_mnist(root: Path) -> list[str]:
    """Files of 40 and 12 images of noise; returns the flags that name them."""
    root.mkdir()
    for part, count in (("train", 40), ("t10k", 12)):
        pixels = random_images(count, 784).numpy().tobytes()
        data = gzip.compress(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(data)
    folder = str(root.parent)
    return ["--data", str(root), "--out", f"{folder}/out", "--json", f"{folder}/figures.json"]


def test_the_script_from_files_to_figures(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(iwae_mnist, "NUM_SAMPLES", 8)
    flags = [*write_mnist(tmp_path / "mnist"), "--stages", "1", "--test_images", "3"]
    iwae_mnist.main(flags)
    document = json.loads((tmp_path / "figures.json").read_text())
    rows = {(row["model"], row["k"]): row for row in document["rows"]}
    assert rows.keys() == iwae_mnist.PUBLISHED.keys()
    assert rows["VAE", 1] == rows["IWAE", 1] | {"model": "VAE"}
    assert len(tensors_of(tmp_path / "out" / "k1")["model.mean.bias"]) == 3  # trained once
    for (_, k), row in rows.items():
        assert row["nll"] < row["negative_elbo"] and len(row["active_units"]) == 3
        assert ("gain" in row) == (row["model"] == "IWAE" and k > 1)
    assert document["environment"]["passes"] == 1 and document["environment"]["test_images"] == 3
    assert "1 passes, 3 test images" in capsys.readouterr().out

    monkeypatch.setattr(Group, "step", None)  # a finished run is not trained again
    iwae_mnist.main([*flags, "--k", "5"])
    again = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert again == [rows["VAE", 5], rows["IWAE", 5]]


def test_bad_input_is_refused_before_training(tmp_path, monkeypatch) -> None:
    flags = write_mnist(tmp_path / "mnist")
    monkeypatch.setattr(Group, "step", None)
    for count in ("1", "13"):
        with pytest.raises(UserError, match=r"test_images must be in 2\.\.12"):
            iwae_mnist.main([*flags, "--test_images", count])
    for wrong in (["--stages", "9"], ["--stages", "0"], ["--k", "0"]):
        with pytest.raises(SystemExit):
            iwae_mnist.main([*flags, *wrong])
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
        iwae_mnist.main(flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("MNIST_ROOT" not in os.environ, reason="MNIST_ROOT is not set")
def test_the_first_output_is_the_mean_training_image() -> None:
    images = iwae_mnist.read(Path(os.environ["MNIST_ROOT"]), "train")
    assert images.shape == (60_000, 784)
    path = idx.find(Path(os.environ["MNIST_ROOT"]), "train", "images-idx3")
    mean = idx.read_images(str(path)).reshape(60_000, 784).mean(0) / 255
    bias = Group(1, images).stack.logits.bias[2, 0].detach().numpy()
    np.testing.assert_allclose(bias, scipy.special.logit(mean.clip(0.001, 0.999)), rtol=1e-5)
