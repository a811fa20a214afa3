"""Scores during training: what they are, that they change nothing, who computes them."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics
from faults import run_ranks
from test_train_prior import encoded
from test_training import assert_same_tensors

from pipeline import stage, train_prior, train_vae, train_vqvae
from pipeline.data.codes import open_codes
from pipeline.data.images import open_images
from pipeline.evaluation import extractors, fidelity
from pipeline.evaluation.pictures import to_uint8, to_unit
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.stage import UserError
from pipeline.train_prior import TrainPrior
from pipeline.train_vae import TrainVAE
from pipeline.train_vqvae import TrainVQVAE
from pipeline.training import scoring
from pipeline.training.checkpoint import load_model, save_model
from pipeline.training.scoring import Scorer
from pipeline.training.tracking import Tracker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tree(face_shards, tmp_path_factory):
    """A run tree of the drawn faces: a VQ-VAE with random weights, its codes, and a judge."""
    root = tmp_path_factory.mktemp("tree")
    (root / "shards").symlink_to(face_shards)
    encoded(face_shards, root, flip=True)
    torch.manual_seed(0)
    judge = Classifier(
        ClassifierConfig(num_outputs=2, channels=8, kind="attributes", names=("a", "b"))
    )
    recipe = open_images(face_shards, "valid", 32, progress=False).recipe.hash
    save_model(root / "judge", "classifier", judge, {"half": 1, "recipe": recipe})
    return root


@pytest.fixture
def valid(tree):
    return open_images(tree / "shards", "valid", 32, progress=False)


def ranked(rank=0, world=1):
    """An accelerator as far as a scorer knows it."""
    return SimpleNamespace(
        process_index=rank, num_processes=world, device=CPU, is_main_process=rank == 0,
        wait_for_everyone=lambda: None,
    )  # fmt: skip


def a_run(out):
    return SimpleNamespace(images_seen=64, paused=False, tracker=Tracker(out, "x", 100))


def shrunk(config_type, name, *flags):
    """A debug config of four steps."""
    words = [f"--config={ROOT}/configs/debug/{name}.yaml", "--total_images=64", "--log_every=16"]
    return stage.parse(config_type, [*words, "--validate_every=0", "--save_every=32", *flags])


def test_figures_are_those_of_the_same_images_in_an_evaluation(tree, valid, tmp_path):
    judge = extractors.judge_extractor(tree / "judge", CPU)
    scorer = Scorer(valid, 16, 32, judge, ranked())
    dark = valid[scorer.numbers] // 2
    run = a_run(tmp_path)
    scorer.score(run, {"samples": lambda where: dark[where]})
    run.tracker.close()
    (line,) = metrics(tmp_path)
    assert len(set(scorer.numbers)) == 16 and scorer.numbers.max() < len(valid)
    ours, theirs = (fidelity.extract([judge], [images], 16, "x")["judge"]
                    for images in (dark, valid[scorer.numbers]))  # fmt: skip
    for metric, score in fidelity.scores(ours, theirs).items():
        assert line[f"{metric}/judge"] == pytest.approx(score.value, rel=1e-6), metric
    assert line["frechet/judge"] > 0 and line["kid/judge"] > 0
    assert line["images_seen"] == 64 and line["throughput/scoring_seconds"] > 0
    assert run.paused  # the next step leaves the pause out of the throughput, see test_run.py


def test_the_pause_is_measured(tree, valid, tmp_path, monkeypatch):
    scorer = Scorer(valid, 16, 32, extractors.judge_extractor(tree / "judge", CPU), ranked())
    run, now = a_run(tmp_path), [0.0]
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: now[0])

    def make(where):
        now[0] += 1000.0
        return valid[scorer.numbers[where]]

    scorer.score(run, {"samples": make, "reconstructions": make})
    run.tracker.close()
    assert metrics(tmp_path)[0]["throughput/scoring_seconds"] == 2000.0


@pytest.mark.parametrize("world", [2, 3, 16])
def test_ranks_look_at_each_image_once_and_find_what_one_finds(tree, valid, monkeypatch, world):
    judge = extractors.judge_extractor(tree / "judge", CPU)
    alone = Scorer(valid, 16, 32, judge, ranked()).reference["features"]
    monkeypatch.setattr(scoring, "BATCH_SIZE", 3)
    parts, seen = [], []
    monkeypatch.setattr(scoring, "all_reduce_sum", lambda tensor: None)
    for rank in range(world):
        scorer = Scorer(valid, 16, 32, judge, ranked(rank, world))
        parts.append(scorer.reference["features"])
        scorer._look(lambda where, scorer=scorer: (
            seen.extend(range(16)[where]), valid[scorer.numbers[where]])[1])  # fmt: skip
    assert sorted(seen) == list(range(16))
    torch.testing.assert_close(sum(parts), alone, rtol=1e-4, atol=1e-5)


# Training with scores ends as training without.


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


def with_and_without(config_type, main, name, out, tree, *flags, monkeypatch):
    """Trains twice, asserts that all tensors are the same, and returns the scored lines."""
    before, after, score = [], [], Scorer.score

    def watched(self, run, sets):
        before.append(states())
        score(self, run, sets)
        after.append(states())

    monkeypatch.setattr(Scorer, "score", watched)
    scored = ["--score_every=32", "--score_images=16", f"--judge={tree / 'judge'}"]
    main(shrunk(config_type, name, *flags, f"--out={out / 'plain'}"))
    assert not before
    main(shrunk(config_type, name, *flags, *scored, f"--out={out / 'scored'}"))
    assert before == after and len(before) == 2
    for directory in ("final", "checkpoints/images-000000064"):
        assert_same_tensors(out / "plain" / directory, out / "scored" / directory)
    drop = {"time", "throughput/images_per_sec", "throughput/codes_per_sec", "memory/peak_gib"}
    lines = [
        [{k: v for k, v in line.items() if k not in drop} for line in metrics(out / run)]
        for run in ("plain", "scored")
    ]
    extra = [line for line in lines[1] if "throughput/scoring_seconds" in line]
    assert lines[0] == [line for line in lines[1] if line not in extra]
    assert [line["images_seen"] for line in extra] == [32, 64]
    return extra


def test_scoring_a_vqvae_changes_nothing(tree, tmp_path, monkeypatch):
    lines = with_and_without(
        TrainVQVAE, train_vqvae.main, "train_vqvae", tmp_path, tree, f"--data={tree / 'shards'}",
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert "evaluation/reconstructions/kid/judge" in lines[0]
    assert not any(tag.startswith(("frechet/", "kid/")) for tag in lines[0])  # they are of samples


def test_scoring_a_vae_changes_nothing(tree, tmp_path, monkeypatch):
    lines = with_and_without(
        TrainVAE, train_vae.main, "train_vae", tmp_path, tree, f"--data={tree / 'shards'}",
        "--binarize=false", "--model.channels=4", monkeypatch=monkeypatch,
    )  # fmt: skip
    for tag in ("frechet/judge", "kid/judge", "evaluation/reconstructions/frechet/judge"):
        assert tag in lines[0]


def test_scoring_a_prior_changes_nothing(tree, tmp_path, monkeypatch):
    lines = with_and_without(
        TrainPrior, train_prior.main, "train_prior_level1", tmp_path, tree,
        f"--codes={tree / 'codes'}", "--level=1", "--model.channels=4", monkeypatch=monkeypatch,
    )  # fmt: skip
    assert "evaluation/samples_given_coarser/frechet/judge" in lines[0]


def test_two_ranks_score_what_one_would(tree, valid, tmp_path):
    """The last scores are of the model that is saved."""
    flags = [f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--data={tree / 'shards'}",
             f"--judge={tree / 'judge'}", "--score_every=16", "--score_images=16",
             "--total_images=16"]  # fmt: skip
    run_ranks("train_vqvae", flags, tmp_path / "two", world=2)
    judge = extractors.judge_extractor(tree / "judge", CPU)
    run, model = a_run(tmp_path / "alone"), load_model(tmp_path / "two", "vqvae")
    scorer = Scorer(valid, 16, 32, judge, ranked())
    make = train_vqvae.reconstructions(model, valid, scorer.numbers, CPU)
    scorer.score(run, {"reconstructions": make})
    run.tracker.close()
    (alone,), two = metrics(tmp_path / "alone"), metrics(tmp_path / "two")[-1]
    assert alone.keys() == two.keys()
    for metric in ("frechet", "kid"):
        tag = f"evaluation/reconstructions/{metric}/judge"
        assert two[tag] == pytest.approx(alone[tag], rel=1e-4)


# What a prior's samples are.


def test_a_priors_samples_belong_to_the_images_they_are_scored_against(tree, valid, monkeypatch):
    """Where the drawn codes are the images' own, the samples are their reconstructions."""
    codes, numbers = open_codes(tree / "codes", "valid"), np.array([9, 3, 12, 0])
    vqvae = load_model(tree / "vqvae", "vqvae")
    config = dataclasses.replace(
        TrainPrior(codes=tree / "codes", out=tree / "x", level=1).model, channels=4, layers=1
    )
    config = train_prior.model_config(
        TrainPrior(codes=tree / "codes", out=tree / "x", level=1, model=config,
                   condition="attributes"), codes, 1,
    )  # fmt: skip
    prior = train_prior.make_prior(config).eval()
    make = train_prior.decoded_samples(prior, vqvae, codes, numbers)
    with torch.no_grad():
        whole = make(slice(0, 4))
        assert np.array_equal(whole, np.concatenate([make(slice(i, i + 1)) for i in range(4)]))
        monkeypatch.setattr(
            train_prior, "sample_codes",
            lambda *_, **__: SimpleNamespace(codes=torch.from_numpy(
                codes.levels[1][numbers].astype(np.int64))),
        )  # fmt: skip
        expected = to_uint8(vqvae(to_unit(valid[numbers])).reconstructions)
        assert np.array_equal(make(slice(0, 4)), expected)
    assert not np.array_equal(whole, expected)


