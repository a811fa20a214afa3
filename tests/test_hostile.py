"""Every item of the hostile corpus, given to what a user would give it to: one clear line, no code
run, no file written elsewhere, little memory and time."""

import dataclasses
import io
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT

from pipeline import run_all, shard_data, stage, train_prior, train_vqvae
from pipeline.data.codes import open_codes
from pipeline.data.images import open_images
from pipeline.data.shards import Index, stream_shard, write_index, write_shard
from pipeline.evaluation import model_card
from pipeline.evaluation.extractors import inception_extractor
from pipeline.models import MODELS
from pipeline.models.priors import make_prior
from pipeline.models.priors.prior import MAX_GRID, PriorConfig
from pipeline.stage import UserError
from pipeline.training.checkpoint import load_model

MAX_MIB, MAX_SEC = 512, 5.0


def memory_mib(line: str) -> float:
    """VmRSS, or VmHWM, its peak."""
    text = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) / 1024 for row in text.splitlines() if row.startswith(line))


@pytest.fixture(autouse=True)
def harmless(tmp_path):
    """Nothing may have run, or have been written beside the test's own folder."""
    beside = set(tmp_path.parent.iterdir())
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory_mib("VmRSS")
    start = time.process_time()
    yield
    assert time.process_time() - start < MAX_SEC
    if sys.platform == "linux":
        assert memory_mib("VmHWM") - before < MAX_MIB
    assert set(tmp_path.parent.iterdir()) == beside
    assert not list(tmp_path.rglob(f"{hostile.CANARY}*")) and not Path(hostile.CANARY).exists()


