"""Evaluation as a command: what it measures of which images, repeats, compares and refuses."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, run_stage
from faults import run_ranks
from test_classifier import ATTRIBUTES, toy_shards
from test_image_model import tiny_prior, tiny_vqvae
from torch_fidelity import FeatureExtractorInceptionV3

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from features import random_inception

from pipeline import evaluate, stage
from pipeline.data.images import open_images
from pipeline.evaluation import extractors, features, fidelity, pictures, report
from pipeline.evaluation.accuracy_score import AccuracyScore
from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.findings import Findings
from pipeline.evaluation.sets import code_usage
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.sample_prior import SamplePrior
from pipeline.sample_prior import main as sample_prior
from pipeline.training.checkpoint import model_sha256, save_model

SIZE, SEEN = 32, 640
FEW, MANY = 20, 160  # images in every set; so many that there are curves
CONDITIONAL = {
    "samples": "conditional", "selector": "selector", "train_images": 50, "accuracy_score": True,
    "classifier": AccuracyScore(channels=8, total_images=192, warmup_images=64),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_weights(tmp_path_factory):
    """Nothing in the user's cache is found, also by other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A run tree with random weights, samples with conditions, and some without in two formats."""
    root = tmp_path_factory.mktemp("run")
    toy_shards(root / "shards", 400, 170)
    recipe = open_images(root / "shards", "train", SIZE, progress=False).recipe.hash
    about = {"config": {"image_size": SIZE}, "images_seen": SEEN, "recipe": recipe}
    torch.manual_seed(0)
    sha256 = save_model(root / "vqvae", "vqvae", loud(tiny_vqvae()), about)
    grids = [(4, 4), (8, 8)]
    for level, grid in enumerate(grids):
        prior = tiny_prior(level, grid=grid, num_attributes=len(ATTRIBUTES), num_classes=0)
        codes = {"checkpoint_sha256": sha256, "grids": grids}
        known = {"attribute_names": list(ATTRIBUTES), "class_names": []}
        save_model(root / f"prior-level{level}", "prior", prior,
                   {"level": level, "codes": codes, **known})  # fmt: skip
    for half, name in enumerate(("selector", "judge")):
        config = ClassifierConfig(num_outputs=3, channels=8, kind="attributes", names=ATTRIBUTES)
        save_model(root / name, "classifier", Classifier(config), {**about, "half": half})
    for name, options in {
        "conditional": {"num_images": MANY, "conditions": root / "shards"},
        "png": {"num_images": FEW},
        "tar": {"num_images": FEW, "format": "tar"},
        "other seed": {"num_images": FEW, "seed": 1},
    }.items():
        sample_prior(SamplePrior(checkpoint=root / "vqvae", out=root / name, **options))
    return root


