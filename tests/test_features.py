"""Features by number: every image exactly once, whatever the batches, the processes and the end."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch_fidelity import FeatureExtractorBase

from pipeline.evaluation import features
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.features import assemble, extract
from pipeline.evaluation.sets import Choice
from pipeline.stage import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)


class Moments(FeatureExtractorBase):
    """Features that are easily computed by hand, in two layers."""

    def __init__(self, name="moments", layers=("mean", "corner")):
        super().__init__(name, list(layers))
        self.seen = 0

    def forward(self, input):
        self.seen += len(input)
        found = {"mean": input.double().mean((2, 3)), "corner": input[:, 0, :2, 0].float()}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return ("mean", "corner")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "mean"


def extractor(name="moments", sha256="a" * 64, channels=3, **options) -> Extractor:
    return Extractor(name, sha256, Moments(name, **options), CPU, channels)


def image(number, channels=3):
    return np.random.default_rng(number).integers(0, 256, (6, 5, channels), np.uint8)


class Noise:
    """Image n is made of n; remembers which were asked for, and may kill its process."""

    def __init__(self, count=34, channels=3, kill_at=None):
        self.count, self.channels, self.kill_at, self.asked = count, channels, kill_at, []
        self.protocol = {"source": "noise", "channels": channels}

    def __len__(self):
        return self.count

    def __getitem__(self, numbers):
        if self.kill_at in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked += numbers.tolist()
        return np.stack([image(number, self.channels) for number in numbers])


class Untouchable(Noise):
    def __getitem__(self, numbers):
        raise AssertionError(f"asked for {numbers}")


def check(found, numbers, name="moments"):
    """The features are those of these images, in this order."""
    images = np.stack([image(number) for number in numbers]).astype(float)
    assert found.keys() == {name} and found[name].keys() == {"mean", "corner"}
    assert all(f.dtype == torch.float32 for f in found[name].values())
    assert np.allclose(found[name]["mean"], images.mean((1, 2)), rtol=1e-6)
    assert np.array_equal(found[name]["corner"], images[:, :2, 0, 0])


def in_processes(count, function):
    """Runs `function(rank, send)` in forked processes; returns exit codes and what was sent."""
    context = get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=function, args=(rank, queue.put)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    sent = []
    while not queue.empty():
        sent.append(queue.get())
    return [process.exitcode for process in processes], sent


@pytest.mark.parametrize("batch_size", [1, 7, 10, 100])
def test_each_image_is_asked_for_once_in_batches_of_any_size(tmp_path, batch_size):
    images = Noise()
    check(extract(images, [extractor()], tmp_path, "x", batch_size=batch_size), range(34))
    assert images.asked == list(range(34))


def test_features_follow_the_order_of_the_numbers(tmp_path):
    order = np.random.default_rng(0).permutation(34)
    check(extract(Choice(Noise(), order), [extractor()], tmp_path, "x"), order)


def test_two_processes_deal_the_chunks_and_the_first_has_all_features(tmp_path):
    extract(Noise(), [extractor()], tmp_path, "x")
    (chunk,) = tmp_path.glob("*/000000020.safetensors")
    chunk.unlink()  # one is damaged, one is lost, one never was
    (folder,) = tmp_path.glob("*/")
    (folder / "000000000.safetensors").write_bytes(b"damaged")
    (folder / "000000030.safetensors").unlink()

    def work(rank, send):
        method = f"file://{tmp_path}/meeting-point"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
        images = Noise()
        found = extract(images, [extractor()], tmp_path, "x", batch_size=4)
        if rank == 0:
            check(found, range(34))
        send((rank, images.asked, found == {}))
        dist.destroy_process_group()

    codes, sent = in_processes(2, work)
    assert codes == [0, 0]
    assert sorted(sent) == [
        (0, [*range(10), *range(30, 34)], False),
        (1, [*range(20, 30)], True),
    ]
    check(extract(Untouchable(), [extractor()], tmp_path, "x"), range(34))


def test_a_killed_run_goes_on_with_what_was_committed(tmp_path):
    def work(rank, send):
        extract(Noise(kill_at=25), [extractor()], tmp_path, "x", batch_size=5)

    assert in_processes(1, work)[0] == [-signal.SIGKILL]
    committed = sorted(path.name for path in tmp_path.glob("*/*.safetensors"))
    assert committed == ["000000000.safetensors", "000000010.safetensors"]
    images = Noise()
    check(extract(images, [extractor()], tmp_path, "x"), range(34))
    assert images.asked == list(range(20, 34))


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "empty"])
def test_a_damaged_chunk_is_named_and_made_again(tmp_path, capsys, damage):
    extract(Noise(), [extractor()], tmp_path, "x")
    (path,) = tmp_path.glob("*/000000010.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "flipped bit":
        data[-3] ^= 1
    path.write_bytes(data[: {"cut": len(data) - 8, "flipped bit": None, "empty": 0}[damage]])
    images = Noise()
    check(extract(images, [extractor()], tmp_path, "x"), range(34))
    assert images.asked == list(range(10, 20))
    assert f"{path} is damaged" in capsys.readouterr().out


def test_features_that_are_there_need_no_images(tmp_path, capsys):
    extract(Noise(), [extractor()], tmp_path, "x")
    capsys.readouterr()
    check(extract(Untouchable(), [extractor()], tmp_path, "reference"), range(34))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "reference: moments features are there already" in lines[0]
    other = Untouchable()
    other.protocol = {"source": "other noise"}
    changed = (
        (Untouchable(count=33), extractor()),
        (other, extractor()),
        (Untouchable(), extractor(sha256="b" * 64)),
        (Untouchable(), extractor(layers=("mean",))),
    )
    for images, weights in changed:
        with pytest.raises(AssertionError, match="asked for"):
            extract(images, [weights], tmp_path, "x")


def test_only_the_extractor_that_lacks_them_sees_the_images(tmp_path):
    old, new = extractor(), extractor("other", "b" * 64)
    extract(Noise(), [old], tmp_path, "x")
    images = Noise()
    found = extract(images, [old, new], tmp_path, "x")
    assert (old.module.seen, new.module.seen) == (34, 34)
    assert images.asked == list(range(34)) and found.keys() == {"moments", "other"}
    images = Noise(count=20)  # each image is made once for both
    extract(images, [old, new], tmp_path, "x")
    assert images.asked == list(range(20)) and (old.module.seen, new.module.seen) == (54, 54)


def chunk(numbers):
    return {"numbers": torch.tensor(numbers), "mean": torch.tensor(numbers)[:, None].float()}


def test_chunks_are_put_together_by_their_numbers_and_must_be_complete():
    found = assemble([chunk([4, 0]), chunk([3, 1, 2])], 5, Path("there"))
    assert found["mean"][:, 0].tolist() == [0, 1, 2, 3, 4]
    for chunks, message in (
        ([chunk([0, 1]), chunk([1, 2])], "there has image 1 2 times, expected once"),
        ([chunk([0, 1, 1]), chunk([2])], "there has image 1 2 times"),
        ([chunk([0, 2])], "there has image 1 0 times"),
        ([chunk([0, 1, 2]), chunk([3])], "there has image 3 of 3"),
        ([chunk([0, 1, -2])], "there has image"),
    ):
        with pytest.raises(UserError, match=message):
            assemble(chunks, 3, Path("there"))


def test_a_chunk_under_another_name_is_refused(tmp_path):
    extract(Noise(), [extractor()], tmp_path, "x")
    (folder,) = tmp_path.glob("*/")
    shutil.copy(folder / "000000010.safetensors", folder / "000000020.safetensors")
    with pytest.raises(UserError, match="has image 10 2 times, expected once; delete it"):
        extract(Untouchable(), [extractor()], tmp_path, "x")


def test_features_that_are_not_finite_are_refused_with_the_number(tmp_path, monkeypatch):
    images, weights = Noise(), extractor()
    forward = weights.module.forward

    def broken(batch):
        means, corners = forward(batch)
        means[(batch.numpy() == image(13).transpose(2, 0, 1)).all((1, 2, 3))] = torch.inf
        return means, corners

    monkeypatch.setattr(weights.module, "forward", broken)
    with pytest.raises(UserError, match="samples: the moments features of image 13") as refusal:
        extract(images, [weights], tmp_path, "samples", batch_size=4)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.glob("*/*.safetensors")] == ["000000000.safetensors"]


def test_grey_images_are_repeated_and_other_channels_refused(tmp_path):
    found = extract(Noise(channels=1), [extractor()], tmp_path, "x")["moments"]["mean"]
    assert torch.equal(found[:, 0], found[:, 2]) and len(found[:, 0].unique()) > 30
    with pytest.raises(UserError, match="channels"):
        extract(Noise(channels=4), [extractor()], tmp_path, "x")


def test_images_that_are_short_of_what_was_asked_for_are_a_bug(tmp_path):
    images = Noise()
    images.__class__ = type("Short", (Noise,), {"__getitem__": lambda self, n: image(0)[None]})
    with pytest.raises(RuntimeError, match="1 images for 10 numbers"):
        extract(images, [extractor()], tmp_path, "x")


MEMORY = """
    import hashlib, sys
    from pathlib import Path

    import numpy as np
    import torch
    from torch_fidelity import FeatureExtractorInceptionV3
    from torch_fidelity import feature_extractor_inceptionv3 as inception_module

    from pipeline.evaluation import fidelity
    from pipeline.evaluation.extractors import inception_extractor
    from pipeline.evaluation.features import extract

    torch.set_num_threads(1)
    load = FeatureExtractorInceptionV3.load_state_dict
    inception_module.load_state_dict_from_url = lambda *_, **__: {}
    FeatureExtractorInceptionV3.load_state_dict = lambda *_: None
    path = Path(sys.argv[1], "weights.pth")
    torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    FeatureExtractorInceptionV3.load_state_dict = load

    class Noise:
        protocol = {}
        def __len__(self):
            return 200
        def __getitem__(self, numbers):
            rng = np.random.default_rng(numbers[0])
            return rng.integers(0, 256, (len(numbers), 64, 64, 3), np.uint8)

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    inception = inception_extractor(path, torch.device("cpu"), sha256)
    found = extract(Noise(), [inception], path.parent, "images")[sha256[:8]]
    assert found["2048"].shape == (200, 2048)

    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((20_000, 2048), np.float32)) for _ in "ab")
    assert 0 < fidelity.frechet_distance(a, b.add_(0.1)) < 1000
    # of this program alone; getrusage would count in the one that started it
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_real_graph_and_full_statistics_stay_under_two_gigabytes(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), tmp_path], cwd=ROOT, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert 0.5 < float(result.stdout.split()[-1]) < 2.0