def refuses(call: Callable, *named: str) -> str:
    """The UserError of a call: one line, which names what is wrong."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000, text
    assert all(name in text for name in named), text
    return text


def command(module, config_type: type, *flags: str) -> None:
    """A stage as its script runs it, until the error that a person would see."""
    module.main(stage.parse(config_type, flags))


def train(shards: Path, out: Path, *flags: str) -> None:
    command(
        train_vqvae, train_vqvae.TrainVQVAE, f"--data={shards}", f"--out={out}",
        "--config=configs/debug/train_vqvae.yaml", *flags,
    )  # fmt: skip


@pytest.mark.parametrize("name", hostile.tars(Path("x")))
def test_tars(tmp_path, name):
    path = tmp_path / "train-0.tar"
    path.write_bytes(hostile.tars(tmp_path)[name])
    if name == "pickle":  # is data like any other, and never opened
        ((_, members),) = list(stream_shard(path, hostile.info_of(path)))
        assert members["pyd"] == pickle.dumps(hostile.Evil(tmp_path))
        return
    refuses(lambda: list(stream_shard(path, hostile.info_of(path))), "train-0.tar")


def test_a_pickle_in_the_place_of_an_image(tmp_path):
    evil = pickle.dumps(hostile.Evil(tmp_path))
    hostile.image_shards(tmp_path / "shards", evil)
    refuses(lambda: train(tmp_path / "shards", tmp_path / "out"), "train-0.tar", "image a")
    shard = write_shard(tmp_path / "shards/train-0.tar", [("a", {"pyd": evil, "json": b"{}"})])
    write_index(tmp_path / "shards", Index(source="folder", splits={"train": (shard,)}))
    refuses(lambda: train(tmp_path / "shards", tmp_path / "out"), "has no member jpg or png")


@pytest.mark.parametrize("name", hostile.tables(Path("x")))
@pytest.mark.parametrize("action", ["stop", "substitute"])
def test_tables_of_shards(tmp_path, name, action):
    shards = hostile.image_shards(tmp_path / "shards", table=hostile.tables(tmp_path)[name])
    flag = f"--corrupt.action={action}"
    refuses(lambda: train(shards, tmp_path / "out", flag), "train-0")


NAMES = ("pipe", "variable", "double", "scheme", "up", "absolute", "braces", "end-of-line",
         "counts", "bytes", "long-number", "deep")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_indexes(tmp_path, name):
    shards = hostile.image_shards(tmp_path / "shards", hostile.png(64, 64))
    (shards / "index.json").write_text(hostile.index_texts(shards)[name])
    thing = "train-0.tar" if name in ("counts", "bytes") else "index.json"
    refuses(lambda: train(shards, tmp_path / "out"), thing)
    if name != "bytes":  # whose image is whole all the same
        flag = "--corrupt.action=substitute"
        refuses(lambda: train(shards, tmp_path / "out", flag), thing)


@pytest.mark.parametrize("size", [(20_000, 20_000), (9000, 9000), (2**31 - 1, 2**31 - 1)])
def test_images_of_absurd_size(tmp_path, size):
    bomb = hostile.png(*size, grey=True, rows=size[0] if size[0] < 2**31 - 1 else 0)
    shards = hostile.image_shards(tmp_path / "shards", bomb)
    error = refuses(
        lambda: open_images(shards, "train", 64, progress=False), "train-0.tar: image a"
    )
    assert "pixels" in error
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "bomb.jpg").write_bytes(bomb)
    refuses(lambda: command(
        shard_data, shard_data.ShardData, "--source=folder", f"--root={tmp_path / 'folder'}",
        f"--out={tmp_path / 'out'}", "--workers=1",
    ), "bomb.jpg")  # fmt: skip


def test_the_largest_image_that_is_read_stays_below_the_limit_of_memory(tmp_path):
    shards = hostile.image_shards(tmp_path / "shards", hostile.png(7000, 9142))
    assert (open_images(shards, "train", 64, cache=False)[0] == 0).all()


@pytest.mark.parametrize("name", hostile.arrays(Path("x")))
def test_arrays_of_codes(tmp_path, name):
    codes = hostile.code_shards(tmp_path / "codes", hostile.arrays(tmp_path)[name])
    refuses(lambda: open_codes(codes, "train"), "train-0.tar: no codes in a")
    refuses(lambda: command(
        train_prior, train_prior.TrainPrior, f"--codes={codes}", f"--out={tmp_path / 'out'}"
    ), "no codes in a")  # fmt: skip


@pytest.mark.parametrize("name", ["pickle", "bomb"])
def test_caches(tmp_path, name):
    """A cache comes with the shards, from wherever they come: what is not as written here is made
    anew."""
    shards = hostile.image_shards(tmp_path / "shards", hostile.png(64, 64))
    images = open_images(shards, "train", 64, progress=False)
    path = shards / "cache" / images.recipe.hash / "train.metadata.npz"
    if name == "pickle":
        np.savez(path, keys=np.array([hostile.Evil(tmp_path)], object))
    else:
        hostile.cache_bomb(path, 600)
    assert (open_images(shards, "train", 64, progress=False)[:] == 0).all()


@pytest.mark.parametrize("name", hostile.safetensors(Path("x")))
def test_models(tmp_path, name):
    path = hostile.model(tmp_path / "vqvae", hostile.safetensors(tmp_path)[name])
    refuses(lambda: load_model(path), "vqvae/final")


@pytest.mark.parametrize(
    "about", [{"kind": ["vqvae"]}, {"kind": "os.system"}, {"model": {"class_path": "os.system"}},
              {"model": []}, {"model": {"channels": "many"}}, {"model": None}],
)  # fmt: skip
def test_configs_of_models(tmp_path, about):
    path = hostile.model(tmp_path / "vqvae", hostile.safetensors(tmp_path)["other"], **about)
    refuses(lambda: load_model(path, "vqvae"), "vqvae/final")


@pytest.mark.parametrize("size", [10**9, 2**62, 10**30])
@pytest.mark.parametrize("name", hostile.small_models())
def test_models_of_absurd_sizes(tmp_path, name, size):
    """Each size in turn is one that no memory, or no time, would be enough for."""
    kind, values, unused = hostile.small_models()[name]
    config_type, model_type = MODELS[kind]
    config = config_type(**values)
    weights = safetensors.torch.save(model_type(config).state_dict())
    sizes = dataclasses.asdict(config)
    load_model(hostile.model(tmp_path / "right", weights, kind=kind, model=sizes))
    for field, value in sizes.items():
        if isinstance(value, tuple | list) and value and isinstance(value[0], int):
            absurd = [*value[:-1], size]
        elif isinstance(value, int) or value is None:
            absurd = size
        else:
            continue
        about = {"kind": kind, "model": {**sizes, field: absurd}}
        path = hostile.model(tmp_path / field, weights, **about)
        if field in unused:
            with suppress(UserError):
                load_model(path)
        else:
            assert "final" in refuses(lambda path=path: load_model(path)), field


def test_a_grid_that_the_weights_do_not_tell(tmp_path):
    """Of a PixelCNN, whose scan for the slope takes memory for it."""
    kind, values, _ = hostile.small_models()["pixelcnn"]
    weights = safetensors.torch.save(make_prior(PriorConfig(**values)).state_dict())
    for number, grid in enumerate([(4, 10**6), (10**6, 4), (129, 129)]):
        about = {"kind": kind, "model": {**values, "grid": grid}}
        path = hostile.model(tmp_path / str(number), weights, **about)
        refuses(lambda path=path: load_model(path), "model.grid must be")
    largest = PriorConfig(**{**values, "grid": (MAX_GRID, MAX_GRID)})
    weights = safetensors.torch.save(make_prior(largest).state_dict())
    about = {"kind": kind, "model": dataclasses.asdict(largest)}
    load_model(hostile.model(tmp_path / "largest", weights, **about))


def test_weights_that_are_a_pickle(tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(hostile.Evil(tmp_path)))
    for content in (path.read_bytes(), saved(hostile.Evil(tmp_path))):
        path.write_bytes(content)
        sha256 = hostile.file_sha256(path)
        refuses(lambda s=sha256: inception_extractor(path, torch.device("cpu"), s), "evil.pt")


def saved(value: object) -> bytes:
    """As torch.save does."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", hostile.configs(Path("x")))
