"""Atomic checkpoint directories: safetensors and JSON with a manifest, never a pickle.

    <out>/checkpoints/images-000012800/   model, average and optimizer tensors, state.json
    <out>/final/                          the model that the next stage reads, with its config

A directory is written under a temporary name, every file fsynced, the manifest (sizes and SHA-256)
last, then renamed: under its final name it is whole. Tensor names and dtypes do not depend on how
many processes trained.
"""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.data.shards import file_sha256, sync
from pipeline.models import MODELS
from pipeline.stage import UserError
from pipeline.training import zero

MANIFEST = "manifest.json"
Tensors = Mapping[str, torch.Tensor]

# What a resumed run may change: it alters neither the order of the data nor the mathematics of a
# step. Everything else is refused by name.
CHANGEABLE = frozenset(
    {"out", "data", "codes", "total_images", "workers", "cache", "dry_run"}
    | {"log_every", "validate_every", "save_every", "compare_every"}
    | {"accumulation", "compile", "max_skipped_steps", "learning_rate"}
    | {"patience", "checkpoint_activations"}
)


class Checkpoint(NamedTuple):
    """A verified checkpoint directory."""

    path: Path
    images_seen: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under `name`, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")


def write_directory(path: Path, tensors: Mapping[str, Tensors], documents: Mapping[str, Any]):
    """Commits `<name>.safetensors` and `<name>.json` files as one directory: under its name it is
    whole or not there. An existing directory of that name is moved aside just before, and removed
    after the commit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        for name, group in tensors.items():
            contiguous = {key: t.detach().cpu().contiguous() for key, t in group.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        for name, document in documents.items():
            (temporary / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        files = sorted(temporary.iterdir())
        manifest = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files}
        (temporary / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1) + "\n")
        for file in [*files, temporary / MANIFEST, temporary]:
            sync(file)
        trash = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
        if path.exists():
            path.rename(trash)
        temporary.rename(path)
        sync(path.parent)
        shutil.rmtree(trash, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fault_of(path: Path) -> str | None:
    """Why a checkpoint directory cannot be trusted, or None if every file matches its hash."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            file = path / Path(name).name
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
            if file_sha256(file) != entry["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, out: Path):
        self.root = out / "checkpoints"

    def save(self, images_seen: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> Path:
        """Commits one checkpoint; `state` must be JSON and contain the resolved config."""
        path = self.root / f"images-{images_seen:09d}"
        write_directory(path, tensors, {"state": {"images_seen": images_seen, **state}})
        return path

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where nothing was ever committed.

        Names the ones it skips; raises UserError if there are some and all of them fail.
        """
        candidates = sorted(self.root.glob("images-*"), reverse=True)
        for path in candidates:
            fault = fault_of(path)
            if fault is None:
                state = json.loads((path / "state.json").read_text())
                return Checkpoint(path, state["images_seen"], state)
            print(f"warning: skipping checkpoint {path}: {fault}")
        if candidates:
            raise UserError(
                f"{self.root}: all {len(candidates)} checkpoints are damaged; "
                "restore one, or start anew with another --out"
            )
        return None


def refuse_changed_config(old: Mapping[str, Any], new: Mapping[str, Any], out: Path) -> None:
    """Raises UserError naming the keys in which a resumed run differs where it may not."""
    changed = [
        f"{key} (was {before}, now {after})"
        for key, (before, after) in _differences(old, new).items()
        if key.split(".")[-1] not in CHANGEABLE
    ]
    if changed:
        raise UserError(
            f"{out} holds a run with another config: {'; '.join(changed)}; "
            "use the old values to resume, or another --out to start anew"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict:
    found = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[prefix + key] = (before, after)
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    """Adam's moments and step counts as `<parameter name>.<moment>` -> tensor."""
    if zero.is_partitioned(optimizer):
        return zero.optimizer_tensors(optimizer, model)
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors
) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer over the same parameters."""
    if zero.is_partitioned(optimizer):
        zero.load_optimizer_tensors(optimizer, model, tensors)
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {}
    for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        prefix = names[parameter] + "."
        own = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
        # a child module may have a parameter whose name starts alike; moments have no dot
        if moments := {key: t for key, t in own.items() if "." not in key}:
            state[index] = {key: _like(parameter, t) for key, t in moments.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(parameter: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A moment in its parameter's memory layout: fused optimizers walk both by raw address."""
    if moment.shape != parameter.shape:
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def training_tensors(model: nn.Module, average: nn.Module, optimizer: Any) -> dict[str, Tensors]:
    """All tensors of a training run, by file, as `Checkpoints.save` takes them."""
    return {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer_tensors(optimizer, model),
    }


def restore_training(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    data_sha256: str,
    model: nn.Module,
    average: nn.Module,
    optimizer: Any,
) -> int:
    """Puts a checkpoint back into a run; returns its images seen.

    Raises UserError naming what differs, if the run's config or data are not the checkpoint's.
    """
    out = checkpoint.path.parents[1]
    refuse_changed_config(checkpoint.state["config"], config, out)
    if checkpoint.state["data_sha256"] != data_sha256:
        raise UserError(f"{out} was trained on other data; use those, or another --out")
    model.load_state_dict(checkpoint.tensors("model"))
    average.load_state_dict(checkpoint.tensors("average"))
    load_optimizer_tensors(optimizer, model, checkpoint.tensors("optimizer"))
    return checkpoint.images_seen


def save_model(out: Path, kind: str, model: nn.Module, about: dict[str, Any]) -> str:
    """Writes `<out>/final/` and returns the SHA-256 of its weights, by which others refer to it.

    Args:
        kind: the model's name in `pipeline.models.MODELS`.
        about: JSON for the next stage: the stage's config, images seen, validation figures.
    """
    config = dataclasses.asdict(model.config)  # pyright: ignore[reportArgumentType]
    document = {"kind": kind, "model": config, **about}
    write_directory(out / "final", {"model": model.state_dict()}, {"config": document})
    return model_sha256(out)


def final_directory(path: Path) -> Path:
    """`path` itself if it holds a saved model, else its `final/`."""
    for candidate in (path, path / "final"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{path} holds no trained model (no final/config.json); train it first")


def read_about(path: Path) -> dict[str, Any]:
    """The document beside a saved model: kind, model config, and what its stage recorded."""
    return json.loads((final_directory(path) / "config.json").read_text())


def model_sha256(path: Path) -> str:
    """SHA-256 of a saved model's weights, as its manifest records it."""
    manifest = json.loads((final_directory(path) / MANIFEST).read_text())
    return manifest["files"]["model.safetensors"]["sha256"]


def load_model(path: Path | str, kind: str | None = None) -> Any:
    """A trained model in eval mode on the CPU, from a run directory or its `final/`.

    Args:
        kind: the kind expected; UserError names both if the directory holds another.
    """
    directory = final_directory(Path(path))
    if fault := fault_of(directory):
        raise UserError(f"{directory} is damaged: {fault}; restore it or train again")
    about = read_about(directory)
    if about["kind"] not in MODELS or (kind is not None and about["kind"] != kind):
        raise UserError(f"{directory} holds a {about['kind']}, expected a {kind or 'known model'}")
    config_type, model_type = MODELS[about["kind"]]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in about["model"].items()}
    model = model_type(config_type(**values))
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval()
