"""Schedules, cadences, the weight average and the metrics, against closed forms."""

import json
import math

import pytest
import torch
from torch import nn

from pipeline.training.schedule import is_due, learning_rate
from pipeline.training.tracking import TAGS, MeanMetrics, Tracker, check_tag
from pipeline.training.weight_average import WeightAverage


def test_cosine_and_constant():
    assert learning_rate(0, 1.0, "cosine", 0, 100) == 1.0
    assert learning_rate(50, 1.0, "cosine", 0, 100) == pytest.approx(0.5)
    assert learning_rate(100, 1.0, "cosine", 0, 100) == pytest.approx(0)
    assert learning_rate(99, 2.0, "constant", 0, 100) == 2.0
    assert learning_rate(24, 2.0, "constant", 100, 100) == pytest.approx(0.5)


def test_is_due_once_per_interval():
    due = [seen for seen in range(0, 100, 7) if is_due(20, seen, seen + 7)]
    assert len(due) == 105 // 20
    assert not is_due(0, 0, 1000)


def test_the_average_halves_old_weights_after_its_halflife():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, halflife_images=100)
    nn.init.ones_(model.weight)
    for _ in range(10):
        average.update(model, batch_size=10, images_seen=10**6)
    assert average.model.weight.item() == pytest.approx(0.5)


def test_the_average_is_short_at_the_start_and_off_at_zero():
    model = nn.Linear(1, 1, bias=False)
    for halflife, expected in ((100, 1 - 0.5 ** (10 / 1)), (0, 1.0)):
        nn.init.zeros_(model.weight)
        average = WeightAverage(model, halflife)
        nn.init.ones_(model.weight)
        average.update(model, batch_size=10, images_seen=20)  # 5 % of 20 images is 1
        assert average.model.weight.item() == pytest.approx(expected)


def test_the_average_copies_integers():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 100)
    model.num_batches_tracked += 3
    average.update(model, 1, 1)
    assert average.model.num_batches_tracked == 3


def test_mean_metrics():
    means = MeanMetrics()
    for value in (1.0, 2.0, 6.0):
        means.add({"a": torch.tensor(value)})
    assert means.values(world_size=1) == {"a": 3.0}
    means.add({"a": torch.tensor(math.nan)})
    assert math.isnan(means.values(1)["a"])


def test_unknown_tags_are_refused():
    for tag in TAGS:
        check_tag(tag.replace("{level}", "12").replace("{features}", "judge"))
    with pytest.raises(KeyError, match="loss/typo"):
        check_tag("loss/typo")


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    tracker = Tracker(tmp_path, "x", 100)
    for seen in (10, 20, 30):
        tracker.log(seen, {"loss/total": float(seen)})
    tracker.close()
    Tracker(tmp_path, "x", 100, images_seen=20).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [10, 20]
    assert set(lines[0]) == {"images_seen", "time", "loss/total"}


def test_a_torn_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"images_seen": 5, "time": 1.0}\n{"images_se')
    Tracker(tmp_path, "x", 100, images_seen=20).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"images_seen": 5, "time": 1.0}\n'


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "run", "x", 100, enabled=False)
    tracker.log(1, {"loss/total": 1.0})
    tracker.advance(1)
    tracker.close()
    assert not (tmp_path / "run").exists()
