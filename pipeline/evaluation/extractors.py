"""Feature extractors for torch-fidelity: the judge, and known networks from files that are checked.

    found, absent = find_extractors(Path("runs/demo/classifier-judge"), None, None, device)
    print(*absent, sep="\\n")        what is not there, and how to get it

Names like `inception`, `dinov2-vit-s-14` and `clip-vit-b-32` mean the published weights, known by
their SHA-256, and nothing else. Other weights go by the first 8 hex digits of theirs, and need it
as a second word from the user. A file is read once, its hash checked before anything is made of it,
and only tensors are unpickled.
"""

import hashlib
import io
import os
import pickle
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP_MODELS
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP, build_model
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.sample_similarity_base import SampleSimilarityBase
from torch_fidelity.sample_similarity_lpips import (
    URL_VGG16_LPIPS,
    NetLinLayer,
    SampleSimilarityLPIPS,
    VGG16features,
)
from torchvision.models.vgg import VGG16_Weights, cfgs, make_layers

from pipeline.evaluation.inception import FoldedInception
from pipeline.models.blocks import true_fp32
from pipeline.models.classifier import Classifier
from pipeline.stage import UserError
from pipeline.training.checkpoint import load_model, model_sha256, read_about

DOWNLOAD_TIMEOUT_SEC = 30.0  # without a byte
# what torch.load and the networks raise for anything but a dict of the right tensors
_NOT_WEIGHTS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError,
)  # fmt: skip


class Network(NamedTuple):
    """A known network, and where its weights come from."""

    title: str
    flag: str
    """Option that names its weights file."""
    source: str
    """Of the published file."""
    published: dict[str, str]
    """SHA-256 -> the name of its figures."""