def loud(model):
    """Random weights that tell images apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def config(tree, out, **changes) -> evaluate.Evaluate:
    """Paths in the tree by their names; few images and no search for copies, if not said."""
    values = {
        "data": "shards", "checkpoint": "vqvae", "judge": "judge", "samples": "png",
        "train_images": 0, **changes,
    }  # fmt: skip
    for name in ("data", "checkpoint", "judge", "selector"):
        if values.get(name):
            values[name] = tree / values[name]
    samples = values["samples"]
    values["samples"] = [tree / s for s in samples] if isinstance(samples, list) else tree / samples
    return evaluate.Evaluate(out=out, **values)


def run(tree, out, **changes) -> dict:
    assert evaluate.main(config(tree, out, **changes)) == SEEN
    return report.read_report(out)


def by_set(found, images) -> dict[str, dict]:
    """Figures of a set of images by metric and features."""
    chosen = [figure for figure in found["figures"] if figure["images"] == images]
    return {"/".join(filter(None, (f["metric"], f["features"]))): f for f in chosen}


def measured(found) -> dict:
    return {key: found[key] for key in ("figures", "curves", "absent")}


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """Where everything is measured that needs no weights from elsewhere."""
    out = tmp_path_factory.mktemp("whole") / "evaluation"
    run(tree, out, **CONDITIONAL)
    return out


@pytest.fixture(scope="module")
def small(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "evaluation"
    run(tree, out)
    return out


DISTANCES = {f"{m}/judge" for m in ("frechet", "kid", "precision", "recall", "auc")}
LIMIT = {"frechet_extrapolated/judge"}


def test_every_figure_is_of_the_set_it_belongs_to(whole, tree):
    found = report.read_report(whole)  # which checks keys, counts and that all is finite
    pixels = {"mse", "psnr", "ssim"}
    codes = {f"level{n}/{what}" for n in (0, 1) for what in ("perplexity", "codes_used")}
    copies, attributes, learned = {"duplicates/judge"}, {
        "attribute_accuracy", "attribute_base_rate"
    }, {"cas_average_precision"}  # fmt: skip
    expected = {
        "floor": DISTANCES | LIMIT,
        "blurred": DISTANCES | LIMIT,
        "reconstructions": DISTANCES | LIMIT | pixels | codes,
        "samples": DISTANCES | LIMIT | copies | {"exact_copies"} | attributes | learned,
        "held-out real": copies | attributes,
        "real training": learned,
        "their reconstructions": learned,
        "base rate": learned,
    }
    for images, metrics_of in expected.items():
        own = by_set(found, images)
        # those of single attributes beside their mean
        assert {name for name in own if name.split("/")[0] not in attributes | learned} | (
            own.keys() & (attributes | learned)
        ) == metrics_of, images
    assert {figure["images"] for figure in found["figures"]} == expected.keys()
    judged = [figure for figure in found["figures"] if figure["features"]]
    assert {figure["features_sha256"] for figure in judged} == {model_sha256(tree / "judge")}
    assert not any("fid" in figure["tag"] for figure in found["figures"])
    assert {"frechet/judge", "kid/judge"} <= {figure["tag"] for figure in found["figures"]}
    assert all(figure["num_images"] in (MANY, MANY // 2) for figure in found["figures"])
    assert len(found["curves"]) == 3
    assert any("by acceptance rate (judge)" in title for title in found["curves"])
    told = found["protocol"]
    assert (told["num_images"], told["train_images"]) == (MANY, 50)
    assert told["checkpoint"]["sha256"] == model_sha256(tree / "vqvae")
    assert told["selector"] == model_sha256(tree / "selector")
    assert told["samples"]["samples"]["num_images"] == MANY


def test_figures_are_those_of_their_images(whole, tree):
    """The sets put together by hand."""
    found = report.read_report(whole)
    evaluation = evaluate.Evaluation(config(tree, whole, **CONDITIONAL), torch.device("cpu"))
    numbers = np.arange(MANY)
    real, own = evaluation.reference[numbers], evaluation.reconstructed[numbers]
    assert by_set(found, "reconstructions")["mse"]["value"] == pytest.approx(
        ((real / 255.0 - own / 255.0) ** 2).mean()
    )
    for metric, value in code_usage(
        evaluation.reconstructed.model, evaluation.reference, torch.device("cpu")
    ).items():
        assert by_set(found, "reconstructions")[metric]["value"] == value
    judge = evaluation.scorers[0].module
    for name in ("floor", "blurred", "samples"):
        both = [judge(torch.from_numpy(images[numbers]).permute(0, 3, 1, 2))[0].detach()
                for images in (evaluation.sets[name], evaluation.reference)]  # fmt: skip
        value = fidelity.frechet_distance(*both)
        assert by_set(found, name)["frechet/judge"]["value"] == pytest.approx(value, rel=1e-4)
    unseen = evaluate.half_of(evaluation.train.keys[evaluation.sets["floor"].numbers]) == 0
    assert unseen.all()  # the judge is of half 1


def test_json_markdown_metrics_and_page_say_the_same(whole):
    found = report.read_report(whole)
    assert (whole / "report.md").read_text() == report.markdown(found)
    (line,) = metrics(whole)
    assert line["images_seen"] == SEEN
    assert all(line[figure["tag"]] == figure["value"] for figure in found["figures"])
    page = (whole / "report.html").read_text()
    headline = report.headline(found)
    assert headline.figure["tag"] == "kid/judge"
    assert report.number(headline.figure["value"]) in page
    assert found["pictures"].keys() == {"samples", "reconstructions", "nearest training images"}
    assert page.count("data:image/png;base64,") == 3
    assert all((whole / path).is_file() for path in found["pictures"].values())


def test_a_second_call_finds_its_features_and_repeats_every_figure(whole, tree, monkeypatch):
    monkeypatch.setattr(features, "_features", None)  # nothing is extracted
    again = run(tree, whole.parent / "again", **CONDITIONAL)
    assert measured(again) == measured(report.read_report(whole))


def test_two_processes_give_the_report_of_one(whole, tree, tmp_path):
    flags = {"data": "shards", "checkpoint": "vqvae", "judge": "judge", **CONDITIONAL}
    scores = flags.pop("classifier")
    words = [f"--classifier.{k}={getattr(scores, k)}"
             for k in ("channels", "total_images", "warmup_images")]  # fmt: skip
    for name, value in flags.items():
        words += [f"--{name}", tree / value if isinstance(value, str) else str(value)]
    out = tmp_path / "evaluation"
    run_ranks("evaluate", words, out, world=2)
    assert measured(report.read_report(out)) == measured(report.read_report(whole))
    assert json.loads((out / "status.json").read_text())["images_seen"] == SEEN


def test_nothing_is_said_of_conditions_where_there_are_none(small):
    found = report.read_report(small)
    assert {figure["metric"] for figure in found["figures"]}.isdisjoint(
        {"attribute_accuracy", "cas_average_precision", "duplicates", "frechet_extrapolated"}
    )
    assert not found["curves"]
    absent = "\n".join(found["absent"])
    for line in ("no FID", "no LPIPS", "nothing was asked of the samples", "--train_images is 0",
                 "in the limit of many images on judge features: give 256 images"):  # fmt: skip
        assert line in absent


def test_what_is_not_asked_for_or_cannot_be_had_is_a_line(tree, tmp_path, capsys):
    few = {"samples": "conditional", "num_images": FEW}
    absent = "\n".join(run(tree, tmp_path / "not asked", **few)["absent"])
    assert "acceptance rate: give --selector" in absent and "--accuracy_score true" in absent
    # what is found out late does not cost the rest
    capsys.readouterr()
    found = run(tree, tmp_path / "too few", selector="selector", **few)
    reason = "acceptance rate: 20 candidates leave 2 images at rate 0.1; draw more"
    assert reason in "\n".join(found["absent"]) and reason in capsys.readouterr().out
    assert "attribute_accuracy" in by_set(found, "samples") and not found["curves"]


def test_the_same_attribute_for_all_is_judged_but_teaches_nothing(tree, tmp_path):
    sample_prior(SamplePrior(
        checkpoint=tree / "vqvae", out=tmp_path / "red", num_images=FEW, attributes="Red=1"
    ))  # fmt: skip
    found = run(tree, tmp_path / "out", samples=tmp_path / "red", accuracy_score=True)
    names = {name for name in by_set(found, "samples") if name.startswith("attribute_accuracy")}
    assert names == {"attribute_accuracy", "attribute_accuracy/Red"}
    assert any("accuracy score: all samples were asked for the same" in line
               for line in found["absent"])  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar", "shards", "models"])
def test_the_same_images_have_the_same_figures_wherever_they_lie(tree, small, tmp_path, kind):
    path = {"folder": "png/images", "tar": "tar", "shards": "tar/shards", "models": ""}[kind]
    found = run(tree, tmp_path / "out", samples=path, num_images=FEW)
    assert found["figures"] == report.read_report(small)["figures"]
    protocols = [found["protocol"], report.read_report(small)["protocol"]]
    assert protocols[0]["samples"] != protocols[1]["samples"]


def test_several_samples_have_their_mean_and_spread(tree, small, tmp_path):
    found = run(tree, tmp_path / "out", samples=["png", "other seed"], train_images=16)
    ours = [by_set(found, f"samples:{name}") for name in ("png", "other seed")]
    mean = by_set(found, "samples")
    assert mean.keys() == ours[1].keys() == DISTANCES
    assert ours[0].keys() - DISTANCES == {"duplicates/judge", "exact_copies"}  # of the first
    for name, figure in mean.items():
        values = [one[name]["value"] for one in ours]
        assert figure["value"] == pytest.approx(np.mean(values))
        assert figure["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert ours[0]["kid/judge"]["value"] != ours[1]["kid/judge"]["value"]
    assert report.headline(found).figure["tag"] == "kid/judge"
    alone = by_set(report.read_report(small), "samples")
    assert all(ours[0][name]["value"] == alone[name]["value"] for name in DISTANCES)
    with pytest.raises(stage.UserError, match="names of their own"):
        run(tree, tmp_path / "x", samples=["png", "tar/../png"])


def test_copies_of_training_images_are_found_among_those_searched(tree, tmp_path):
    train = open_images(tree / "shards", "train", SIZE, progress=False)
    images = np.random.default_rng(0).integers(0, 256, (16, SIZE, SIZE, 3), np.uint8)
    images[:4] = train[np.arange(4)]
    images[0] = images[0, :, ::-1]  # mirror images count
    for number, image in enumerate(images):
        pictures.save_png(image, tmp_path / f"samples/{number:02d}.png")
    for searched in (400, 50):
        options = {"samples": tmp_path / "samples", "train_images": searched}
        found = run(tree, tmp_path / f"{searched}/out", **options)
        copies = by_set(found, "samples")["exact_copies"]
        chosen = evaluate.Evaluation(
            config(tree, tmp_path, **options), torch.device("cpu")
        ).searched.numbers
        assert len(chosen) == found["protocol"]["train_images"] == searched
        assert copies["value"] == np.isin(np.arange(4), chosen).sum() / 16


def test_a_vae_is_scored_without_codebooks(tree, tmp_path):
    torch.manual_seed(0)
    vae = loud(VAE(VAEConfig(image_size=SIZE, channels=4, latent_dim=3)))
    about = json.loads((tree / "vqvae/final/config.json").read_text())
    kept = {key: about[key] for key in ("config", "images_seen", "recipe")}
    save_model(tmp_path / "vae", "vae", vae, kept)
    found = run(tree, tmp_path / "out", checkpoint=tmp_path / "vae", samples="png/images")
    assert by_set(found, "reconstructions").keys() == DISTANCES | {"mse", "psnr", "ssim"}
    assert found["protocol"]["checkpoint"]["sha256"] == model_sha256(tmp_path / "vae")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The true architecture of FID's Inception with random weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 75, 75), np.uint8)
    torch.save(random_inception(torch.from_numpy(images)).state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_published_weights_make_an_fid(tree, small, inception, tmp_path, monkeypatch):
    path, sha256 = inception
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # for speed
    # of 2,048 features it takes many seconds
    monkeypatch.setattr(fidelity, "frechet_distance", lambda a, b: float((a - b).square().sum()))
    options = {"judge": None, "num_images": 16, "inception_weights": path}
    with pytest.raises(stage.UserError, match=f"not the published Inception .* {sha256}"):
        run(tree, tmp_path / "out", **options)
    with pytest.raises(stage.UserError, match="has SHA-256"):
        run(tree, tmp_path / "out", **options, extractor_sha256="0" * 64)
    assert not (tmp_path / "out").exists()

    found = run(tree, tmp_path / "out", **options, extractor_sha256=sha256)
    tags = {figure["tag"] for figure in found["figures"]}
    short = sha256[:8]
    assert {f"frechet/{short}", f"kid/{short}", f"inception_score/{short}",
            f"evaluation/reconstructions/frechet/{short}"} <= tags  # fmt: skip
    assert not any("fid/" in tag for tag in tags)
    assert any("16 images with 2,048 features" in line for line in found["absent"])

    monkeypatch.setitem(extractors.INCEPTION.published, sha256, "inception")
    found = run(tree, tmp_path / "out", **options)
    tags = {figure["tag"] for figure in found["figures"]}
    assert {"fid/inception", "rfid/inception", "evaluation/floor/fid/inception"} <= tags
    assert {f["features_sha256"] for f in found["figures"] if f["features"]} == {sha256}
    assert not any("no FID" in line for line in found["absent"])


def test_bad_input_is_one_line_and_nothing_is_written(tree, tmp_path):
    about = json.loads((tree / "judge/final/config.json").read_text())
    for name, changes in {"recipe": {"recipe": "r"}, "half": {}}.items():
        kept = {key: about[key] for key in ("config", "images_seen", "recipe", "half")}
        classifier = Classifier(ClassifierConfig(
            num_outputs=3, channels=8, kind="attributes", names=ATTRIBUTES
        ))  # fmt: skip
        save_model(tmp_path / name, "classifier", classifier, {**kept, **changes})
    torch.manual_seed(1)
    for name, changes in {"other": {}, "other recipe": {"recipe": "r"}}.items():
        kept = {key: about[key] for key in ("config", "images_seen", "recipe")}
        save_model(tmp_path / name, "vqvae", tiny_vqvae(), {**kept, **changes})
    for number in range(16):
        image = np.zeros((SIZE, SIZE - 1, 3), np.uint8)
        pictures.save_png(image, tmp_path / f"narrow/{number}.png")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tree / "png", tmp_path / "unfinished")
    (tmp_path / "unfinished/images/000003.png").unlink()
    out = tmp_path / "out"
    for message, changes in [
        ("no features to score on: .*--judge.*--inception_weights", {"judge": None}),
        ("--num_images 21 does not fit: .*'samples': 20", {"num_images": 21}),
        ("was not decoded by .* checkpoint that made", {"checkpoint": tmp_path / "other"}),
        ("trained on recipe r", {"checkpoint": tmp_path / "other recipe"}),
        ("holds no trained model", {"checkpoint": tmp_path}),
        ("another recipe than", {"judge": tmp_path / "recipe"}),
        ("judge's half", {"selector": "judge"}),
        ("selector's half", {"judge": "selector", "selector": "selector"}),
        ("has 31x32 pixels, needed 32x32", {"samples": tmp_path / "narrow"}),
        ("has no image files", {"samples": tmp_path / "empty"}),
        ("is not a directory", {"samples": tmp_path / "absent"}),
        ("has 19 of 20 images", {"samples": tmp_path / "unfinished"}),
        ("no split 'test'", {"split": "test"}),
        ("--inception_weights .* cannot be read", {"inception_weights": tmp_path / "absent.pth"}),
        ("holds a classifier, expected", {"checkpoint": "judge", "samples": "png/images"}),
    ]:
        with pytest.raises(stage.UserError, match=message) as refusal:
            run(tree, out, **changes)
        assert "\n" not in str(refusal.value) and not out.exists(), message
    for changes in ({"num_images": 15}, {"num_images": 0}, {"train_images": 15}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} must be .* at least 16"):
            config(tree, out, **changes)


# verify and compare.


def test_verify_measures_again_and_names_what_has_changed(tree, tmp_path, capsys):
    shutil.copytree(tree / "png", tmp_path / "samples")
    out = tmp_path / "evaluation"
    found = run(tree, out, samples=tmp_path / "samples", num_images=16)
    result = run_stage("evaluate.py", "verify", out, "--relative_tolerance=1e-9")
    assert f"all {len(found['figures'])} figures came out again" in result.stdout

    changed = json.loads(json.dumps(found))
    assert changed["protocol"]["threads"] == 1
    torch.set_num_threads(2)  # taken back by verify: a classifier learns otherwise by it
    changed["figures"][3]["value"] += 0.01
    stage.write_json(out / "report.json", changed)
    with pytest.raises(stage.UserError, match=r"1 of .* others now") as refusal:
        evaluate.verify(evaluate.Verify(report=out))
    assert found["figures"][3]["tag"] in str(refusal.value) and "\n" not in str(refusal.value)
    assert torch.get_num_threads() == 1
    evaluate.verify(evaluate.Verify(report=out / "report.json", relative_tolerance=1e9))

    stage.write_json(out / "report.json", found)
    picked = evaluate.Evaluation(
        config(tree, out, samples=tmp_path / "samples", num_images=16), torch.device("cpu")
    ).samples["samples"].numbers  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    pictures.save_png(image, tmp_path / f"samples/images/{picked[0]:06d}.png")
    capsys.readouterr()
    with pytest.raises(stage.UserError, match="frechet/judge first"):
        evaluate.verify(evaluate.Verify(report=out))
    lines = capsys.readouterr().out.splitlines()
    others = {line.split()[1].rstrip(":") for line in lines if line.startswith("OTHER")}
    assert "kid/judge" in others and not any("floor" in tag for tag in others)


def test_compare_refuses_other_protocols_by_name_unless_forced(tree, small, tmp_path, capsys):
    run(tree, tmp_path / "alike", samples="other seed")
    run(tree, tmp_path / "fewer", num_images=16, seed=3)
    out = tmp_path / "compared"
    evaluate.compare(evaluate.Compare(reports=[small, tmp_path / "alike"], out=out))
    rows = json.loads((out / "side_by_side.json").read_text())["rows"]
    assert {len(row["figures"]) for row in rows} == {2}
    assert report.FORCED not in (out / "side_by_side.html").read_text()
    shutil.rmtree(out)
    reports = [small, tmp_path / "fewer"]
    with pytest.raises(stage.UserError, match=r"num_images is 20 .*seed is 0") as refusal:
        evaluate.compare(evaluate.Compare(reports=reports, out=out))
    assert "\n" not in str(refusal.value) and not out.exists()
    evaluate.compare(evaluate.Compare(reports=reports, out=out, force=True))
    page = (out / "side_by_side.html").read_text()
    assert report.FORCED in page and "num_images is 20" in page


def test_reports_may_stand_before_the_flags():
    verify, compare = evaluate.Verify, evaluate.Compare
    a, b, o = Path("a"), Path("b"), Path("o")
    for words, expected in (
        ("verify a", verify(report=a)),
        ("verify a --relative_tolerance=0.5", verify(report=a, relative_tolerance=0.5)),
        ("verify a --relative-tolerance 0.5", verify(report=a, relative_tolerance=0.5)),
        ("verify --report=a", verify(report=a)),
        ("compare a b --out o", compare(reports=[a, b], out=o)),
        ("compare a b --out=o --force=true", compare(reports=[a, b], out=o, force=True)),
        ("compare a --out o --reports+=b", compare(reports=[a, b], out=o)),
    ):
        config_type, function, flags = evaluate.command_line(words.split())
        assert stage.parse(config_type, flags) == expected, words
        assert function is (evaluate.verify if "verify" in words else evaluate.compare)
    for words, reason in (
        ("verify --relative_tolerance=1", "report"),
        ("verify a b", "b"),
        ("compare --out=o", "reports"),
        ("compare --out=o a", "a"),
        ("compares a --out=o", "compares"),
    ):
        config_type, _, flags = evaluate.command_line(words.split())
        with pytest.raises(stage.UserError, match=reason):
            stage.parse(config_type, flags)


@pytest.mark.parametrize(
    ("command", "flag"), [("verify", "--relative_tol"), ("compare", "--force")]
)
def test_help_is_of_the_command(command, flag, capsys):
    config_type, _, flags = evaluate.command_line([command, "--help"])
    with pytest.raises(SystemExit) as end:
        stage.parse(config_type, flags, evaluate.__doc__)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert flag in shown and "--judge JUDGE" not in shown and "verify runs/" in shown


def test_means_are_of_metrics_that_all_sets_have():
    found = Findings(20)
    for name, value in (("samples:a", 1.0), ("samples:b", 3.0)):
        found.add(name, "mse", Score(value))
    found.add("samples:a", "psnr", Score(9.0))
    found.add_means(["samples:a", "samples:b"], "samples")
    (mean,) = [figure for figure in found.figures if figure["images"] == "samples"]
    assert (mean["tag"], mean["value"]) == ("evaluation/samples/mse", 2.0)
    assert mean["spread"] == pytest.approx(2**0.5) and mean["num_images"] == 20
