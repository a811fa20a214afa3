"""Sampling as a command: what it writes, goes on with, keeps of given codes, and refuses."""

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from faults import run_ranks
from PIL import Image
from test_checkpoint import hold
from test_image_model import ATTRIBUTES, save_run

from pipeline import sample_prior, stage
from pipeline.data.codes import open_codes
from pipeline.data.images import open_images
from pipeline.data.index import Index, read_index, write_index
from pipeline.data.shards import ShardReader, write_shard
from pipeline.evaluation.pictures import to_uint8
from pipeline.evaluation.sets import SampleFiles
from pipeline.image_model import load_model
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.sample_prior import SamplePrior, main
from pipeline.training import checkpoint
from pipeline.training.checkpoint import load_model as load_one
from pipeline.training.checkpoint import save_model

SIZE = 32


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A run tree with random weights: VQ-VAE, two priors, selector and judge; and six samples."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("run")
    save_run(root, size=SIZE)
    for half, name in enumerate(("selector", "judge")):
        config = ClassifierConfig(
            num_outputs=2, channels=8, kind="attributes", names=tuple(ATTRIBUTES)
        )
        about = {"half": half, "recipe": "r"}
        save_model(root / name, "classifier", Classifier(config), about)
    main(config_of(root, root / "samples"))
    return root


def config_of(tree, out, **changes) -> SamplePrior:
    options = {"checkpoint": tree / "vqvae", "num_images": 6, "columns": 3, **changes}
    return SamplePrior(out=out, **options)


@pytest.fixture(scope="module")
def conditions(tmp_path_factory):
    """Shards of five grey images with attributes and classes, in an order that is not the priors';
    some of them are unknown."""
    root = tmp_path_factory.mktemp("conditions")
    attributes = [(1, 1), (1, -1), (-1, 0), (0, 0), (-1, 1)]
    samples = []
    for number, (glasses, smiling) in enumerate(attributes):
        signs = {"Eyeglasses": glasses, "Hat": 1, "Smiling": smiling}
        about = {"attributes": {name: sign > 0 for name, sign in signs.items() if sign}}
        if number:
            about["label"] = number - 1
        members = {
            "png": sample_prior.png_bytes(np.full((SIZE, SIZE, 3), number, np.uint8)),
            "json": json.dumps(about).encode(),
        }
        samples.append((f"{number}", members))
    index = Index(
        source="faces", splits={"train": (write_shard(root / "train-00000.tar", samples),)},
        attribute_names=("Eyeglasses", "Hat", "Smiling"), class_names=("owl", "cow", "dog", "cat"),
    )  # fmt: skip
    write_index(root, index)
    return root


def pixels(directory) -> np.ndarray:
    return np.stack([np.array(Image.open(p)) for p in sorted((directory / "images").iterdir())])


def names(directory) -> list[str]:
    return sorted(path.name for path in (directory / "images").iterdir())


def levels(directory) -> list[np.ndarray]:
    return open_codes(directory / "shards", "train").levels


def test_images_codes_and_grid_belong_together(tree):
    out = tree / "samples"
    model = load_model(tree, device="cpu")
    expected = to_uint8(model.sample(6))
    assert np.array_equal(pixels(out), expected)
    assert names(out) == [f"{number:06d}.png" for number in range(6)]
    codes = [torch.from_numpy(level.astype(np.int64)) for level in levels(out)]
    assert np.array_equal(to_uint8(model.decode(codes)), expected)
    with Image.open(out / "samples.png") as grid:
        assert grid.size == (2 * (3 * (SIZE + 2) + 2), 2 * (2 * (SIZE + 2) + 2))
    assert SampleFiles(out, SIZE, 3)[np.array([4])].shape == (1, SIZE, SIZE, 3)
    note = json.loads((out / "samples.json").read_text())
    assert note["images_per_sec"] > 0 and note["vqvae_sha256"] == model.sha256
    assert read_index(out / "shards").codes["checkpoint_sha256"] == model.sha256


