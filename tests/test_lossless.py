"""Arithmetic coding under the priors: codes come back, at the size that the likelihood says, and
do not come back where order, condition, causality or the file are wrong."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import lossless as benchmark

from pipeline.data.images import recipe_for
from pipeline.evaluation import lossless
from pipeline.evaluation.code_likelihood import code_nats
from pipeline.extract_codes import ExtractCodes
from pipeline.extract_codes import main as extract_codes
from pipeline.models.priors import make_prior
from pipeline.models.priors.causal import CausalAttention
from pipeline.models.priors.fronts import fronts
from pipeline.models.priors.noise import image_keys
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.priors.sampling import FrontNetwork, sample_codes
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.training.checkpoint import load_model, model_sha256, read_about, save_model

KINDS = {
    "pixelcnn": {"architecture": "pixelcnn"},
    "pixelsnail": {"architecture": "pixelsnail", "attention_layers": 1},
    "pixelsnail-raster": {"architecture": "pixelsnail", "attention_layers": 1, "order": "raster"},
    "transformer": {"architecture": "transformer", "order": "raster"},
}
GRIDS, SIZES = [(2, 3), (5, 4), (7, 9)], (5, 16, 31)
RANGE_CODER = 8  # bytes of state that its last words may need


def random_priors(*kinds, sharpness=2.0, **changes):
    """Priors with random weights, coarse to fine, whose logits have this standard deviation."""
    torch.manual_seed(0)
    priors = []
    codes = [torch.randint(size, (4, *grid)) for size, grid in zip(SIZES, GRIDS, strict=True)]
    for level, kind in enumerate(kinds):
        prior = make_prior(PriorConfig(
            channels=16, layers=2, kernel_size=3, attention_channels=8, heads=2,
            condition_layers=1, num_attributes=3, num_classes=2, grid=GRIDS[level],
            codebook_size=SIZES[level], coarser_codebook_sizes=SIZES[:level],
            **{**KINDS[kind], **changes},
        ))  # fmt: skip
        for parameter in prior.parameters():  # far from those it would start with
            torch.nn.init.normal_(parameter, std=0.4)
        last = prior.head[-1] if kind == "pixelcnn" else prior.head
        with torch.no_grad():
            logits = prior.eval().logits(codes[level], prior.condition(4, codes[:level]))
            last.weight.mul_(sharpness / logits.std())
        priors.append(prior)
    return priors


def draw(priors, count, labels=None, attributes=None):
    """Codes that the priors themselves find likely."""
    codes = []
    for level, prior in enumerate(priors):
        condition = prior.condition(count, codes, labels, attributes)
        keys = image_keys(0, torch.arange(count), level)
        codes.append(sample_codes(prior, condition, keys).codes)
    return codes


def nats_in_float64(priors, codes, labels=None, attributes=None):
    """(N, levels), from the logits of the whole grid at once."""
    levels = []
    for level, prior in enumerate(priors):
        double = copy.deepcopy(prior).double()
        condition = double.condition(len(codes[0]), codes[:level], labels, attributes)
        with torch.no_grad():
            logits = double.logits(codes[level], condition).movedim(-1, 1)
        levels.append(F.cross_entropy(logits, codes[level], reduction="none").sum((1, 2)))
    return torch.stack(levels, 1)


def equal(codes, other):
    return all(torch.equal(a, b) for a, b in zip(codes, other, strict=True))


@pytest.mark.parametrize(
    "kinds",
    [
        ("pixelsnail-raster", "pixelcnn"),
        ("pixelcnn", "transformer"),
        ("transformer", "pixelsnail", "pixelcnn"),
        ("pixelcnn", "pixelsnail-raster", "pixelsnail"),
    ],
)
def test_codes_come_back_from_a_file_of_the_size_of_their_likelihood(kinds):
    priors = random_priors(*kinds)
    count = 250 if len(kinds) == 3 else 1000
    codes = draw(priors, count)
    nats = nats_in_float64(priors, codes)
    torch.testing.assert_close(code_nats(priors, codes), nats, rtol=1e-4, atol=1e-4)
    # three batches, the last one smaller
    data = lossless.encode(priors, codes, batch_size=2 * count // 5)
    back = lossless.decode(copy.deepcopy(priors), data)
    assert equal(codes, back) and all(level.dtype == torch.int64 for level in back)

    expected = float(nats.sum()) / math.log(2) / 8
    assert abs(len(data) - lossless.HEADER.size - expected) <= 0.001 * expected + RANGE_CODER
    fixed = lossless.fixed_length_bits(GRIDS[: len(kinds)], SIZES[: len(kinds)]) * count / 8
    assert 4000 < expected < 0.8 * fixed  # the bound is narrow, and the priors say much


def test_codes_come_back_under_classes_and_attributes_of_their_own():
    priors = random_priors("pixelcnn", "pixelsnail")
    labels = torch.tensor([0, 1, -1, 1, 1])
    attributes = torch.tensor([[1, 0, -1], [0, 0, 0], [-1, -1, 1], [1, 1, 1], [0, 1, 0]])
    codes = draw(priors, 5, labels, attributes)
    data = lossless.encode(priors, codes, labels, attributes, batch_size=2)
    assert equal(codes, lossless.decode(priors, data, labels, attributes))
    nats = nats_in_float64(priors, codes, labels, attributes)
    torch.testing.assert_close(
        code_nats(priors, codes, labels, attributes), nats, rtol=1e-4, atol=1e-4
    )
    other = attributes.clone()
    other[4, 1] = -1  # one attribute of the last image
    for wrong in ((labels, other), (labels.flip(0), attributes), (None, None)):
        with pytest.raises(ValueError, match="coded under other classes or attributes"):
            lossless.decode(priors, data, *wrong)


def test_a_wrong_order_of_the_positions_does_not_bring_the_codes_back(monkeypatch):
    priors = random_priors("pixelcnn", "pixelsnail")
    codes = draw(priors, 20)
    data = lossless.encode(priors, codes)

    def reversed_fronts(grid, slope):
        return (positions.flip(0) for positions in fronts(grid, slope))

    monkeypatch.setattr(lossless, "fronts", reversed_fronts)
    assert equal(codes, lossless.decode(priors, lossless.encode(priors, codes)))  # if both do so
    with pytest.raises(ValueError, match="do not have the file's checksum"):
        lossless.decode(priors, data)


def test_a_network_that_knows_its_own_codes_makes_a_small_file_and_codes_that_do_not_come_back(
    monkeypatch,
):
    """What a fault in the causality would do: the probabilities look at what is to be coded."""
    priors = random_priors("pixelcnn", "pixelsnail")
    codes = draw(priors, 40)
    truth = dict(zip(priors, codes, strict=True))

    class Leaking(FrontNetwork):
        def logits(self, positions):
            known = F.one_hot(truth[self.model].flatten(1)[:, positions],
                              self.model.config.codebook_size)  # fmt: skip
            return super().logits(positions) + 2 * known

    monkeypatch.setattr(lossless, "FrontNetwork", Leaking)
    data = lossless.encode(priors, codes)
    expected = float(nats_in_float64(priors, codes).sum()) / math.log(2) / 8
    assert len(data) - lossless.HEADER.size < 0.95 * expected
    for prior in priors:
        truth[prior] = torch.zeros_like(truth[prior])  # the decoder does not have them
    with pytest.raises(ValueError, match="do not have the file's checksum"):
        lossless.decode(priors, data)


def test_a_forward_pass_that_sees_later_codes_is_told_by_the_size_of_the_file():
    priors = random_priors("pixelcnn", "pixelsnail")
    codes = draw(priors, 1000)
    for module in priors[1].modules():
        if isinstance(module, CausalAttention):
            module.mask.fill_(True)
    expected = float(nats_in_float64(priors, codes).sum()) / math.log(2) / 8
    payload = len(lossless.encode(priors, codes, batch_size=500)) - lossless.HEADER.size
    assert abs(payload - expected) > 2 * (0.001 * expected + RANGE_CODER)


def test_codes_of_probability_zero_come_back():
    """Predictions so sharp that most probabilities are 0 in any precision, codes at random."""
    priors = random_priors("pixelcnn", "transformer", sharpness=1e4)
    generator = torch.Generator().manual_seed(0)
    codes = [
        torch.randint(SIZES[level], (30, *GRIDS[level]), generator=generator) for level in range(2)
    ]
    data = lossless.encode(priors, codes)
    assert equal(codes, lossless.decode(priors, data))
    num_codes = sum(level.numel() for level in codes)
    bits = float(nats_in_float64(priors, codes).sum()) / math.log(2)
    assert bits / num_codes > 100 and 8 * len(data) / num_codes < 25


def test_a_single_position_a_single_code_and_no_image_at_all():
    torch.manual_seed(0)
    sizes = {"channels": 4, "layers": 1, "kernel_size": 3, "condition_layers": 0}
    priors = [
        make_prior(PriorConfig(grid=(1, 1), codebook_size=1, **sizes)).eval(),
        make_prior(PriorConfig(grid=(1, 3), codebook_size=2, coarser_codebook_sizes=(1,),
                               **sizes)).eval(),
    ]  # fmt: skip
    for count in (0, 1, 3):
        codes = [torch.zeros(count, 1, 1, dtype=torch.int64), torch.randint(2, (count, 1, 3))]
        back = lossless.decode(priors, lossless.encode(priors, codes))
        assert equal(codes, back)


def test_what_is_not_such_a_file_is_refused():
    priors = random_priors("pixelcnn", "pixelcnn")
    codes = draw(priors, 20)
    data = lossless.encode(priors, codes)
    torn = bytearray(data)
    torn[-20] ^= 1
    damage = {
        "not a file of arithmetic-coded codes": [b"", b"PNG", data[:16], data[:-1], b"four" + data],
        "the file's checksum: it is damaged": [data[:-8], bytes(torn), data[:-16] + 16 * b"\xff"],
    }
    for message, files in damage.items():
        for file in files:
            with pytest.raises(ValueError, match=message) as caught:
                lossless.decode(priors, file)
            assert "\n" not in str(caught.value)
    other = copy.deepcopy(priors)
    with torch.no_grad():
        next(other[1].parameters()).view(-1)[0] += 1e-3
    for wrong in (other, priors[::-1], priors[:1], random_priors("pixelcnn", "transformer")):
        with pytest.raises(ValueError, match="coded under other priors than these"):
            lossless.decode(wrong, data)
    many = data[:4] + (2**31).to_bytes(4, "little") + data[8:]
    with pytest.raises(ValueError, match="or damaged"):
        lossless.decode(priors, many)


def test_what_cannot_be_coded_is_refused():
    priors = random_priors("pixelcnn", "pixelcnn")
    codes = draw(priors, 3)
    wrong = {
        r"codes of level 1 are \(3, 4, 5\), expected \(3, 5, 4\)": [codes[0], codes[1].mT],
        r"codes of level 1 are \(2, 5, 4\), expected \(3, 5, 4\)": [codes[0], codes[1][:2]],
        r"codes of level 0 must be in 0\.\.4": [codes[0] + 5, codes[1]],
        r"codes of level 1 must be in 0\.\.15": [codes[0], codes[1] - 16],
    }
    for message, these in wrong.items():
        with pytest.raises(ValueError, match=message):
            lossless.encode(priors, these)
    with pytest.raises(ValueError, match="must be in eval mode"):
        lossless.encode([priors[0], copy.deepcopy(priors[1]).train()], codes)
    classic = random_priors("pixelcnn", order="raster")
    with pytest.raises(ValueError, match="looks at features of later fronts"):
        lossless.encode(classic, codes[:1])


@pytest.fixture(scope="module")
def run(tmp_path_factory, face_shards):
    """A run tree of untrained models, with the codes of the drawn faces."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(channels=8, residual_channels=4, ratios=(2, 4),
                              codebook_size=SIZES[:2], code_dim=4))  # fmt: skip
    about = {"config": {"image_size": 32}, "recipe": recipe_for("faces", 32).hash}
    save_model(root / "vqvae", "vqvae", model, about)
    (root / "shards").symlink_to(face_shards)
    extract_codes(ExtractCodes(data=face_shards, checkpoint=root / "vqvae", out=root / "codes"))
    for level, grid in enumerate([(4, 4), (8, 8)]):
        prior = make_prior(PriorConfig(
            channels=8, layers=1, kernel_size=3, condition_layers=1, grid=grid,
            codebook_size=SIZES[level], coarser_codebook_sizes=SIZES[:level],
        ))  # fmt: skip
        save_model(root / f"prior-level{level}", "prior", prior, {
            "level": level, "codes": {"checkpoint_sha256": model_sha256(root / "vqvae")},
            "attribute_names": [], "class_names": [],
        })  # fmt: skip
    return root


