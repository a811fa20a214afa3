"""Feature extractors for torch-fidelity: the judge, and Inception from a file that is checked.

`inception` means the published weights and nothing else. Other weights go by the first 8 hex
digits of their SHA-256, and need it as a second word from the user.
"""

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3

from pipeline.models.classifier import Classifier
from pipeline.stage import UserError
from pipeline.training.checkpoint import load_model, model_sha256, read_about

PUBLISHED_SHA256 = "6726825d"  # first digits, as in the name of the published file
PUBLISHED_FILE = "weights-inception-2015-12-05-6726825d.pth"
# what torch.load and load_state_dict raise for anything but a dict of the right tensors
_NOT_WEIGHTS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, EOFError)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor of torch-fidelity and the name its figures go by."""

    name: str
    """inception, judge, or the first 8 hex digits of other weights' SHA-256."""
    sha256: str
    """Of the weights file."""
    module: FeatureExtractorBase
    """uint8 images (B, C, H, W) -> a tuple of features (B, F) in the order of `layers`."""
    device: torch.device
    channels: int
    """Colour channels of its images; grey ones are repeated."""


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


def find_extractors(
    judge: Path | None, inception: Path | None, inception_sha256: str | None, device: torch.device
) -> list[Extractor]:
    """The judge, and Inception where there are weights: none, one or both."""
    found = [judge_extractor(judge, device)] if judge else []
    if weights := find_inception_weights(inception):
        found.append(inception_extractor(weights, device, inception_sha256))
    return found


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


def find_inception_weights(path: Path | None) -> Path | None:
    """`path`, else the published file where torch.hub would have put it, else None."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED_FILE
    return path or (cached if cached.is_file() else None)


def inception_extractor(path: Path, device: torch.device, sha256: str | None = None) -> Extractor:
    """torch-fidelity's InceptionV3 (`inception-v3-compat`) with the weights of a file.

    Args:
        sha256: hash the file must have; may only be left out for the published weights.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--inception_weights {path} cannot be read: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    published = found.startswith(PUBLISHED_SHA256)
    if sha256 is not None and sha256.lower() != found:
        raise UserError(f"{path} has SHA-256 {found}, not --extractor_sha256 {sha256}")
    if sha256 is None and not published:
        raise UserError(
            f"{path} is not the published Inception file (SHA-256 {found}); give the file "
            f"{PUBLISHED_FILE}, or --extractor_sha256 {found} for figures named {found[:8]}"
        )
    name = "inception" if published else found[:8]
    try:
        # torch-fidelity unpickles whatever it is given, so it is given tensors read safely and
        # written again, not the file.
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save({key: torch.as_tensor(tensor) for key, tensor in state.items()}, safe)
        safe.seek(0)
        module = FeatureExtractorInceptionV3(
            name, ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
    except (pickle.UnpicklingError, *_NOT_WEIGHTS) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{path} cannot be read safely as Inception weights: {reason}") from error
    return Extractor(name, found, module.to(device).eval(), device, 3)
