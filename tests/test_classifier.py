"""The judge: halves, task, learning, resuming."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.images import open_images
from pipeline.data.index import Index, write_index
from pipeline.data.shards import write_shard
from pipeline.evaluation import judge
from pipeline.models.classifier import Classifier, ClassifierConfig, loss
from pipeline.stage import UserError
from pipeline.train_classifier import TrainClassifier, flips, main
from pipeline.training.checkpoint import load_model, read_about

ATTRIBUTES = ("Bright", "Red", "Always")


def toy_shards(root, num_train=240, num_valid=60, size=32, attributes=ATTRIBUTES):
    """Shards of noise on which an attribute is easy to see; the third attribute is constant."""

    def sample(split, index):
        rng = np.random.default_rng([index, split == "valid"])
        bright, red = rng.random(2) < 0.5
        pixels = rng.integers(0, 60, (size, size, 3)) + 150 * bright
        pixels[:, :16, 0] += 45 * red  # the left half is reddish; mirrored, the right
        data, about = io.BytesIO(), {"path": f"{split}/{index}.png"}
        Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
        if attributes:
            values = (bool(bright), bool(red), True)
            about["attributes"] = dict(zip(attributes, values, strict=True))
        return f"{split}-{index:05d}", {"png": data.getvalue(), "json": json.dumps(about).encode()}

    splits = {
        split: (write_shard(root / f"{split}-00000.tar", [sample(split, i) for i in range(count)]),)
        for split, count in (("train", num_train), ("valid", num_valid))
    }
    write_index(root, Index(source="faces", splits=splits, attribute_names=tuple(attributes)))
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def one_thread():
    """Toy models are fastest on one thread, and results do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(shards, out, **changes):
    values = {
        "data": shards, "out": out, "image_size": 32, "channels": 8, "total_images": 3840,
        "batch_size": 32, "warmup_images": 100, "learning_rate": 2e-3, "average_halflife": 100,
        "log_every": 640, "validate_every": 1920, "save_every": 1920,
    }  # fmt: skip
    return TrainClassifier(**(values | changes))


def test_halves_are_disjoint_and_complete(shards):
    images = open_images(shards, "train", 32)
    first, second = (judge.find_task(images, half, shards)[1] for half in (0, 1))
    assert sorted([*first, *second]) == list(range(len(images)))
    assert 0.35 < len(first) / len(images) < 0.65
    shuffled = np.random.default_rng(0).permutation(len(images))
    np.testing.assert_array_equal(
        judge.half_of(images.keys[shuffled]), judge.half_of(images.keys)[shuffled]
    )


def test_constant_attributes_are_skipped_and_named(shards):
    task, _ = judge.find_task(open_images(shards, "train", 32), 1, shards)
    assert task.names == ("Bright", "Red") and task.skipped == ("Always",)


def test_nothing_to_classify_is_a_user_error(tmp_path):
    shards = toy_shards(tmp_path / "shards", 20, 4, attributes=())
    with pytest.raises(UserError, match="neither attributes nor classes"):
        main(config(shards, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_learns_and_resumes_as_if_uninterrupted(shards, tmp_path):
    main(config(shards, tmp_path / "whole"))
    about = read_about(tmp_path / "whole")
    assert about["validation"]["classifier/validation_accuracy"] > 0.9
    assert about["per_output"]["Bright"]["average_precision"] > 0.99
    assert about["skipped_constant_attributes"] == ["Always"]

    # stopped at the checkpoint in the middle: everything after it is lost
    main(config(shards, tmp_path / "halves"))
    for path in (tmp_path / "halves/checkpoints").glob("images-000003*"):
        path.rename(tmp_path / path.name)
    (tmp_path / "halves/final").rename(tmp_path / "lost")
    assert main(config(shards, tmp_path / "halves")) == 3840
    whole, halves = (load_model(tmp_path / run, "classifier") for run in ("whole", "halves"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, halves.state_dict()[name]), name


def test_flips_are_keyed():
    assert np.array_equal(flips(1, 640, 64), flips(1, 640, 64))
    assert not np.array_equal(flips(1, 640, 64), flips(1, 704, 64))
    assert 400 < flips(1, 0, 1000).sum() < 600


def test_shapes_and_losses():
    names = tuple("abc")
    model = Classifier(ClassifierConfig(num_outputs=3, channels=8, kind="classes", names=names))
    images = torch.rand(2, 3, 28, 28)
    assert model.features(images).shape == (2, 32) and model(images).shape == (2, 3)
    logits = torch.randn(4, 3)
    signs = torch.tensor([[1, -1, 0], [-1, 1, 1], [0, 0, 0], [1, 1, -1]], dtype=torch.int8)
    known = signs != 0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[known], (signs[known] > 0).float()
    )
    torch.testing.assert_close(loss(logits, signs, "attributes"), expected)


def test_figures_of_classes_ignore_unknown_labels():
    task = judge.Task("classes", ("zero", "one"), np.empty(0, np.int64), ())
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [9.0, 0.0]], dtype=torch.float64)
    values, per_output = judge.figures(logits, np.array([0, 1, 1, -1]), task)
    assert values["classifier/validation_accuracy"] == pytest.approx(2 / 3)
    assert per_output["one"]["accuracy"] == 0.5


def test_average_precision_by_hand():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    assert judge.average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)


def test_dry_run_prints_costs_and_writes_nothing(shards, tmp_path, capsys):
    assert main(config(shards, tmp_path / "run", dry_run=True)) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("parameters", "GiB", "images/s", "h for 3,840 images"))
    assert not (tmp_path / "run").exists()