def test_yaml(tmp_path, name):
    path = tmp_path / "config.yaml"
    path.write_text(hostile.configs(tmp_path)[name])
    refuses(
        lambda: stage.parse(
            train_vqvae.TrainVQVAE, ["--data=d", f"--out={tmp_path}", f"--config={path}"]
        )
    )


@pytest.mark.parametrize("value", ["evil.Evil", "{class_path: evil.Evil, init_args: {}}"])
def test_yaml_imports_nothing(tmp_path, monkeypatch, value):
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / hostile.CANARY)!r}, 'w')\nclass Evil: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.yaml").write_text(f"model: {value}")
    flags = ["--data=d", "--out=o", f"--config={tmp_path / 'config.yaml'}"]
    refuses(lambda: stage.parse(train_vqvae.TrainVQVAE, flags), "evil.Evil")


def test_a_zip_with_members_outside_and_a_bomb(tmp_path):
    root = hostile.celeba_zip(tmp_path / "celeba")
    text = refuses(lambda: command(
        shard_data, shard_data.ShardData, "--source=celeba", f"--root={root}",
        f"--out={tmp_path / 'out'}", "--workers=1",
    ), "images cannot be used")  # fmt: skip
    assert "encoded bytes, more than" in text


@pytest.mark.parametrize("word", ["a\n#SBATCH --wrap=touch canary", "a\tb"])
def test_names_of_jobs(tmp_path, word, capsys):
    refuses(
        lambda: command(
            run_all, run_all.RunAll, "--configs=configs/debug", f"--out={tmp_path / word}",
            "--dry_run=true",
        ), "tab or an end of line",
    )  # fmt: skip
    assert capsys.readouterr().out == ""  # slurm/submit_all.sh takes what is printed


def test_html_in_names_stays_text(tmp_path):
    path = hostile.model(
        tmp_path / "x", b"", data={"source": "<script>alert(1)</script>"},
        model={"<img src=x onerror=y>": 1},
    )  # fmt: skip
    text = model_card.card(path / "final")
    assert "<script" not in text and "<img" not in text and "alert(1)" in text


def test_as_a_command_under_a_limit_of_memory(tmp_path):
    """The script itself, with an address space that a bomb would not fit into."""
    (tmp_path / "in").mkdir()
    for number, size in enumerate([(20_000, 20_000), (30_000, 30_000)]):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(hostile.png(*size, grey=True))
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = subprocess.run(
        [sys.executable, ROOT / "pipeline/shard_data.py", "--source=folder", "--workers=1",
         f"--root={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30)),
    )  # fmt: skip
    assert found.returncode == 2
    (error,) = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert "jpg" in error and "Traceback" not in found.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 20
