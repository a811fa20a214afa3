"""The first 20 steps of the debug config on the CPU, against a stored file.

The file guards against accidental change only: `make golden` renews it, with a line in
CHANGELOG.md.
Bit-equal where CPU, threads and versions are those of its header, else within 1e-4.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch

from pipeline import stage
from pipeline.data.faces import write_faces
from pipeline.shard_data import ShardData
from pipeline.shard_data import main as shard_data
from pipeline.train_vqvae import TrainVQVAE
from pipeline.train_vqvae import main as train_vqvae

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "golden" / "debug_train_vqvae.json"
TAGS = ["loss/total", "loss/reconstruction", "loss/commitment", "gradient/norm"]


def header() -> dict:
    """What decides whether two machines compute the same bits."""
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "versions": stage.provenance()["versions"],
    }


def first_steps(directory: Path) -> list[dict]:
    """Metrics of 20 steps of the debug config on 160 drawn faces."""
    torch.set_num_threads(1)
    faces = directory / "faces"
    write_faces(faces, num_faces=160, size=32, seed=0, workers=1)
    shard_data(ShardData(source="faces", root=faces, out=directory / "shards", num_faces=160,
                         face_size=32, workers=1))  # fmt: skip
    arguments = [f"--config={ROOT}/configs/debug/train_vqvae.yaml"]
    arguments += [f"--data={directory}/shards", f"--out={directory}/vqvae"]
    config = stage.parse(TrainVQVAE, arguments)
    train_vqvae(dataclasses.replace(config, total_images=20 * config.batch_size, log_every=1))
    text = (directory / "vqvae" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{tag: line[tag] for tag in TAGS} for line in lines if "loss/total" in line]


def test_first_steps_are_the_golden_ones(tmp_path):
    golden = json.loads(FILE.read_text())
    steps = first_steps(tmp_path)
    assert len(steps) == len(golden["steps"]) == 20
    if golden["header"] == header():
        assert steps == golden["steps"]
    for step, expected in zip(steps, golden["steps"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        result = {"header": header(), "steps": first_steps(Path(directory))}
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {FILE}; add a line to CHANGELOG.md")
