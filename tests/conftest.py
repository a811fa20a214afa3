"""Seeds, and what several test files share: tiny data sets, and stages run as users run them."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is defined

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)  # the models here are too small for more, and results repeat
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def face_shards(tmp_path_factory) -> Path:
    """Shards of 160 drawn faces at 32 px, in three splits."""
    # imported here, because the GPU tests run where the stages' packages are not installed
    from faults import make_shards

    return make_shards(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory) -> Path:
    """Shards of MNIST's form: 120 + 12 grey squares whose size goes with the class."""
    from pipeline.shard_data import ShardData
    from pipeline.shard_data import main as shard_data

    root = tmp_path_factory.mktemp("digits")
    generator = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 12)):
        labels = generator.integers(0, 10, count).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 : 6 + 2 * label, 4 : 6 + 2 * label] = generator.integers(100, 256)
        header = struct.pack(">4i", 2051, count, 28, 28)
        (root / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2i", 2049, count)
        (root / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    shard_data(ShardData(source="mnist", root=root, out=root / "shards", workers=1))
    return root / "shards"


def run_stage(*arguments, launcher=(), cwd=None, check=True, **env):
    """Runs a stage script as a user would: `run_stage("train_vqvae.py", "--data", ...)`."""
    script, *flags = arguments
    command = [sys.executable, *launcher, str(ROOT / "pipeline" / script), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{command}\n{result.stdout}\n{result.stderr}")
    return result


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
