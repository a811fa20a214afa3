"""What every stage script shares: its command line, one-line errors, exit codes, status.json.

A stage is a frozen dataclass (its config) and a `main(config)`. The last line of a script is

    if __name__ == "__main__":
        stage.run(TrainVQVAE, main, __doc__)
"""

import ctypes
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from pipeline.failpoint import failpoint

Config = TypeVar("Config")

# flags that may stand without a value
SWITCHES = (
    *("dry_run", "flip", "flips", "cache", "compile", "binarize", "checkpoint_activations"),
    *("download", "force", "accuracy_score"),
)

MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**20, 16

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_REQUEUE = 0, 1, 2, 85

# What a cluster sends before it takes the machine away. A training run saves first; the other
# stages end at once, and a second start goes on with what they have written.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

jsonargparse.set_parsing_settings(
    docstring_parse_attribute_docstrings=True,
    import_path_denylist=["*"],  # else `model: some.module` in a YAML file imports that module
)


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, and the way out."""


class InUse(UserError):
    """Another job works in the directory, so nothing in it may be touched."""


class Requeue(Exception):
    """The stage saved its work and asks to be started again (exit code 85)."""

    def __init__(self, message: str, images_seen: int = 0):
        super().__init__(message)
        self.images_seen = images_seen


def is_rank_zero() -> bool:
    """True in the one process that prints and writes; launchers set RANK for all processes."""
    return int(os.environ.get("RANK", "0")) == 0


def num_cpus() -> int:
    """CPUs this process may use (macOS does not say; there it is all of them)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_parser(config_type: type, description: str | None = None) -> jsonargparse.ArgumentParser:
    """A strict command line for a config dataclass: default < YAML (--config) < flag."""
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with differences to defaults")
    parser.add_class_arguments(config_type)
    return parser


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the script's docstring, which holds the commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def parse(
    config_type: type[Config],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
) -> Config:
    """Builds the config from the command line; raises UserError for what does not fit."""
    parser = make_parser(config_type, description)
    try:
        words = _normal_flags(sys.argv[1:] if arguments is None else arguments)
        for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
            name, equals, value = word.partition("=")
            if name == "--config":
                _check_yaml(Path(value if equals else following))
        values = parser.instantiate(parser.parse_args(words))
        values.pop("config", None)
        return config_type(**vars(values))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{' '.join(str(error).split())} (see --help)") from error


def _check_yaml(path: Path) -> None:
    """UserError for YAML of which a few lines unfold without end: aliases, and deep nesting."""
    if not path.is_file():
        return  # the parser will say so
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UserError(f"{path} has more than {MAX_YAML_BYTES} bytes: not a config")
    depth = 0
    with suppress(yaml.YAMLError, UnicodeDecodeError):  # the parser will say so better
        for event in yaml.parse(path.read_text(), yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
                raise UserError(f"{path}: write values out, without aliases (*) or deep nesting")


def _normal_flags(words: Sequence[str]) -> list[str]:
    """`--dry-run` -> `--dry_run=true`: dashes in names, and flags without a value, as people type
    them."""
    normal = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
            if not equals and following.startswith("--") and name[2:].replace("-", "_") in SWITCHES:
                word += "=true"
        normal.append(word)
    return normal


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain JSON values: paths as strings, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


@functools.cache
def provenance() -> dict[str, Any]:
    """Where a result comes from: commit, versions, hardware, and the time of the first call.

    Asked once per process, because the checkout may move on while a long run goes on.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip()

    packages = ("torch", "numpy", "accelerate", "webdataset", "torch-fidelity", "pillow")
    return {
        "commit": (git("rev-parse", "HEAD") or "unknown")
        + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    failpoint("commit")
    os.replace(temporary, path)


def remove_leftovers(*folders: Path, older_than_sec: float = 0.0) -> None:
    """Removes files that killed processes were writing. Where other jobs write too, only those
    that nobody has written to for so long."""
    name = re.compile(r"\..+\.(json|npz|png|safetensors|tar)\.\d+(\.index\.npy)?")
    latest = time.time() - older_than_sec
    for folder in folders:
        for path in folder.glob(".*"):
            if name.fullmatch(path.name) and path.stat().st_mtime <= latest:
                path.unlink(missing_ok=True)


def write_status(out: Path | None, state: str, exit_code: int, reason: str, seen: int = 0) -> None:
    """Launchers turn every failure into exit code 1, so the truth is left in a file.

    Of several ranks the first one to fail has the reason: the others miss it, and fail of that.
    """
    if out is None or (state != "done" and (out / "status.json").exists()):
        return
    status = {"state": state, "exit_code": exit_code, "reason": reason, "images_seen": seen}
    try:
        write_json(out / "status.json", status)
    except OSError as error:
        print(f"warning: {out / 'status.json'} was not written: {error}", file=sys.stderr)


def ignore_stop_signals(worker: int = 0) -> None:
    """For processes that help this one, such as a loader's workers: a signal to the whole job has
    to leave them alone while this one saves."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_at_once(number: int, frame: Any) -> None:
    """The handler of STOP_SIGNALS where nobody set another one."""
    name = signal.Signals(number).name
    raise Requeue(f"ended by {name}; started again it goes on with what it has written")


def _end_with_launcher() -> None:
    """Asks Linux for SIGTERM when the launcher dies, else its processes would go on without it. A
    stage that somebody started by hand outlives the shell."""
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_with_parent() -> None:
    """For processes of a pool: one whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run(
    config_type: type[Config], main: Callable[[Config], int | None], doc: str | None = None
) -> None:
    """Parses, runs `main`, and exits 0 (done), 2 (user error), 85 (requeue) or 1 (failure).

    `main` may return the number of images seen, which goes into `<out>/status.json`.
    """
    _end_with_launcher()
    before = {number: signal.signal(number, end_at_once) for number in STOP_SIGNALS}
    try:
        code = _run(config_type, main, doc)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code)


def _run(config_type: type[Config], main: Callable[[Config], int | None], doc: str | None) -> int:
    out: Path | None = None
    of_rank = "" if is_rank_zero() else f" on rank {os.environ['RANK']}"
    try:
        try:
            config = parse(config_type, description=doc)
            if not getattr(config, "dry_run", False):  # a dry run writes nothing
                out = getattr(config, "out", None)
            if out is not None and is_rank_zero():
                if out.exists() and not out.is_dir():
                    path, out = out, None  # there is no place for a status
                    raise UserError(f"{path} is a file; --out needs a directory")
                (out / "status.json").unlink(missing_ok=True)  # of an earlier run
            seen = main(config) or 0
        finally:
            ignore_stop_signals()  # the rest takes a moment and leaves the truth behind
        if is_rank_zero():
            write_status(out, "done", EXIT_DONE, "", seen)
        return EXIT_DONE
    except UserError as error:
        if of_rank:
            # An error of all ranks is told by rank 0, whose launcher then ends this process; one
            # that only this rank has would otherwise be told by nobody.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
            if out is not None and (out / "status.json").exists():
                return EXIT_USER_ERROR
        if not isinstance(error, InUse):
            write_status(out, "failed", EXIT_USER_ERROR, f"{error}{of_rank}")
        print(f"error: {error}{of_rank}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Requeue as error:
        write_status(out, "requeue", EXIT_REQUEUE, str(error), error.images_seen)
        return EXIT_REQUEUE
    except KeyboardInterrupt:
        write_status(out, "failed", 130, "interrupted")
        return 130
    except Exception as error:
        write_status(out, "failed", EXIT_FAILED, f"{type(error).__name__}: {error}{of_rank}")
        raise
