"""Atomic checkpoint directories: safetensors and JSON with a manifest, never a pickle.

    <out>/checkpoints/images-000012800/   model, average and optimizer tensors, state.json
    <out>/final/                          the model that the next stage reads, its config and card

A directory is written under a temporary name, every file fsynced, the manifest (sizes and SHA-256)
last, then renamed: under its final name it is whole. Tensor names and dtypes do not depend on how
many processes trained. Training goes on while a thread writes what was copied at the step. Of the
checkpoints the newest KEEP that verify are kept, each removed one is renamed first.
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules import module as registration

from pipeline.data.shards import file_sha256, sync
from pipeline.evaluation import model_card
from pipeline.failpoint import failpoint
from pipeline.models import MODELS
from pipeline.stage import InUse, UserError, remove_leftovers
from pipeline.training import zero

MANIFEST = "manifest.json"
KEEP = 3  # two to fall back on
LOCK_SEC = 10.0  # to wait for a job that is just ending
Tensors = Mapping[str, torch.Tensor]

# What a resumed run may change: it alters neither the order of the data nor the mathematics of a
# step. Everything else is refused by name.
CHANGEABLE = frozenset(
    {"out", "data", "codes", "total_images", "workers", "cache", "dry_run"}
    | {"log_every", "validate_every", "save_every", "compare_every"}
    | {"accumulation", "compile", "max_skipped_steps", "learning_rate"}
    | {"patience", "checkpoint_activations"}
    | {"corrupt", "action", "budget"}
    | {"score_every", "score_images", "judge", "checkpoint"}
)


class Checkpoint(NamedTuple):
    """A verified checkpoint directory."""

    path: Path
    images_seen: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under `name`, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")


def write_directory(
    path: Path,
    tensors: Mapping[str, Tensors],
    documents: Mapping[str, Any],
    card_of: Callable[[Path], str] | None = None,
):
    """Commits `<name>.safetensors` and `<name>.json` files as one directory: under its name it is
    whole or not there. An existing directory of that name is moved aside just before, and removed
    after the commit.

    Args:
        card_of: makes `card.md`, the directory's description, from these files; None = no card.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    failpoint("before-directory")
    temporary.mkdir()
    try:
        for name, group in tensors.items():
            contiguous = {key: t.detach().cpu().contiguous() for key, t in group.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
            failpoint("after-file")
        for name, document in documents.items():
            (temporary / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
            failpoint("after-file")
        if card_of is not None:
            (temporary / "card.md").write_text(card_of(temporary))
        files = sorted(temporary.iterdir())
        for file in files:
            sync(file)
        failpoint("after-sync")
        manifest = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files}
        (temporary / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1) + "\n")
        failpoint("after-manifest")
        sync(temporary / MANIFEST)
        sync(temporary)
        failpoint("before-rename")
        if path.exists():
            _move_to_trash(path)
            failpoint("between-renames")
        temporary.rename(path)
        failpoint("after-rename")
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _empty_trash(path)


def _move_to_trash(path: Path) -> None:
    path.rename(path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}"))


def _empty_trash(path: Path) -> None:
    for trash in path.parent.glob(f".trash-{path.name}-*"):
        shutil.rmtree(trash, ignore_errors=True)


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