def test_coarser_levels_are_not_scored_and_say_so(tree, tmp_path, capsys):
    config = shrunk(
        TrainPrior, "train_prior_level0", f"--codes={tree / 'codes'}", f"--out={tmp_path}",
        "--level=0", "--score_every=32", "--total_images=16", "--model.channels=4",
    )  # fmt: skip
    train_prior.main(config)
    assert capsys.readouterr().out.count("level 0 is not scored") == 1
    assert not any("throughput/scoring_seconds" in line for line in metrics(tmp_path))


# What is wrong shows before the training.


def scored_prior(tree, out, **changes) -> TrainPrior:
    config = shrunk(TrainPrior, "train_prior_level1", f"--codes={tree / 'codes'}", f"--out={out}",
                    "--level=1", "--score_every=32", f"--judge={tree / 'judge'}")  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_a_prior_is_scored_with_its_own_codes_vqvae_and_images(tree, digit_shards, tmp_path):
    save_model(tmp_path / "other", "vqvae", load_model(tree / "vqvae").double(), {})
    for changes, message in (
        ({"checkpoint": tmp_path / "absent"}, "holds no trained model"),
        ({"checkpoint": tmp_path / "other"}, "codes of another checkpoint"),
        ({"data": digit_shards}, "codes of other images"),
    ):
        with pytest.raises(UserError, match=message) as error:
            train_prior.main(scored_prior(tree, tmp_path / "run", **changes))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_judge_of_other_images_no_features_and_too_few_images_are_told_at_once(
    tree, valid, tmp_path, monkeypatch
):
    save_model(tmp_path / "judge", "classifier", load_model(tree / "judge"), {"recipe": "another"})
    with pytest.raises(UserError, match="another recipe"):
        scoring.find_extractor(tmp_path / "judge", valid.recipe.hash, CPU)
    monkeypatch.setattr(extractors, "find_inception_weights", lambda path: None)
    assert scoring.find_extractor(None, valid.recipe.hash, CPU) is None
    judge = extractors.judge_extractor(tree / "judge", CPU)
    for few, world in ((15, 1), (16, 17)):
        with pytest.raises(UserError, match=f"{few} validation images are too few"):
            Scorer(valid, few, 32, judge, ranked(0, world))


@pytest.mark.parametrize("config_type", [TrainVQVAE, TrainVAE, TrainPrior])
def test_impossible_cadences_and_counts_are_named(config_type, tmp_path):
    places = {f.name: tmp_path for f in dataclasses.fields(config_type)
              if f.name in ("data", "codes", "out")}  # fmt: skip
    for changes, name in (({"score_every": -1}, "score_every"), ({"score_images": 15}, "score_im")):
        with pytest.raises(ValueError, match=name):
            config_type(**places, **changes)


def test_training_and_sampling_start_without_what_only_scores_need():
    program = (
        "import sys, pipeline.train_vqvae, pipeline.train_prior, pipeline.sample_prior\n"
        "print({'torch_fidelity', 'torchvision', 'scipy.stats', 'matplotlib'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == (
        "set()\n"
    )