def test_a_stopped_run_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    config = config_of(tree, tmp_path, batch_size=2)
    drawn, save_part, decoded = [], sample_prior.save_part, sample_prior.decoded

    def stop_after_two(folder, arrays):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(arrays["numbers"].tolist())
        save_part(folder, arrays)

    def stop_in_the_tar(*arguments):
        yield next(decoded(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_prior, "save_part", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    monkeypatch.setattr(sample_prior, "save_part", save_part)
    monkeypatch.setattr(sample_prior, "decoded", stop_in_the_tar)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    assert not (tmp_path / "shards" / "index.json").exists()
    monkeypatch.setattr(sample_prior, "decoded", decoded)
    # what is there is not drawn again; batches of another size make no difference
    monkeypatch.setattr(sample_prior, "save_part", None)
    main(dataclasses.replace(config, batch_size=4))
    assert np.array_equal(pixels(tmp_path), pixels(tree / "samples"))
    assert all(map(np.array_equal, levels(tmp_path), levels(tree / "samples")))


def test_what_is_lost_comes_back_and_what_is_there_stays(tree, tmp_path):
    shutil.copytree(tree / "samples", tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "samples.json").read_text()
    config = config_of(tree, tmp_path)
    main(config)  # nothing to do
    assert (tmp_path / "samples.json").read_text() == before
    (tmp_path / "images" / "000002.png").unlink()
    (tmp_path / "samples.png").unlink()
    shutil.rmtree(tmp_path / "drawn")
    main(config)
    assert np.array_equal(pixels(tmp_path), pixels(tree / "samples"))
    assert (tmp_path / "samples.png").is_file()
    for change in ({"seed": 1}, {"num_images": 4}, {"label": "cat"}, {"temperature": 0.5}):
        with pytest.raises(stage.UserError, match="made otherwise"):
            main(dataclasses.replace(config, **change))
    shutil.rmtree(tmp_path)  # after which nothing is remembered
    main(dataclasses.replace(config, seed=1))
    expected = load_model(tree, device="cpu").sample(6, seed=1)
    assert np.array_equal(pixels(tmp_path), to_uint8(expected))


def test_tars_are_shards_of_images_and_of_codes(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_prior, "SHARD_SIZE", 4)
    asked = {"attributes": "Smiling=1,Eyeglasses=0", "label": "owl"}
    main(config_of(tree, tmp_path / "tar", format="tar", batch_size=3, **asked))
    main(config_of(tree, tmp_path / "png", **asked))
    shards = tmp_path / "tar" / "shards"
    assert sorted(path.name for path in shards.glob("*.tar")) == [
        "train-00000.tar", "train-00001.tar"
    ]  # fmt: skip
    assert not (tmp_path / "tar" / "images").exists()
    images, codes = open_images(shards, "train", SIZE, cache=False), open_codes(shards, "train")
    assert np.array_equal(images[:], pixels(tmp_path / "png"))
    assert all(map(np.array_equal, codes.levels, levels(tmp_path / "png")))
    assert [key.decode() for key in images.keys] == [f"{number:06d}" for number in range(6)]
    assert (images.attributes == [1, -1]).all() and (images.labels == 2).all()
    assert not np.array_equal(pixels(tmp_path / "png"), pixels(tree / "samples"))


def test_rejection_keeps_those_that_the_selector_ranks_first(tree, tmp_path):
    """Against the ranking of all candidates, with one process and with two."""
    asked = {"attributes": "Smiling=1"}
    main(config_of(tree, tmp_path / "all", num_images=15, **asked))
    candidates = pixels(tmp_path / "all")
    selector = load_one(tree / "selector", "classifier")
    with torch.no_grad():
        images = torch.from_numpy(candidates).permute(0, 3, 1, 2).float() / 255
        scores = torch.nn.functional.logsigmoid(selector(images)[:, 0])
    best = sorted(scores.argsort(descending=True)[:6].tolist())
    rejecting = {**asked, "selector": tree / "selector", "acceptance": 0.4, "batch_size": 4}
    main(config_of(tree, tmp_path / "one", **rejecting))
    assert names(tmp_path / "one") == [f"{number:06d}.png" for number in best]
    assert np.array_equal(pixels(tmp_path / "one"), candidates[best])
    assert json.loads((tmp_path / "one" / "samples.json").read_text())["accepted"] == best
    accepted = [level[best] for level in levels(tmp_path / "all")]
    assert all(map(np.array_equal, levels(tmp_path / "one"), accepted))

    flags = [f"--checkpoint={tree / 'vqvae'}", "--num_images=6", "--columns=3"]
    flags += [f"--{name}={value}" for name, value in rejecting.items()]
    run_ranks("sample_prior", flags, tmp_path / "two", world=2)
    for file in ("shards/index.json", *(f"images/{name}" for name in names(tmp_path / "one"))):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    parts = [np.load(path)["numbers"] for path in (tmp_path / "two" / "drawn").glob("*.npz")]
    # both drew, and each candidate once
    assert sorted(np.concatenate(parts).tolist()) == list(range(15)) and len(parts) == 4
    assert {tuple(part % 2) for part in parts} == {(0,) * 4, (1,) * 4, (1,) * 3}


def test_each_image_is_asked_for_what_an_image_of_the_data_has(tree, conditions, tmp_path):
    """Each of the five before one comes again; image n as if it alone were asked for that."""
    options = {"conditions": conditions, "num_images": 13, "seed": 3}
    main(config_of(tree, tmp_path / "tar", format="tar", **options))
    images = open_images(tmp_path / "tar" / "shards", "train", SIZE, cache=False)
    data = open_images(conditions, "train", SIZE, cache=False)
    assert images.index.attribute_names == tuple(ATTRIBUTES)
    # (Smiling, Eyeglasses, class): the priors do not know cows
    known = {(1, 1, None), (-1, 1, "owl"), (0, -1, None), (0, 0, "dog"), (1, -1, "cat")}
    classes = {**dict(enumerate(images.index.class_names)), -1: None}
    asked = [
        (smiling, glasses, classes[label])
        for (smiling, glasses), label in zip(images.attributes.tolist(), images.labels, strict=True)
    ]
    assert len(data) == 5 and set(asked) == known
    assert len(set(asked[:5])) == len(set(asked[5:10])) == 5 and len(set(asked[10:])) == 3
    assert asked[:5] != asked[5:10]  # another order
    model = load_model(tree, device="cpu")
    for number, (smiling, glasses, label) in enumerate(asked):
        signs = {"Smiling": smiling, "Eyeglasses": glasses}
        wanted = {name: sign for name, sign in signs.items() if sign}
        alone = model.sample(number + 1, seed=3, attributes=wanted, label=label)[-1:]
        assert np.array_equal(images[number], to_uint8(alone)[0])
    codes = open_codes(tmp_path / "tar" / "shards", "train")  # as the shards of images have it
    assert np.array_equal(codes.attributes, images.attributes)
    assert np.array_equal(codes.labels, images.labels)

    # the same by several processes, batches of another size, and in more than one go
    config = config_of(tree, tmp_path / "png", batch_size=2, **options)
    wishes = sample_prior.asked_for(config, model, 13)
    for rank in (2, 0):
        ours = np.arange(13)[rank::3]
        sample_prior.draw(config, model, ours, None, wishes, None, lambda _: None)
    main(config)
    assert np.array_equal(pixels(tmp_path / "png"), images[:])
    note = json.loads((tmp_path / "png" / "samples.json").read_text())
    assert note["conditions"] == read_index(conditions).sha256


def test_the_selector_judges_each_image_by_its_own_condition(tree, conditions, tmp_path):
    options = {"conditions": conditions, "batch_size": 4}
    with pytest.raises(stage.UserError, match="none was asked for"):  # of one of the five images
        main(
            config_of(tree, tmp_path / "no", selector=tree / "selector", acceptance=0.5, **options)
        )
    assert not (tmp_path / "no").exists()
    index, root = read_index(conditions), tmp_path / "known"
    samples = ShardReader(conditions / "train-00000.tar", index.splits["train"][0])
    known = [(str(number), samples.read(number)) for number in (0, 1, 4)]
    splits = {"train": (write_shard(root / "train-00000.tar", known),)}
    write_index(root, dataclasses.replace(index, splits=splits))

    options["conditions"] = root
    main(config_of(tree, tmp_path / "all", num_images=15, format="tar", **options))
    candidates = open_images(tmp_path / "all" / "shards", "train", SIZE, cache=False)
    selector = load_one(tree / "selector", "classifier")
    with torch.no_grad():
        logits = selector(torch.from_numpy(candidates[:]).permute(0, 3, 1, 2).float() / 255)
    signs = torch.from_numpy(candidates.attributes)
    scores = torch.nn.functional.logsigmoid(logits * signs).sum(1)
    best = sorted(scores.argsort(descending=True)[:6].tolist())
    selected = {"selector": tree / "selector", "acceptance": 0.4, "format": "tar"}
    main(config_of(tree, tmp_path / "best", **selected, **options))
    found = open_images(tmp_path / "best" / "shards", "train", SIZE, cache=False)
    assert np.array_equal(found[:], candidates[best])
    assert np.array_equal(found.attributes, candidates.attributes[best])


def test_given_codes_stay_where_the_image_does(tree, tmp_path):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[3:30, 9:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    mine, given = tree / "samples" / "shards", levels(tree / "samples")
    options = {
        "top": {"keep_levels": 1},
        "rows": {"keep_rows": 0.75},
        "mask": {"mask": tmp_path / "mask.png"},
        "resampled": {"mask": tmp_path / "mask.png", "resample": 3, "keep_levels": 1},
    }
    stays = {"top": np.zeros((SIZE, SIZE)), "rows": np.arange(SIZE)[:, None] < 24 + 0 * mask,
             "mask": mask > 0, "resampled": mask > 0}  # fmt: skip
    found = {}
    for name, keeps in options.items():
        main(config_of(tree, tmp_path / name, codes=mine, seed=5, **keeps))
        found[name] = levels(tmp_path / name)
        for level, codes in enumerate(found[name]):
            side, fixed = SIZE // codes.shape[1], level < keeps.get("keep_levels", 0)
            changed = {"not": 0, "partly": 0, "whole": 0}
            for i, j in np.ndindex(codes.shape[1:]):
                place = stays[name][i * side : (i + 1) * side, j * side : (j + 1) * side]
                kind = "whole" if place.all() or fixed else "partly" if place.any() else "not"
                changed[kind] += (codes[:, i, j] != given[level][:, i, j]).sum()
            assert changed["whole"] == 0 and (changed["not"] > 0) == (not fixed)
            assert (changed["partly"] > 0) == ("mask" in keeps and not fixed)
    assert not np.array_equal(found["mask"][1], found["resampled"][1])
    top = load_model(tree, device="cpu")
    assert np.array_equal(
        pixels(tmp_path / "top"),
        to_uint8(top.decode([torch.from_numpy(c.astype(np.int64)) for c in found["top"]])),
    )


def test_user_errors_leave_nothing_behind(tree, conditions, tmp_path, monkeypatch):
    mine = tree / "samples" / "shards"
    for name, names in {"fewer": {"attribute_names": ("Hat", "Smiling")},
                        "classless": {"class_names": ()}}.items():  # fmt: skip
        shutil.copytree(conditions, tmp_path / name)
        write_index(tmp_path / name, dataclasses.replace(read_index(conditions), **names))
    Image.new("L", (SIZE, SIZE - 1)).save(tmp_path / "small.png")
    Image.new("L", (SIZE, SIZE), 255).save(tmp_path / "white.png")
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    shutil.copytree(mine, tmp_path / "foreign")
    index = read_index(mine)
    origin = {**index.codes, "checkpoint_sha256": "0" * 64}
    write_index(tmp_path / "foreign", dataclasses.replace(index, codes=origin))
    smiling = {"attributes": "Smiling=1", "acceptance": 0.5}
    for number, (changes, message) in enumerate([
        ({"codes": tmp_path / "foreign", "keep_levels": 1}, "codes of another checkpoint"),
        ({"codes": mine, "keep_levels": 1, "num_images": 7}, "codes of 6 images in split train, 7"),
        ({"codes": mine, "keep_levels": 1, "split": "test"}, "no split 'test'"),
        ({"codes": tmp_path, "keep_levels": 1}, "index.json is missing"),
        ({"codes": mine, "keep_levels": 2}, "all codes of all 2 levels stay"),
        ({"codes": mine, "mask": tmp_path / "white.png"}, "all codes of all 2 levels stay"),
        ({"codes": mine, "mask": tmp_path / "black.png"}, "no code's whole place stays"),
        ({"codes": mine, "mask": tmp_path / "small.png"}, "32x31 pixels, needed 32x32"),
        ({"codes": mine, "mask": tmp_path / "text.png"}, "does not fit"),
        ({"codes": mine, "mask": tmp_path / "absent.png"}, "does not fit"),
        ({"attributes": "Smilin=1"}, "unknown attribute Smilin; known: Smiling"),
        ({"label": "cow"}, "unknown class cow"),
        ({"temperature": (1.0, 1.0, 1.0)}, "temperature needs one value"),
        ({"checkpoint": tmp_path}, "holds no trained model"),
        ({"priors": [tree / "prior-level0"]}, "needs 2 directories"),
        ({"selector": tree / "judge", **smiling}, "judge's half"),
        ({"conditions": mine}, "has codes; conditions are of image shards"),
        ({"conditions": tmp_path}, "index.json is missing"),
        ({"conditions": tmp_path / "fewer"}, "does not tell Eyeglasses, which the priors were"),
        ({"conditions": tmp_path / "classless"}, "does not tell cat, which the priors were"),
        ({"num_images": 10**12}, "images need about .* GiB left; ask for fewer"),
    ]):  # fmt: skip
        out = tmp_path / f"out{number}"
        with pytest.raises(stage.UserError, match=message) as caught:
            main(config_of(tree, out, **changes))
        assert "\n" not in str(caught.value) and not out.exists(), message
    assert not (conditions / "cache").exists()  # only its index and conditions were read
    # the disk is asked before anything else is done, and what is there is counted
    usage = namedtuple("usage", "total used free")
    raw = 6 * (3 * SIZE**2 + 2 * (4 * 4 + 8 * 8))
    monkeypatch.setattr(sample_prior.shutil, "disk_usage", lambda _: usage(0, 0, raw - 1))
    with pytest.raises(stage.UserError, match=r"left; ask for fewer images, or .* --out"):
        main(config_of(tree, tmp_path / "full"))
    (tmp_path / "full" / "other").mkdir(parents=True)
    (tmp_path / "full" / "other" / "stage").write_bytes(bytes(raw))
    with pytest.raises(stage.UserError, match="left; ask for fewer"):  # what is not ours
        main(config_of(tree, tmp_path / "full"))
    main(config_of(tree, tree / "samples"))


def test_one_job_at_a_time_draws_into_a_directory(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LOCK_SEC", 0.3)
    other = faults.start(hold, tmp_path)
    try:
        while not (tmp_path / "held").exists():
            assert other.is_alive()
        with pytest.raises(stage.InUse, match=f"in use by process {other.pid} on "):
            main(config_of(tree, tmp_path))
    finally:
        other.kill()
        other.join()
    assert not (tmp_path / "samples.json").exists()
    main(config_of(tree, tmp_path))


def test_images_that_were_drawn_twice_are_taken_once(tree, tmp_path):
    """As by two jobs on a file system without locks."""
    main(config_of(tree, tmp_path, batch_size=4))
    shutil.rmtree(tmp_path / "shards")
    part = tmp_path / "drawn" / "000000000.npz"
    shutil.copy(part, part.with_name("000000001.npz"))
    main(config_of(tree, tmp_path))
    assert np.array_equal(pixels(tmp_path), pixels(tree / "samples"))


def test_another_number_of_columns_makes_another_grid(tree, tmp_path):
    for columns, rows in ((3, 2), (2, 2)):
        main(config_of(tree, tmp_path, columns=columns))
        with Image.open(tmp_path / "samples.png") as grid:
            assert grid.size == tuple(2 * (n * (SIZE + 2) + 2) for n in (columns, rows))


def test_options_that_contradict_each_other_are_refused():
    for changes, message in (
        ({"keep_levels": 1}, "go together"),
        ({"codes": "c"}, "go together"),
        ({"resample": 2}, "resample is for given codes"),
        ({"codes": "c", "keep_rows": 1.0}, r"keep_rows must be in \[0, 1\)"),
        ({"codes": "c", "keep_levels": -1}, "keep_levels"),
        ({"acceptance": 0.5}, "go together"),
        ({"selector": "s"}, "go together"),
        ({"selector": "s", "acceptance": 0.5}, "attributes, a label or conditions to judge by"),
        ({"conditions": "d", "attributes": "Smiling=1"}, "without attributes, label and codes"),
        ({"conditions": "d", "label": 0}, "without attributes, label and codes"),
        ({"conditions": "d", "codes": "c", "keep_levels": 1}, "attributes, label and codes"),
        ({"acceptance": 0.0}, r"acceptance must be in \(0, 1\]"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(Path("t"), Path("o"), **changes)
