"""What every stage script shares: its command line, one-line errors, exit codes, status.json.

A stage is a frozen dataclass (its config) and a `main(config)`. The last line of a script is

    if __name__ == "__main__":
        stage.run(TrainVQVAE, main, __doc__)
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

Config = TypeVar("Config")

# flags that may stand without a value
SWITCHES = ("dry_run", "flip", "flips", "cache", "compile", "binarize", "checkpoint_activations")

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_REQUEUE = 0, 1, 2, 85

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, and the way out."""


class Requeue(Exception):
    """The stage saved its work and asks to be started again (exit code 85)."""


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
        values = parser.instantiate(parser.parse_args(words))
        values.pop("config", None)
        return config_type(**vars(values))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{' '.join(str(error).split())} (see --help)") from error


def _normal_flags(words: Sequence[str]) -> list[str]:
    """`--dry-run` -> `--dry_run=true`: dashes in names, and flags without a value, as people type
    them."""
    normal = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
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
    os.replace(temporary, path)


def write_status(out: Path | None, state: str, exit_code: int, reason: str, seen: int = 0) -> None:
    """Launchers turn every failure into exit code 1, so the truth is left in a file."""
    if out is None:
        return
    status = {"state": state, "exit_code": exit_code, "reason": reason, "images_seen": seen}
    try:
        write_json(out / "status.json", status)
    except OSError as error:
        print(f"warning: {out / 'status.json'} was not written: {error}", file=sys.stderr)


def run(
    config_type: type[Config], main: Callable[[Config], int | None], doc: str | None = None
) -> None:
    """Parses, runs `main`, and exits 0 (done), 2 (user error), 85 (requeue) or 1 (failure).

    `main` may return the number of images seen, which goes into `<out>/status.json`.
    """
    out: Path | None = None
    try:
        config = parse(config_type, description=doc)
        if not getattr(config, "dry_run", False):  # a dry run writes nothing
            out = getattr(config, "out", None)
        if out is not None and is_rank_zero():
            (out / "status.json").unlink(missing_ok=True)  # of an earlier run
        seen = main(config) or 0
        if is_rank_zero():
            write_status(out, "done", EXIT_DONE, "", seen)
        code = EXIT_DONE
    except UserError as error:
        code, name = EXIT_USER_ERROR, ""
        if not is_rank_zero():
            # An error of all ranks is told by rank 0, whose launcher then ends this process; one
            # that only this rank has would otherwise be told by nobody.
            time.sleep(5)
            name = f" on rank {os.environ['RANK']}"
        write_status(out, "failed", code, f"{error}{name}")
        print(f"error: {error}{name}", file=sys.stderr)
    except Requeue as error:
        code = EXIT_REQUEUE
        write_status(out, "requeue", code, str(error))
    except KeyboardInterrupt:
        code = 130
        write_status(out, "failed", code, "interrupted")
    except Exception as error:
        write_status(out, "failed", EXIT_FAILED, f"{type(error).__name__}: {error}")
        raise
    sys.exit(code)
