"""The card beside a trained model: of all kinds, whole, and never at odds with the files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.data.images import recipe_for
from pipeline.data.index import read_index
from pipeline.evaluation.model_card import LICENCE, NOT_RECORDED, USE, WHAT, card, data_of
from pipeline.models import MODELS, make_prior
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.training.checkpoint import fault_of, load_model, model_sha256, save_model

PROVENANCE = {"commit": "72b65f6e", "date": "2026-11-21T22:50:51Z", "versions": {"torch": "2.15.0"}}


def tiny_models():
    torch.manual_seed(0)
    return {
        "vqvae": VQVAE(VQVAEConfig(channels=8, residual_channels=8, codebook_size=(8,),
                                   code_dim=4)),
        "vae": VAE(VAEConfig(latent_dim=4, channels=8, image_size=16)),
        "prior": make_prior(PriorConfig(channels=8, layers=1, grid=(4, 4), codebook_size=8)),
        "classifier": Classifier(ClassifierConfig(num_outputs=2, channels=8, kind="attributes",
                                                  names=("Smiling", "a|b"))),
    }  # fmt: skip


def about_of(kind, shards):
    """What the stages record."""
    index = read_index(shards)
    recipe = recipe_for(index.source, 32)
    about = {
        "config": {"out": "runs/x", "image_size": 32, "seed": 7, "judge": None, "model": {}},
        "images_seen": 12345,
        **PROVENANCE,
    }
    if kind == "prior":
        codes = {"checkpoint_sha256": "c" * 64, "data_index_sha256": index.sha256,
                 "recipe": recipe.hash, "views": ["original", "flip"]}  # fmt: skip
        figures = {"validation_nats_per_code": 2.5671460485458373}
        return {**about, "level": 0, "codes": codes, "data": data_of(index), **figures}
    return {
        **about, "validation": {"validation/mse": 0.0025359562715311767}, "recipe": recipe.hash,
        "data_index_sha256": index.sha256, "data": data_of(index, recipe),
    }  # fmt: skip


@pytest.fixture(params=sorted(MODELS))
def saved(request, face_shards, tmp_path):
    kind = request.param
    save_model(tmp_path, kind, tiny_models()[kind], about_of(kind, face_shards))
    return kind, tmp_path, (tmp_path / "final" / "card.md").read_text()


def rows(text):
    """The card's two-column tables, as one dict."""
    lines = [line[2:-2] for line in text.splitlines() if line.startswith("| ")]
    return dict(line.split(" | ", 1) for line in lines)


def test_every_kind_of_model_has_words():
    assert WHAT.keys() == USE.keys() == MODELS.keys()


def test_a_card_is_made_of_the_files_beside_it_and_belongs_to_the_commit(saved):
    _, out, text = saved
    assert text == card(out / "final")
    assert "card.md" in json.loads((out / "final" / "manifest.json").read_text())["files"]
    assert fault_of(out / "final") is None
    (out / "final" / "card.md").write_text(text.replace("12,345", "99,999"))
    assert "card.md" in fault_of(out / "final")


def test_a_card_tells_what_the_documents_do(saved, face_shards):
    kind, out, text = saved
    found, index = rows(text), read_index(face_shards)
    assert text.startswith(f"# Model card: {kind}\n") and WHAT[kind] in text and USE[kind] in text
    assert found["source"] == "faces" and found["licence"] == LICENCE["faces"]
    counts = ", ".join(f"{split} {index.num_samples(split)}" for split in index.splits)
    assert found["code samples" if kind == "prior" else "images"] == counts
    assert found["SHA-256 of the index"] == index.sha256
    assert found["recipe"] == recipe_for("faces", 32).hash
    assert found["images seen"] == "12,345" and found["seed"] == "7"
    assert found["commit"] == "72b65f6e" and found["versions"] == "torch 2.15.0"
    assert found["SHA-256"] == model_sha256(out)
    assert found["judge"] == "none"  # a setting, not something forgotten
    assert NOT_RECORDED not in text
    if kind == "prior":
        assert found["validation_nats_per_code"] == "2.5671460485458373"
        assert found["SHA-256 of the VQ-VAE"] == "c" * 64
        assert found["views of each image"] == "original, flip" and found["level"] == "0"
    else:
        assert found["validation/mse"] == "0.0025359562715311767"
        assert found["recipe's settings"] == "size 32, crop none, pad 0, channels 3"
    if kind == "classifier":
        assert found["names"] == "['Smiling', 'a\\|b']"


def test_the_three_lines_of_a_card_load_the_model(saved, monkeypatch):
    kind, out, text = saved
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(out)
    names = {}
    exec(code, names)
    stored = load_file(out / "final" / "model.safetensors")
    assert names["model"].state_dict().keys() == stored.keys()
    assert not names["model"].training
    assert type(names["model"]) is type(load_model(out, kind))


def test_a_changed_file_changes_the_card(saved):
    _, out, text = saved
    final = out / "final"
    weights = load_file(final / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, final / "model.safetensors")
    assert rows(card(final))["SHA-256"] != rows(text)["SHA-256"]


@pytest.mark.parametrize(
    "source, words",
    [("celeba", "non-commercial research only"), ("mnist", "digits"), ("folder", "as its owner")],
)
def test_the_licence_is_that_of_the_source(source, words, tmp_path):
    about = {"data": {"source": source, "samples": {"train": 1234}, "left_out": 0, "recipe": None}}
    save_model(tmp_path, "vae", tiny_models()["vae"], about)
    found = rows((tmp_path / "final" / "card.md").read_text())
    assert words in found["licence"] and found["images"] == "train 1,234"
    assert found["left out as unreadable"] == "0"


def test_what_is_not_recorded_is_said_so(tmp_path):
    save_model(tmp_path, "vae", tiny_models()["vae"], {"validation": {}})
    found = rows((tmp_path / "final" / "card.md").read_text())
    for key in ("source", "licence", "images", "recipe", "images seen", "seed", "figures"):
        assert found[key] == NOT_RECORDED
