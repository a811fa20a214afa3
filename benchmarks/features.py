"""Inception features of a folder of PNG files: torch-fidelity called plainly, and ours.

    python benchmarks/features.py --json runs/bench/features-cpu.json
    python benchmarks/features.py --device cuda --images 5000 --json runs/bench/features-cuda.json
    python benchmarks/features.py --record --images 10000 --json runs/bench/features-large.json

From files to features, in fp32 without TF32: `ours` is what evaluate.py does, opening the folder
and writing the features included; `torch-fidelity` is its own extraction with its own defaults
(batches of 64, four processes that decode). The folder holds drawn faces of 64 pixels. Both load
the same weights file: --weights, else the published one where torch.hub has it, else random weights
of the true architecture, which take as long.

No figure is written unless all features are within 1e-3, in units of the largest, and the Fréchet
distances between the two halves of the folder within 0.01. `ratio` is the median over the turns of
a contender's time divided by that of `ours`.

--record is for one large run of ours: two sets of --images each and the distance between them, with
the time and the most memory that the process ever had.
"""

import argparse
import hashlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from measure import print_table, refuse, version, write_json

try:
    from torch_fidelity import FeatureExtractorInceptionV3, feature_extractor_inceptionv3
    from torch_fidelity.defaults import DEFAULTS
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    from pipeline.data.faces import write_faces
    from pipeline.evaluation.extractors import find_inception_weights, inception_extractor
    from pipeline.evaluation.features import extract
    from pipeline.evaluation.fidelity import frechet_distance
    from pipeline.evaluation.sets import Folder
    from pipeline.stage import num_cpus
except ModuleNotFoundError as error:  # a bare interpreter has what kernels and models need
    print(f"features is left out: it needs {error.name}")
    sys.exit(0)

SIZE = 64
FEATURES, FRECHET = 1e-3, 0.01  # tolerances

Contender = Callable[[Path], torch.Tensor]  # a folder -> features (N, 2048)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, default=128, help="in a folder, at least 4")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--weights", type=Path, help="Inception weights file")
    parser.add_argument("--record", action="store_true", help="one large run of ours")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: no CUDA device here")
    if arguments.images < 4:
        refuse(f"--images {arguments.images}: two halves need at least 4")
    return arguments


def draw_faces(root: Path, count: int, seed: int) -> Path:
    """A folder of `count` PNG files."""
    write_faces(root, num_faces=count, size=SIZE, seed=seed, workers=num_cpus())
    return root / "img_align_celeba"


@torch.no_grad()
def random_inception(images: torch.Tensor) -> FeatureExtractorInceptionV3:
    """torch-fidelity's Inception with random weights, and in its batch norms the statistics of
    these images (B, 3, H, W) uint8, so that features are as large as those of trained weights."""
    torch.manual_seed(0)
    with (
        mock.patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url"),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        module = FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):  # He's scale, else all vanishes in 94 layers
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # of one batch: its own statistics
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.2)
    module.train()(images)
    return module.eval()


def ours(path: Path, sha256: str, device: str) -> Contender:
    extractor = inception_extractor(path, torch.device(device), sha256)

    def call(folder: Path) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as out:
            return extract(Folder(folder), [extractor], Path(out), "ours")[extractor.name]["2048"]

    return call


def torch_fidelity(path: Path, device: str) -> Contender:
    cuda = device == "cuda"
    module = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda, feature_extractor_weights_path=path, verbose=False
    )

    def call(folder: Path) -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            options = {"input1": str(folder), "cuda": cuda, "cache": False, "verbose": False}
            return extract_featuresdict_from_input_id(1, module, **DEFAULTS | options)["2048"]

    return call


def check(own: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Ends the script unless features (N, F) agree, by themselves and in a Fréchet distance."""
    if own.shape != other.shape:
        raise SystemExit(f"features {tuple(own.shape)} and {tuple(other.shape)} of the same folder")
    difference = float((own - other).abs().max() / other.abs().max())
    if not difference <= FEATURES:  # nan too
        raise SystemExit(f"features differ by {difference:.2g} of the largest")
    half = len(own) // 2
    distances = [frechet_distance(features[:half], features[half:]) for features in (own, other)]
    if not abs(distances[0] - distances[1]) <= FRECHET:
        raise SystemExit(f"Fréchet distances of these features differ: {distances}")
    return {"max_difference": difference, "frechet": distances[0], "their_frechet": distances[1]}


def compare(
    contenders: dict[str, Contender], folder: Path, count: int, rounds: int, device: str
) -> list[dict]:
    found, times = {}, {name: [] for name in contenders}
    for _ in range(rounds + 1):  # the first turn does not count
        for name, contender in contenders.items():
            start = time.perf_counter()
            found[name] = contender(folder)  # on the CPU, so the device has finished
            times[name].append(1e3 * (time.perf_counter() - start))
    agreement = check(found["ours"], found["torch-fidelity"])
    rows = []
    for name, (_, *own) in times.items():
        ratios = [a / b for a, b in zip(own, times["ours"][1:], strict=True)]
        median = statistics.median(own)
        rows.append({
            "contender": name, "case": f"{count} PNG files of {SIZE} px", "device": device,
            "extrapolated": False, "median_ms": median, "min_ms": min(own),
            "features_per_sec": 1e3 * count / median, "ratio": statistics.median(ratios),
            **(agreement if name == "ours" else {}),
        })  # fmt: skip
    return rows


def record(contender: Contender, folders: list[Path], count: int, device: str) -> dict:
    """One run of two sets, as large as an evaluation."""
    start = time.perf_counter()
    features = [contender(folder) for folder in folders]
    extracted = time.perf_counter()
    distance = frechet_distance(*features)
    end = time.perf_counter()
    row = {
        "contender": "ours", "case": f"{count} + {count} PNG files of {SIZE} px", "device": device,
        "extrapolated": False, "features_sec": extracted - start, "frechet_sec": end - extracted,
        "features_per_sec": len(folders) * count / (extracted - start), "frechet": distance,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }  # fmt: skip
    if device == "cuda":
        row["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def main() -> None:
    arguments = parse_arguments()
    count, device = arguments.images, arguments.device
    with tempfile.TemporaryDirectory() as work:
        folder = draw_faces(Path(work, "faces0"), count, seed=0)
        path = find_inception_weights(arguments.weights)
        source = "random" if path is None else path.name
        if path is None:
            path = Path(work, "random.pth")
            few = torch.from_numpy(Folder(folder)[np.arange(4)]).permute(0, 3, 1, 2)
            torch.save(random_inception(few).state_dict(), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        own = ours(path, sha256, device)
        if arguments.record:
            folders = [folder, draw_faces(Path(work, "faces1"), count, seed=1)]
            rows = [record(own, folders, count, device)]
        else:
            contenders = {"ours": own, "torch-fidelity": torch_fidelity(path, device)}
            rows = compare(contenders, folder, count, arguments.rounds, device)
    print_table(rows[0]["case"], rows, [f"weights: {source}"])
    versions = {"torch_fidelity": version("torch-fidelity"), "torchvision": version("torchvision")}
    write_json(arguments.json, rows, device, weights=source, weights_sha256=sha256, **versions)


if __name__ == "__main__":
    main()
