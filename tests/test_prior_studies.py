"""The studies of benchmarks/prior_studies.py: their arithmetic on made-up runs and toys."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from PIL import Image
from test_image_model import ATTRIBUTES, save_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import prior_studies
from prior_studies import (
    RUNS,
    Material,
    accuracy_rows,
    attribute_rows,
    draw_chart,
    figures,
    others,
    ratio,
    sampling_speeds,
    settings,
    temperature_rows,
    trained_rows,
)

from pipeline.evaluation.accuracy_score import agreement, base_rate
from pipeline.evaluation.pictures import to_uint8
from pipeline.image_model import load_model
from pipeline.models.priors import PRIORS, make_prior
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.priors.sampling import Draw
from pipeline.stage import UserError

NATS = "prior/validation_nats_per_code"
GAP = "prior/gap_nats_per_code"
SPEED = "throughput/codes_per_sec"


def write_run(out: Path, seen: int = 90, **changes) -> None:
    """A run as train_prior.py leaves it, as far as the studies read it: best before its end."""
    best = {
        "images_seen": 60, "train_sample_nats_per_code": 3.0, "validation_nats_per_code": 3.25,
        "gap_nats_per_code": 0.25, **changes,
    }  # fmt: skip
    lines = [
        {SPEED: 100.0}, {NATS: 3.25, GAP: 0.25}, {SPEED: 900.0}, {SPEED: 200.0},
        {NATS: 3.75, GAP: 1.0}, {"prior/train_nats_per_code": 2.0},
    ]  # fmt: skip
    (out / "final").mkdir(parents=True)
    (out / "final" / "config.json").write_text(json.dumps(best))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "status.json").write_text(json.dumps({"state": "done", "images_seen": seen}))


def test_figures_are_those_of_the_best_validation_and_of_the_end(tmp_path):
    write_run(tmp_path)
    assert figures(tmp_path) == {
        "images_seen": 90, "train": 3.0, "validation": 3.25, "gap": 0.25, "best_at": 60,
        "end_validation": 3.75, "end_gap": 1.0, "train_codes_per_sec": 200.0,
    }  # fmt: skip


def options_of(out: Path, **changes) -> Namespace:
    options = {"study": "overfitting", "run": out / "run", "out": out, "levels": [0, 1]}
    return Namespace(**options, total_images=90, **changes)


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """The flags of the runs that are started; they end where they are asked to."""
    runs = []

    def run(script, **flags):
        assert script == "train_prior.py"
        runs.append(flags)
        if not flags["out"].exists():
            write_run(flags["out"], flags["total_images"])

    monkeypatch.setattr(prior_studies, "run", run)
    monkeypatch.setattr(prior_studies, "load_model", lambda *_: torch.nn.Linear(2, 3))
    return runs


def test_only_what_is_not_done_is_trained(started, tmp_path):
    rows = list(trained_rows(options_of(tmp_path)))
    assert [(row["case"], row["contender"]) for row in rows] == [
        (f"level {level}", name) for level in (0, 1) for name in RUNS["overfitting"]
    ]
    assert len(started) == len({flags["out"] for flags in started}) == 8
    assert rows[0]["parameters"] == 9 and rows[0]["gap"] == 0.25
    changes = [{"model.dropout": 0.0}, {"flips": "false"}, {"condition": "none"}]
    for i, change in enumerate([{}, *changes]):
        flags = started[4 + i]
        config = prior_studies.CONFIGS / "train_prior_level1.yaml"
        assert flags == {
            "config": config, "codes": tmp_path / "run" / "codes", "level": 1,
            "out": flags["out"], "total_images": 90, **change,
        }  # fmt: skip

    interrupted, short = started[1]["out"], started[6]["out"]
    (interrupted / "status.json").unlink()  # as while it runs
    (short / "status.json").write_text(json.dumps({"state": "done", "images_seen": 89}))
    started.clear()
    list(trained_rows(options_of(tmp_path)))
    assert [flags["out"] for flags in started] == [interrupted, short]


@pytest.mark.parametrize("level", [0, 1])
def test_the_priors_whose_orders_are_compared_have_as_many_parameters(level):
    side = (8, 16)[level]
    codes = {"grid": (side, side), "codebook_size": 512, "coarser_codebook_sizes": (512,) * level}
    sizes, orders = {}, {}
    for name in RUNS["order"]:
        config, changes = settings("order", name, level)
        model = yaml.safe_load(config.read_text())["model"]
        model |= {key.removeprefix("model."): value for key, value in changes.items()}
        config = PriorConfig(**model, **codes, num_attributes=40)
        with torch.device("meta"):
            prior = PRIORS[config.architecture](config, side)
        sizes[name] = sum(weight.numel() for weight in prior.parameters())
        orders[name] = (config.architecture, config.order)
    assert len(set(orders.values())) == 5
    first = next(iter(sizes.values()))
    assert all(abs(size / first - 1) < 0.02 for size in sizes.values()), sizes


def test_kinds_of_prior_are_drawn_from_with_their_own_runs_of_both_levels(
    started, monkeypatch, tmp_path
):
    class Drawn:
        """As far as the study asks."""

        def __init__(self, options: Namespace):
            self.priors, self.draw, self.asked = options.priors, print, None

        def scores(self, name: str, _) -> dict:
            return {"contender": name, "case": "samples", "runs": [p.name for p in self.priors]}

    monkeypatch.setattr(prior_studies, "Material", Drawn)
    monkeypatch.setattr(prior_studies, "sampling_speeds", lambda _: {})
    options = options_of(tmp_path, judge=None)
    options.study = "order"
    with pytest.raises(UserError, match="classifier-judge"):
        list(trained_rows(options))
    assert not started  # said before anything is trained
    write_run(options.run / "classifier-judge")
    rows = list(trained_rows(options))[10:]
    assert [row["contender"] for row in rows] == list(RUNS["order"])
    assert rows[0]["runs"] == [f"train_prior_level{level}" for level in (0, 1)]
    assert rows[3]["runs"] == [
        f"train_prior_pixelsnail_level{level}-model.order=raster" for level in (0, 1)
    ]
    options.levels = [1]
    assert len(list(trained_rows(options))) == 5


def test_the_ratio_is_of_what_lies_above_the_floor():
    assert ratio(5.0, 3.0, 1.0) == 2
    assert ratio(3.0, 3.0, 1.0) == 1
    assert ratio(0.5, 3.0, 1.0) == -0.25
    assert ratio(5.0, 1.0, 1.0) is None and ratio(5.0, 0.5, 1.0) is None


@pytest.mark.parametrize("count", [2, 3, 17, 1000])
def test_another_image_is_never_the_same_and_each_has_its_turn(count):
    partner = others(count)
    assert sorted(partner) == list(range(count))
    assert all(partner != np.arange(count))


def test_wrong_conditions_fall_to_the_base_rate_and_right_ones_do_not():
    count, shares, accuracies = 40_000, np.array([0.5, 0.3, 0.9]), np.array([0.95, 0.8, 0.5])
    rng = np.random.default_rng(1)
    wanted = np.where(rng.random((count, 3)) < shares, 1, -1)
    yes = (wanted > 0) == (rng.random((count, 3)) < accuracies)
    answered = shares * accuracies + (1 - shares) * (1 - accuracies)
    expected = answered * shares + (1 - answered) * (1 - shares)
    base = base_rate(yes, wanted)
    np.testing.assert_allclose(base, expected, atol=0.01)
    columns = {"all": agreement(yes, wanted), "wrong": agreement(yes, wanted[others(count)])}
    rows = list(accuracy_rows(["a", "b", "c"], columns, base))
    for i, row in enumerate(rows[:3]):
        assert abs(row["wrong"] - row["base"]) < 4 * row["wrong_se"] < 0.011
        assert abs(row["all"] - accuracies[i]) < 4 * row["all_se"] < 0.011
    assert rows[3]["contender"] == "mean" and rows[3]["base"] == pytest.approx(base.mean())


def test_errors_are_over_the_images_and_unknown_attributes_do_not_count():
    yes = np.array([[True, True], [True, False], [False, True], [False, False]])
    wanted = np.array([[1, 1], [-1, 0], [-1, 1], [-1, -1]])
    values = agreement(yes, wanted)
    np.testing.assert_array_equal(values, [[1, 1], [0, np.nan], [1, 1], [1, 1]])
    first, second, mean = accuracy_rows(["a", "b"], {"all": values}, base_rate(yes, wanted))
    assert (first["all"], second["all"], mean["all"]) == (0.75, 1, 0.75)  # images: 1, 0, 1, 1
    assert first["all_se"] == pytest.approx(scipy.stats.sem([1, 0, 1, 1]))
    assert mean["all_se"] == pytest.approx(scipy.stats.sem([1, 0, 1, 1]))
    assert second["all_se"] == 0
    assert first["base"] == pytest.approx(0.5 * 0.25 + 0.5 * 0.75)
    assert second["base"] == pytest.approx(0.5 * 2 / 3 + 0.5 * 1 / 3)


@pytest.fixture
def bare() -> Material:
    """Without images and models: a test gives it those that it needs. Nothing is kept."""
    found = object.__new__(Material)
    found.kept = lambda _, measure: measure()
    return found


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_each_image_has_the_noise_of_its_number_and_its_own_attributes(guidance, bare, tmp_path):
    save_run(tmp_path / "run")
    model = bare.model = load_model(tmp_path / "run", device="cpu")
    for level in range(2):  # loud enough that each image shows what it was asked for
        model.prior(level).model.attributes.weight.data.mul_(4)
    bare.device, bare.out, bare.count = model.device, tmp_path, 67  # more than a batch
    attributes = np.zeros((67, len(ATTRIBUTES)), np.int8)
    attributes[1::2, ATTRIBUTES.index("Eyeglasses")] = 1
    attributes[3, ATTRIBUTES.index("Smiling")] = -1
    images = bare.draw("set", Draw(temperature=0.9, guidance=guidance), attributes)
    assert (tmp_path / "set.png").is_file()

    def sampled(**options) -> np.ndarray:
        return to_uint8(model.sample(67, temperature=0.9, **options))

    left_open = sampled()
    one = sampled(attributes={"Eyeglasses": 1}, guidance=guidance)
    both = sampled(attributes={"Eyeglasses": 1, "Smiling": -1}, guidance=guidance)
    for number in range(67):
        expected = both if number == 3 else one if number % 2 else left_open
        assert np.array_equal(images[number], expected[number])
    assert not np.array_equal(one[3], both[3]) and not np.array_equal(one, left_open)


def test_temperatures_stand_beside_what_they_are_compared_with(bare, tmp_path):
    frechet = {"floor": 1.0, "reconstructions": 0.5, "floor-reconstructions": 2.0,
               "temperature-0.8": 5.0, "temperature-1": 3.0}  # fmt: skip
    bare.kept = lambda name, _: {
        "frechet": {"value": frechet[name], "interval": [frechet[name] - 0.1, frechet[name] + 0.1]},
        "kid": {"value": 7.0},
    }
    bare.out, bare.count, bare.asked = tmp_path, 2, np.zeros((2, len(ATTRIBUTES)), np.int8)
    rows = list(temperature_rows(bare, Namespace(temperatures=[0.8, 1.0])))
    assert {row["contender"]: row["frechet"] for row in rows} == frechet
    assert [row.get("temperature") for row in rows] == [None, None, None, 0.8, 1.0]
    assert [row.get("ratio_floor") for row in rows] == [None, None, None, 4, 2]
    assert not any(row.get("ratio") for row in rows)  # reconstructions lie below the floor
    assert rows[4]["frechet_low"] == 2.9 and rows[4]["kid"] == 7
    draw_chart(rows, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.size == (700, 450)


def test_the_judge_is_asked_for_the_attribute_that_was_asked_for(bare, monkeypatch):
    """An image is its attributes as pixels, in the order of the priors; the judge reads them in
    another order; of real images it sees the opposite."""
    monkeypatch.setattr(prior_studies, "NUM_ATTRIBUTES", 2)
    known, asked, judged = ["a", "b", "c", "d"], ["d", "c", "a"], ["a", "b", "c", "d"]
    count = 300
    rng = np.random.default_rng(0)
    attributes = np.where(rng.random((count, 4)) < [0.45, 0.5, 0.9, 0.65], 1, -1).astype(np.int8)

    def images_of(attributes: np.ndarray) -> np.ndarray:
        return np.where(attributes > 0, 255, 0).astype(np.uint8)[:, None, None]

    def judge(images: torch.Tensor) -> torch.Tensor:
        d, c, a = images[:, :, 0, 0].unbind(1)
        return torch.stack([a, torch.zeros_like(a), c, d], 1) - 0.5

    def draw(name: str, how: Draw, wanted: np.ndarray) -> np.ndarray:
        drawn.append((name, how.guidance))
        return images_of(wanted)

    drawn = []
    columns = [known.index(name) for name in asked]
    bare.draw, bare.judge, bare.device = draw, judge, "cpu"
    judge.config = Namespace(names=judged)
    bare.model = Namespace(attribute_names=asked)
    bare.train = Namespace(attributes=attributes)
    bare.real = Real(images_of(-attributes[:, columns]), attributes, known)
    bare.count, bare.chosen = count, np.arange(count)
    rows = list(attribute_rows(bare, Namespace(guidance=[1.0, 2.0])))
    assert [row["contender"] for row in rows] == ["a", "d", "mean"] * 2
    assert drawn == [(f"guidance-{g}{one}", g) for g in (1, 2) for one in ("-a", "-d", "")]
    for row in rows:
        assert (row["alone"], row["all"], row["real"]) == (1, 1, 0)
        assert 0.4 < row["base"] < 0.6 and abs(row["wrong"] - row["base"]) < 4 * row["wrong_se"]


class Real:
    """Images with attributes, as far as the study reads them."""

    def __init__(self, images: np.ndarray, attributes: np.ndarray, names: list[str]):
        self.images, self.attributes = images, attributes
        self.index = Namespace(attribute_names=names)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.images[indices]


def test_only_what_caches_can_sample_is_timed():
    sizes = {"channels": 8, "layers": 1, "kernel_size": 3, "heads": 1, "condition_layers": 0,
             "grid": (3, 3), "codebook_size": 5, "coarser_codebook_sizes": (4,),
             "num_attributes": 2}  # fmt: skip
    priors = {
        f"{kind}, {order}": make_prior(PriorConfig(architecture=kind, order=order, **sizes))
        for kind in PRIORS for order in ("wavefront", "raster")
    }  # fmt: skip
    for prior in priors.values():
        prior.eval().requires_grad_(False)
    speeds = sampling_speeds(priors)
    assert speeds.keys() == priors.keys() - {"pixelcnn, raster"}
    assert all(speed > 0 and math.isfinite(speed) for speed in speeds.values())