def run_benchmark(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["lossless.py", *map(str, flags)])
    benchmark.main()


def test_the_benchmark_of_a_run(run, tmp_path, monkeypatch):
    file, figures = tmp_path / "codes.bin", tmp_path / "figures.json"
    some = ["--num_images", 16, "--batch_size", 7, "--json", figures]
    run_benchmark(monkeypatch, "--checkpoint", run, "--file", file, *some)
    document = json.loads(figures.read_text())
    rows = {row["contender"]: row for row in document["rows"]}
    ours, fixed, png = rows["ours"], rows["fixed length"], rows["PNG of the pixels"]
    assert ours["bytes"] == file.stat().st_size
    assert ours["bits_per_image"] == ours["bytes"] / 2
    assert ours["overhead"] == pytest.approx(ours["bytes"] / ours["nll_bytes"] - 1)
    assert fixed["bytes"] == math.ceil(16 * (16 * math.log2(5) + 64 * 4) / 8)
    assert 100 < png["bits_per_image"] / 8 < 32 * 32 * 3
    # the same from the parts of a run
    run_benchmark(monkeypatch, "--checkpoint", run / "vqvae", "--codes", run / "codes",
                  "--priors", run / "prior-level0", run / "prior-level1", *some)  # fmt: skip
    again = json.loads(figures.read_text())["rows"][0]
    assert (again["bytes"], again["nll_bytes"]) == (ours["bytes"], ours["nll_bytes"])


def test_the_benchmark_refuses_what_does_not_fit(run, tmp_path, monkeypatch, capsys):
    """Among it a coder that wastes a thousandth of the file and 12 bytes."""
    sound, figures = lossless.encode, ["--json", tmp_path / "figures.json"]
    vqvae = load_model(run / "vqvae")
    with torch.no_grad():
        next(vqvae.parameters()).add_(1)
    save_model(tmp_path / "vqvae", "vqvae", vqvae, read_about(run / "vqvae"))

    def wasteful(*arguments, **options):
        data = sound(*arguments, **options)
        return data + bytes(12 + 4 * (len(data) // 4000))

    def refusal(*flags):
        with pytest.raises(SystemExit) as caught:
            run_benchmark(monkeypatch, *flags, *figures)
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "must be in 1..16" in refusal("--checkpoint", run, "--num_images", 17)
    other = refusal("--checkpoint", tmp_path / "vqvae", "--codes", run / "codes")
    assert "holds codes of another checkpoint" in other
    monkeypatch.setattr(benchmark.lossless, "encode", wasteful)
    assert "the likelihood says" in refusal("--checkpoint", run, "--num_images", 16)
    assert not (tmp_path / "figures.json").exists()