INCEPTION = Network(
    "Inception",
    "--inception_weights",
    URL_INCEPTION_V3,
    {"6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "inception"},
)
DINOV2 = Network(
    "DINOv2",
    "--dinov2_weights",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    {
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9": "dinov2-vit-s-14",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73": "dinov2-vit-b-14",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428": "dinov2-vit-l-14",
    },
)
DINOV2_CODE = "https://github.com/facebookresearch/dinov2"
DINOV2_WIDTHS = {  # of the class token -> the function of hubconf.py
    384: "dinov2_vits14",
    768: "dinov2_vitb14",
    1024: "dinov2_vitl14",
    1536: "dinov2_vitg14",
}
CLIP = Network(
    "CLIP",
    "--clip_weights",
    "https://openaipublic.azureedge.net/clip/models/"
    f"{CLIP_MODELS['clip-vit-b-32']['hash']}/ViT-B-32.pt",
    {model["hash"]: name for name, model in CLIP_MODELS.items()},
)
LPIPS = Network(
    "LPIPS",
    "--lpips_weights",
    URL_VGG16_LPIPS,
    {"a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868": "lpips"},
)
VGG16 = Network(
    "VGG16",
    "--vgg16_weights",
    VGG16_Weights.IMAGENET1K_V1.url,
    {"397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0": "vgg16"},
)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor of torch-fidelity and the name its figures go by."""

    name: str
    """judge, a published network's, or the first 8 hex digits of other weights' SHA-256."""
    sha256: str
    """Of the weights file."""
    module: FeatureExtractorBase
    """uint8 images (B, C, H, W) -> a tuple of features (B, F) in the order of `layers`."""
    device: torch.device
    channels: int
    """Colour channels of its images; grey ones are repeated."""


@dataclass(frozen=True)
class Similarity:
    """LPIPS, the distance of two images on the features of VGG16 (Zhang et al. 2018, eq. 1)."""

    name: str
    """lpips, or the first 8 hex digits of the SHA-256 of other weights."""
    sha256: str
    """Of the two files, one after the other: of LPIPS and of VGG16."""
    module: SampleSimilarityLPIPS
    device: torch.device

    @torch.no_grad()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> torch.Tensor:
        """Images (B, H, W, C) uint8, C 1 or 3, H and W at least 16 -> (B,) float32 on the CPU."""
        pair = [
            torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
            for images in (a, b)
        ]
        with true_fp32():
            return self.module(*pair).flatten().cpu()


def find_extractors(
    judge: Path | None,
    inception: Path | None,
    extractor_sha256: str | None,
    device: torch.device,
    *,
    dinov2: Path | None = None,
    dinov2_code: Path | None = None,
    clip: Path | None = None,
    download: bool = False,
) -> tuple[list[Extractor], list[str]]:
    """The extractors that can be had, and a line for each of the others that says how to get it.

    Args:
        judge: run directory of train_classifier.py.
        inception, dinov2, clip: weights files. Inception's is also found where torch.hub keeps it.
        extractor_sha256: of the files that are not the published ones, separated by commas.
        dinov2_code: checkout of DINOv2's repository, whose code is run; None = torch.hub's.
        download: fetch the published Inception file where there is none.

    Raises UserError for a file that is not what it should be, and a download that fails.
    """
    found, absent = [], []
    if judge:
        found.append(judge_extractor(judge, device))
    else:
        absent.append("no judge's features: train one with train_classifier.py, give it as --judge")
    if weights := find_inception_weights(inception, download):
        found.append(inception_extractor(weights, device, extractor_sha256))
    else:
        absent.append(f"no FID: {_way_to(INCEPTION)}, or --download")
    if dinov2:
        found.append(dinov2_extractor(dinov2, device, extractor_sha256, dinov2_code))
    else:
        absent.append(f"no DINOv2 features: {_way_to(DINOV2)}, and a checkout of {DINOV2_CODE}")
    if clip:
        found.append(clip_extractor(clip, device, extractor_sha256))
    else:
        absent.append(f"no CLIP features: {_way_to(CLIP)}")
    return found, absent


def find_similarity(
    lpips: Path | None, vgg16: Path | None, extractor_sha256: str | None, device: torch.device
) -> tuple[Similarity | None, list[str]]:
    """LPIPS, or a line that says how to get it; files as in `find_extractors`, found where
    torch.hub keeps them if they are not given."""
    lpips, vgg16 = lpips or _in_hub(LPIPS), vgg16 or _in_hub(VGG16)
    if lpips and vgg16:
        return lpips_similarity(lpips, vgg16, device, extractor_sha256), []
    missing = [network for network, path in ((LPIPS, lpips), (VGG16, vgg16)) if not path]
    return None, [f"no LPIPS: {', and '.join(map(_way_to, missing))}"]


def check_recipe(recipe_hash: str, size: int, data: Path, checkpoint: Path, judge: Path | None):
    """Raises UserError unless checkpoint and judge were trained on images of the data's recipe."""
    trained_on = read_about(checkpoint)["recipe"]
    if trained_on != recipe_hash:
        raise UserError(
            f"{checkpoint} was trained on recipe {trained_on}, {data} has {recipe_hash}; give the "
            "shards it was trained on"
        )
    if judge and read_about(judge)["recipe"] != recipe_hash:
        raise UserError(
            f"{judge} was trained on images of another recipe than {checkpoint}; "
            f"train a judge with --image_size {size}"
        )


# The judge.


class JudgeFeatures(FeatureExtractorBase):
    """The classifier's features before its last layer, as torch-fidelity wants them."""

    def __init__(self, model: Classifier, name: str = "judge"):
        super().__init__(name, ["features"])
        self.model = model

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, C, H, W) uint8 -> features (B, F)."""
        return (self.model.features(input.float().div(255)).float(),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"fid": "features", "kid": "features", "prc": "features"}[metric]


def judge_extractor(path: Path, device: torch.device) -> Extractor:
    """The trained judge of a run directory."""
    model = load_model(path, "classifier")
    module = JudgeFeatures(model).to(device).eval()
    return Extractor("judge", model_sha256(path), module, device, model.config.in_channels)


# Weights files.


class Weights(NamedTuple):
    """A weights file that may be used: published, or with a hash that the user gave."""

    network: Network
    path: Path
    name: str
    """That figures on it go by."""
    sha256: str
    content: bytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """The file's tensors by name; nothing but tensors is unpickled."""
        try:
            with warnings.catch_warnings(action="ignore"):  # what is refused is said below
                state = torch.load(io.BytesIO(self.content), map_location="cpu", weights_only=True)
            return {key: torch.as_tensor(tensor) for key, tensor in state.items()}
        except (pickle.UnpicklingError, *_NOT_WEIGHTS) as error:
            reason = str(error).strip().split("\n")[0][:120]
            raise UserError(
                f"{self.path} cannot be read safely as {self.network.title} weights: {reason}"
            ) from error

    def refusal(self, error: Exception) -> UserError:
        """What to raise where its tensors do not fit, with the first reason."""
        reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error)
        reason = reason.rpartition("state_dict for")[2].partition("\n\t")[2] or reason
        return UserError(
            f"{self.path} has the weights of another network than {self.network.title}: "
            f"{' '.join(reason.split())[:120]}"
        )