def lock(out: Path) -> TextIO:
    """Keeps other jobs out of a run directory, until the file is closed or this process ends.

    A POSIX lock: it is no loader worker's, and NFS passes it on to other machines. On a file system
    without locks there is a warning only. Raises InUse naming the job that has it, UserError where
    nothing can be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a+")  # noqa: SIM115 (it stays open)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    end = time.monotonic() + LOCK_SEC
    while not _take(file):
        if time.monotonic() > end:
            file.seek(0)
            holder = file.read().strip() or "another job"
            file.close()
            raise InUse(f"{out} is in use by {holder}; wait for it, or choose another --out")
        time.sleep(0.2)
    job = os.environ.get("SLURM_JOB_ID")
    with suppress(OSError):  # only a note
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' * bool(job)}")
        file.flush()
    return file


def _take(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(f"warning: {file.name}: no locks here, so start no second job in this directory")
    return True


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        report: is told, from the writing thread, of a checkpoint that could not be written.
    """

    def __init__(self, out: Path, report: Callable[[str], None] = print):
        self.root, self.report = out / "checkpoints", report
        self._thread: threading.Thread | None = None
        self._sound: set[Path] = set()

    def save(self, images_seen: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> Path:
        """Commits one checkpoint; `state` must be JSON and contain the resolved config."""
        path = self.root / f"images-{images_seen:09d}"
        write_directory(path, tensors, {"state": {"images_seen": images_seen, **state}})
        self._sound.add(path)
        return path

    def start_save(
        self, images_seen: int, tensors: Mapping[str, Tensors], state: dict[str, Any]
    ) -> None:
        """Copies all tensors to host memory, and leaves the rest to a thread: commits them, and
        removes what is not to be kept. First waits for the checkpoint before."""
        self.wait()
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in group.items()}
            for name, group in tensors.items()
        }
        arguments = (images_seen, copies, state)
        self._thread = threading.Thread(target=self._save_and_prune, args=arguments)
        self._thread.start()  # no daemon: a failing process still ends what it began to write

    def wait(self) -> None:
        """Returns when no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save_and_prune(self, images_seen: int, tensors: Mapping, state: dict[str, Any]) -> None:
        try:
            self.save(images_seen, tensors, state)
            self.prune()
        except (OSError, SafetensorError) as error:
            self.report(
                f"{self.root}: the checkpoint at {images_seen:,} images could not be written: "
                f"{error}; the one before it is whole, make room and start again"
            )
        except Exception as error:
            self.report(f"a bug in saving a checkpoint: {type(error).__name__}: {error}")
            raise

    def prune(self) -> None:
        """Removes all checkpoints older than the newest KEEP that verify."""
        kept = 0
        for path in sorted(self.root.glob("images-*"), reverse=True):
            if kept < KEEP:
                kept += path in self._sound or fault_of(path) is None
            else:
                failpoint("before-prune")
                _move_to_trash(path)
                failpoint("after-trash")
                _empty_trash(path)

    def clean(self) -> None:
        """Removes what a killed process left behind; for the holder of the lock."""
        for folder in (self.root.parent, self.root):
            for pattern in (".tmp-*", ".trash-*"):
                for path in folder.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)
        remove_leftovers(self.root.parent)

    def at(self, images_seen: int) -> Checkpoint:
        """A checkpoint that was verified before."""
        path = self.root / f"images-{images_seen:09d}"
        try:
            return Checkpoint(path, images_seen, json.loads((path / "state.json").read_text()))
        except FileNotFoundError as error:
            raise UserError(
                f"{path} cannot be seen from {socket.gethostname()}: --out must be a directory "
                "that all machines share"
            ) from error

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where nothing was ever committed.

        Names the ones it skips; raises UserError if there are some and all of them fail.
        """
        candidates = sorted(self.root.glob("images-*"), reverse=True)
        for path in candidates:
            fault = fault_of(path)
            if fault is None:
                self._sound.add(path)
                return self.at(int(path.name.removeprefix("images-")))
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
        about: JSON for the next stage and the card: the stage's config, images seen, validation
            figures, `model_card.data_of` the data.
    """
    config = dataclasses.asdict(model.config)  # pyright: ignore[reportArgumentType]
    document = {"kind": kind, "model": config, **about}
    tensors = {"model": model.state_dict()}
    write_directory(out / "final", tensors, {"config": document}, model_card.card)
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


def _check_sizes(make_model: Callable[[], nn.Module], weights: Path) -> None:
    """ValueError unless the model has the tensors of the file, by names and shapes; found before
    memory is taken for them, and without building many more layers than the file has tensors."""
    with safe_open(weights, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    left = 100 + 20 * len(found)

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"config.json asks for more layers than {len(found)} tensors can fill")

    hooks = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
    ]
    try:
        with torch.device("meta"):
            wanted = {name: tuple(t.shape) for name, t in make_model().state_dict().items()}
    finally:
        for hook in hooks:
            hook.remove()
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{name}: config.json asks for {wanted.get(name)}, the file has {found.get(name)}"
            )


def load_model(path: Path | str, kind: str | None = None) -> Any:
    """A trained model in eval mode on the CPU, from a run directory or its `final/`.

    Args:
        kind: the kind expected; UserError names both if the directory holds another.
    """
    directory = final_directory(Path(path))
    if fault := fault_of(directory):
        raise UserError(f"{directory} is damaged: {fault}; restore it or train again")
    try:
        about = read_about(directory)
        found = about["kind"]
        if found not in MODELS or (kind is not None and found != kind):
            raise UserError(f"{directory} holds a {found}, expected a {kind or 'known model'}")
        config_type, model_type = MODELS[found]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in about["model"].items()}
        config, weights = config_type(**values), directory / "model.safetensors"
        _check_sizes(lambda: model_type(config), weights)
        tensors = load_file(weights)
        model = model_type(config)
        model.load_state_dict(tensors)
    except (ArithmeticError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError,
            TypeError, ValueError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{directory} holds no model of this version ({reason})") from error
    return model.eval()
