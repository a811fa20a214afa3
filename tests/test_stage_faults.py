"""Whatever ends a stage, the next start makes it what an undisturbed one is, byte for byte.

In `make test` each stage once: killed with -9 at a place drawn by FAULT_SEED where it commits a
file, started again and ended by TERM at another one, started again. In `make test-faults` with more
draws, at random moments, on two ranks and with processes that help. Places: pipeline/failpoint.py.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_stage
from faults import Start, debris, state
from test_image_model import tiny_prior, tiny_vqvae

from pipeline.data.images import open_images
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.stage import remove_leftovers
from pipeline.training.checkpoint import save_model

SEED = int(os.environ.get("FAULT_SEED", "0"))
DRAWS = [0, *[pytest.param(draw, marks=pytest.mark.faults) for draw in range(1, 6)]]
GRIDS = [(4, 4), (8, 8)]


@pytest.fixture(scope="module")
def tree(face_shards, tmp_path_factory) -> Path:
    """A run tree with random weights; codes and samples are made by the stages."""
    root = tmp_path_factory.mktemp("run")
    images = open_images(face_shards, "train", 32, progress=False)
    about = {"config": {"image_size": 32}, "images_seen": 640, "recipe": images.recipe.hash}
    torch.manual_seed(0)
    sha256 = save_model(root / "vqvae", "vqvae", tiny_vqvae(), about)
    names = images.index.attribute_names
    known = {"attribute_names": list(names), "class_names": []}
    for level, grid in enumerate(GRIDS):
        prior = tiny_prior(level, grid=grid, num_attributes=len(names), num_classes=0)
        codes = {"checkpoint_sha256": sha256, "grids": GRIDS}
        save_model(root / f"prior-level{level}", "prior", prior,
                   {"level": level, "codes": codes, **known})  # fmt: skip
    judge = ClassifierConfig(num_outputs=len(names), channels=8, kind="attributes", names=names)
    save_model(root / "judge", "classifier", Classifier(judge), {**about, "half": 1})
    (root / "shards").symlink_to(face_shards)
    for stage, out in (("extract_codes", "codes"), ("sample_prior", "samples")):
        assert Start(stage, flags(stage, root, root / out), root / out).wait(120) == [0]
    return root


def flags(stage: str, tree: Path, out: Path) -> list[str]:
    """The command line of a stage that commits several files."""
    return {
        "shard_data": ["--source=faces", "--num_faces=40", "--face_size=16", "--shard_size=8",
                       "--workers=1"],
        "extract_codes": [f"--data={tree}/shards", f"--checkpoint={tree}/vqvae", "--flip=true"],
        "train_prior": [f"--config={ROOT}/configs/debug/train_prior_level1.yaml",
                        f"--codes={tree}/codes", "--level=1", "--total_images=128",
                        "--save_every=32", "--validate_every=64", "--log_every=16"],
        "sample_prior": [f"--checkpoint={tree}/vqvae", "--num_images=16", "--batch_size=5"],
        "evaluate": [f"--data={tree}/shards", f"--checkpoint={tree}/vqvae",
                     f"--samples={tree}/samples", f"--judge={tree}/judge",
                     f"--features={out}/features"],
    }[stage] + [f"--out={out}"]  # fmt: skip


STAGES = ("shard_data", "extract_codes", "train_prior", "sample_prior", "evaluate")
# what tells when, where and how fast
VOLATILE = {"provenance", "commit", "versions", "hardware", "date", "time", "images_per_sec"}
TEMPORARY = re.compile(r"\..*\.\d+(\.tmp|\.index\.npy)?")


def content(path: Path, out: Path) -> str:
    """The SHA-256 of a file; of JSON without what may differ."""
    if path.suffix not in (".json", ".jsonl"):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def without(value):
        if isinstance(value, dict):
            return {key: without(v) for key, v in value.items() if key not in VOLATILE}
        return value

    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return json.dumps([without(json.loads(line)) for line in lines]).replace(str(out), "OUT")


def files(out: Path) -> dict[str, str]:
    """All files that have their name. Pages and logs for people have dates in them, .lock a
    process."""
    found = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {
        name: content(path, out) for name, path in found.items()
        if path.suffix not in (".html", ".md") and "tensorboard" not in name
        and name not in ("status.json", ".lock") and not TEMPORARY.fullmatch(path.name)
    }  # fmt: skip


def leftovers(out: Path) -> list[Path]:
    """What killed processes were writing."""
    return [path for path in out.rglob(".*") if TEMPORARY.fullmatch(path.name)]


class Undisturbed:
    """What each stage comes to by itself, and which places it passes on the way."""

    def __init__(self, tree: Path, root: Path):
        self.tree, self.root = tree, root
        self.known: dict[str, tuple] = {}
        self.seconds: dict[str, float] = {}

    def of(self, stage: str) -> tuple[dict, list[str]]:
        if stage not in self.known:
            out = self.root / stage
            start = Start(stage, flags(stage, self.tree, out), out, FAILPOINT="nowhere:kill")
            assert start.wait(120) == [0], start.log()
            self.seconds[stage] = time.monotonic() - start.began
            passes = json.loads(out.with_suffix(".passes0").read_text())
            places = [f"{name}@{n}" for name, most in passes.items() for n in range(1, most + 1)]
            self.known[stage] = result(stage, out), places
        return self.known[stage]


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory) -> Undisturbed:
    return Undisturbed(tree, tmp_path_factory.mktemp("undisturbed"))


def result(stage: str, out: Path) -> dict:
    return state(out)["files"] if stage == "train_prior" else files(out)


def ends_as_undisturbed(stage: str, tree: Path, out: Path, wanted: dict) -> None:
    """Another start of the same command."""
    start = Start(stage, flags(stage, tree, out), out)
    assert start.wait(120) == [0], start.log()
    assert result(stage, out) == wanted
    assert not debris(out)
    # among features they may be those of another evaluation that is at work
    assert not [path for path in leftovers(out) if "features" not in path.relative_to(out).parts]
    assert start.status()["state"] == "done"


def is_whole_so_far(stage: str, out: Path, wanted: dict) -> None:
    """What has its name is what an undisturbed run has under it. A log grows, and checkpoints have
    a test of their own."""
    if stage != "train_prior":
        there = {name: found for name, found in files(out).items() if name != "metrics.jsonl"}
        assert there.items() <= wanted.items()


@pytest.mark.parametrize("number", DRAWS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_and_then_asked_to_end_goes_on(
    tree, tmp_path, undisturbed, stage, number
):
    wanted, places = undisturbed.of(stage)
    chance, out = random.Random(f"{SEED} P1 {stage} {number}"), tmp_path / "out"
    place = chance.choice(places)
    killed = Start(stage, flags(stage, tree, out), out, FAILPOINT=f"{place}:kill")
    assert killed.wait(120) == [-signal.SIGKILL], (place, killed.log())
    is_whole_so_far(stage, out, wanted)
    place = chance.choice(places)  # the second start may not come to it
    ended = Start(stage, flags(stage, tree, out), out, FAILPOINT=f"{place}:term")
    (code,) = ended.wait(120)
    assert code in (0, 85), (place, ended.log())
    assert ended.status()["state"] == ("requeue" if code else "done")
    is_whole_so_far(stage, out, wanted)
    ends_as_undisturbed(stage, tree, out, wanted)


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_at_any_moments_goes_on(tree, tmp_path, undisturbed, stage):
    wanted, _ = undisturbed.of(stage)
    chance, out = random.Random(f"{SEED} P1 moments {stage}"), tmp_path / "out"
    for _ in range(3):
        start = Start(stage, flags(stage, tree, out), out)
        time.sleep(undisturbed.seconds[stage] * chance.random())
        start.processes[0].kill()  # it may have ended
        assert start.wait() in ([-signal.SIGKILL], [0])
        is_whole_so_far(stage, out, wanted)
    ends_as_undisturbed(stage, tree, out, wanted)


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["extract_codes", "sample_prior", "evaluate"])
def test_two_ranks_of_which_one_is_killed_end_and_one_alone_goes_on(
    tree, tmp_path, undisturbed, stage
):
    """What is drawn lies in other files then, with the same in it."""
    wanted, places = undisturbed.of(stage)
    chance, out = random.Random(f"{SEED} P1 ranks {stage}"), tmp_path / "out"
    place = chance.choice(places[: len(places) // 2])
    start = Start(stage, flags(stage, tree, out), out, world=2, FAILPOINT=f"{place}:kill")
    codes = start.wait(120)
    assert -signal.SIGKILL in codes and 0 not in codes, (place, start.log())
    start = Start(stage, flags(stage, tree, out), out)
    assert start.wait(120) == [0], start.log()

    def but_drawn(found: dict) -> dict:
        return {name: f for name, f in found.items() if not name.startswith("drawn/")}

    assert but_drawn(files(out)) == but_drawn(wanted)


@pytest.mark.faults
@pytest.mark.parametrize(("moment", "commit"), [("drawing", 3), ("sharding", 5)])
def test_processes_that_help_a_killed_stage_end_too(tree, tmp_path, undisturbed, moment, commit):
    wanted, _ = undisturbed.of("shard_data")
    out = tmp_path / "out"
    words = [*flags("shard_data", tree, out), "--workers=2"]
    if moment == "sharding":
        words.append(f"--root={undisturbed.root}/faces")
    process = subprocess.Popen(
        [sys.executable, ROOT / "pipeline" / "shard_data.py", *words],
        env={**os.environ, "FAILPOINT": f"commit@{commit}:60"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 60
    while not (helpers := pausing(tmp_path) & set(children.read_text().split())):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in helpers):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
    run_stage("shard_data.py", *words)
    assert files(out) == wanted


def pausing(out: Path) -> set[str]:
    """Processes with a file that they have written and not committed."""
    return {re.search(r"\.(\d+)[^\d]*$", path.name)[1] for path in leftovers(out)}


def test_leftovers_go_when_nobody_can_be_writing_them_any_more(tmp_path):
    names = [".a.json.12", ".b.safetensors.7", ".c.tar.5.index.npy"]
    others = ["a.json", ".lock", ".a.json", ".notes.txt.12"]
    for name in [*names, *others]:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[0], (0, 0))
    remove_leftovers(tmp_path, older_than_sec=3600)
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], *others}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others}