def read_weights(network: Network, path: Path, sha256: str | None) -> Weights:
    """Args: sha256: that the file may have, unless it is the published one; or several, separated
    by commas."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{network.flag} {path} cannot be read: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    name = network.published.get(found)
    if name is None and sha256 is None:
        raise UserError(
            f"{path} is not the published {network.title} file, or only a part of it (SHA-256 "
            f"{found}); give that of {network.source}, or --extractor_sha256 {found} for figures "
            f"named {found[:8]}"
        )
    if name is None and found not in str(sha256).lower().split(","):
        raise UserError(f"{path} has SHA-256 {found}, not --extractor_sha256 {sha256}")
    return Weights(network, path, name or found[:8], found, content)


def _way_to(network: Network) -> str:
    return f"give {network.flag} FILE ({network.source})"


def _hub_path(network: Network) -> Path:
    """Where torch.hub puts the published file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / network.source.rpartition("/")[2]


def _in_hub(network: Network) -> Path | None:
    path = _hub_path(network)
    return path if path.is_file() else None


def find_inception_weights(path: Path | None, download: bool = False) -> Path | None:
    """`path`, else the published file where torch.hub has it or `download` puts it, else None."""
    return path or _in_hub(INCEPTION) or (download_inception() if download else None)


def download_inception() -> Path:
    """Fetches the published file to where torch.hub keeps such files; whole and checked, or not at
    all."""
    path = _hub_path(INCEPTION)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SEC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION.source, str(path), next(iter(INCEPTION.published)))
    except (OSError, HTTPException, RuntimeError) as error:  # the last: a wrong hash
        raise UserError(
            f"{INCEPTION.source} cannot be downloaded ({error}); fetch it elsewhere and give "
            f"{INCEPTION.flag} FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


# Networks.


def inception_extractor(path: Path, device: torch.device, sha256: str | None = None) -> Extractor:
    """torch-fidelity's InceptionV3 (`inception-v3-compat`), folded, with the weights of a file.

    Args:
        sha256: hash the file must have; may only be left out for the published weights.
    """
    weights = read_weights(INCEPTION, path, sha256)
    # torch-fidelity unpickles whatever it is given, so it is given tensors read safely and
    # written again, not the file.
    safe = io.BytesIO()
    torch.save(weights.tensors(), safe)
    safe.seek(0)
    try:
        original = FeatureExtractorInceptionV3(
            weights.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
    except _NOT_WEIGHTS as error:
        raise weights.refusal(error) from error
    return _extractor(weights, FoldedInception(original), device)


def dinov2_extractor(
    path: Path, device: torch.device, sha256: str | None = None, code: Path | None = None
) -> Extractor:
    """torch-fidelity's DINOv2 with the weights of a file.

    The network itself is in no package: `code` is a checkout of its repository, which is run; None
    = where torch.hub keeps it.
    """
    weights = read_weights(DINOV2, path, sha256)
    code = code or Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    if not (code / "hubconf.py").is_file():
        raise UserError(
            f"{code} has no hubconf.py; git clone {DINOV2_CODE} and give it as --dinov2_code"
        )
    os.environ["XFORMERS_DISABLED"] = "1"  # as torch-fidelity does
    state = weights.tensors()
    try:
        function = DINOV2_WIDTHS[state["cls_token"].shape[-1]]
        model: Any = torch.hub.load(str(code), function, source="local", pretrained=False)
        model.load_state_dict(state)
    except _NOT_WEIGHTS as error:
        raise weights.refusal(error) from error
    return _extractor(weights, _bare(FeatureExtractorDinoV2, weights, "dinov2", model), device)


def clip_extractor(path: Path, device: torch.device, sha256: str | None = None) -> Extractor:
    """torch-fidelity's CLIP, whose size is read off the weights.

    The published files are TorchScript, which is code, so only they are read as that; others must
    be a dict of tensors under the same names.
    """
    weights = read_weights(CLIP, path, sha256)
    if weights.sha256 in CLIP.published:
        with warnings.catch_warnings(action="ignore"):  # deprecated, and published that way
            script = torch.jit.load(io.BytesIO(weights.content), map_location="cpu")
        state = dict(script.state_dict())
    else:
        state = weights.tensors()
    try:
        model = build_model(state, torch.float32)
    except _NOT_WEIGHTS as error:
        raise weights.refusal(error) from error
    module = _bare(FeatureExtractorCLIP, weights, "clip", model)
    module.resolution = model.visual.input_resolution
    return _extractor(weights, module, device)


def lpips_similarity(
    lpips: Path, vgg16: Path, device: torch.device, sha256: str | None = None
) -> Similarity:
    """torch-fidelity's LPIPS with the weights of two files."""
    own, base = read_weights(LPIPS, lpips, sha256), read_weights(VGG16, vgg16, sha256)
    layers, prefix = make_layers(cfgs["D"]), "features."
    features = {
        key.removeprefix(prefix): tensor
        for key, tensor in base.tensors().items()
        if key.startswith(prefix)  # the others are of its classifier
    }
    _load(layers, features, base)
    net = VGG16features.__new__(VGG16features)
    torch.nn.Module.__init__(net)
    for number, (start, stop) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), 1):
        net.add_module(f"slice{number}", layers[start:stop])

    module = SampleSimilarityLPIPS.__new__(SampleSimilarityLPIPS)
    SampleSimilarityBase.__init__(module, "lpips-vgg16")
    module.sample_similarity_resize = module.sample_similarity_dtype = None
    module.L = 5
    module.lins = [NetLinLayer(width, use_dropout=True) for width in (64, 128, 256, 512, 512)]
    for number, lin in enumerate(module.lins):
        module.add_module(f"lin{number}", lin)
    _load(module, own.tensors(), own)
    module.net = net
    name = own.name if base.sha256 in VGG16.published else base.name
    hashes = own.sha256 + base.sha256
    return Similarity(name, hashes, module.requires_grad_(False).to(device).eval(), device)


def _bare(
    kind: type[FeatureExtractorBase], weights: Weights, layer: str, model: torch.nn.Module
) -> Any:
    """An extractor of torch-fidelity around a network, without its __init__, which downloads."""
    module: Any = kind.__new__(kind)
    FeatureExtractorBase.__init__(module, weights.name, [layer])
    module.feature_extractor_internal_dtype = torch.float32
    module.model = model
    return module


def _load(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], weights: Weights
) -> torch.nn.Module:
    try:
        module.load_state_dict(state)
    except _NOT_WEIGHTS as error:
        raise weights.refusal(error) from error
    return module


def _extractor(weights: Weights, module: FeatureExtractorBase, device: torch.device) -> Extractor:
    module = module.requires_grad_(False).to(device).eval()
    return Extractor(weights.name, weights.sha256, module, device, 3)
