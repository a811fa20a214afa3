"""The report, and the evaluation stage from shards to report."""

import json

import numpy as np
import pytest
import torch
from test_classifier import one_thread, toy_shards  # noqa: F401

from pipeline import evaluate
from pipeline.data.images import open_images
from pipeline.evaluation import pictures
from pipeline.evaluation.report import FIGURE_KEYS, PROTOCOL_KEYS, markdown, write_report
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.stage import UserError
from pipeline.training.checkpoint import model_sha256, save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run tree with shards, an untrained model, an untrained judge and noise as samples."""
    root = tmp_path_factory.mktemp("run")
    shards = toy_shards(root / "shards", 80, 40)
    recipe = open_images(shards, "train", 32).recipe.hash
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(channels=8, residual_channels=8, codebook_size=(8,), code_dim=4))
    about = {"config": {"image_size": 32}, "images_seen": 640, "recipe": recipe, "validation": {}}
    save_model(root / "vqvae", "vqvae", model, about)
    names = ("a", "b")
    judge = Classifier(ClassifierConfig(num_outputs=2, channels=8, kind="attributes", names=names))
    save_model(root / "judge", "classifier", judge, {**about, "half": 1})
    rng = np.random.default_rng(0)
    for index in range(24):
        image = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        pictures.save_png(image, root / f"samples/images/{index:06d}.png")
    protocol = {"vqvae_sha256": model_sha256(root / "vqvae"), "num_images": 24, "seed": 5}
    (root / "samples/samples.json").write_text(json.dumps(protocol))
    return root


def config(run, out, **changes):
    values = {"data": run / "shards", "checkpoint": run / "vqvae", "judge": run / "judge"}
    values |= {"samples": run / "samples", "out": out}
    return evaluate.Evaluate(**(values | changes))


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "evaluation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(run))  # no weights in the user's cache
        assert evaluate.main(config(run, out)) == 640
    return out


def test_report_is_complete_and_reads_back(report, run):
    document = json.loads((report / "report.json").read_text())
    assert set(document["protocol"]) == PROTOCOL_KEYS
    assert all(set(figure) == FIGURE_KEYS for figure in document["figures"])
    assert document["protocol"]["num_images"] == 24
    assert document["protocol"]["checkpoint"]["sha256"] == model_sha256(run / "vqvae")
    assert document["protocol"]["samples"]["seed"] == 5
    judged = [figure for figure in document["figures"] if figure["features"] == "judge"]
    assert {figure["images"] for figure in judged} == {
        "floor", "reconstructions", "blurred", "samples"
    }  # fmt: skip
    assert {figure["features_sha256"] for figure in judged} == {model_sha256(run / "judge")}
    assert not any("fid" in figure["tag"] for figure in document["figures"])


def test_figures_are_the_same_in_markdown_json_and_metrics(report):
    document = json.loads((report / "report.json").read_text())
    text = (report / "report.md").read_text()
    assert text == markdown(document)
    metrics = json.loads((report / "metrics.jsonl").read_text())
    for figure in document["figures"]:
        assert f"{figure['value']:.4g}" in text
        assert metrics[figure["tag"]] == figure["value"]
    assert metrics["images_seen"] == 640 and "frechet/judge" in metrics
    for path in document["pictures"].values():
        assert f"({path})" in text and (report / path).is_file()


def test_missing_keys_and_nan_are_refused(report, tmp_path):
    document = json.loads((report / "report.json").read_text())
    protocol, figures = document["protocol"], document["figures"]
    for key in PROTOCOL_KEYS:
        with pytest.raises(ValueError, match=key):
            write_report(tmp_path, {k: v for k, v in protocol.items() if k != key}, figures, {})
    with pytest.raises(ValueError, match="nan"):
        write_report(tmp_path, protocol, [{**figures[0], "value": float("nan")}], {})
    assert not list(tmp_path.iterdir())


def test_user_errors_come_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(run))
    out = tmp_path / "out"
    cases = [
        ("--inception_weights", {"judge": None}),
        ("does not fit", {"num_images": 30}),
        ("not decoded by", {"checkpoint": other_checkpoint(run, tmp_path)}),
        ("samples.json", {"samples": tmp_path}),
        ("cannot be read", {"inception_weights": tmp_path / "absent.pth"}),
    ]
    for message, changes in cases:
        with pytest.raises(UserError, match=message) as refusal:
            evaluate.main(config(run, out, **changes))
        assert "\n" not in str(refusal.value)
    assert not out.exists()
    with pytest.raises(ValueError, match="num_images must be at least 16"):
        config(run, out, num_images=3)


def other_checkpoint(run, tmp_path):
    about = json.loads((run / "vqvae/final/config.json").read_text())
    kept = {key: about[key] for key in ("config", "images_seen", "recipe", "validation")}
    torch.manual_seed(1)
    model = VQVAE(VQVAEConfig(channels=8, residual_channels=8, codebook_size=(8,), code_dim=4))
    save_model(tmp_path / "other", "vqvae", model, kept)
    return tmp_path / "other"
