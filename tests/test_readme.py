"""Every command in README.md parses, and every path it names is there."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

from pipeline import stage

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    scripts = [word for word in words if word.startswith("pipeline/")]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M)
        known = {target for line in targets for target in line.split()}
        assert {word for word in words[1:] if "=" not in word} <= known
    elif scripts:
        name = scripts[0].removeprefix("pipeline/").removesuffix(".py")
        module = importlib.import_module(f"pipeline.{name}")
        class_name = "".join(w.capitalize() for w in name.split("_")).replace("Vqvae", "VQVAE")
        flags = words[words.index(scripts[0]) + 1 :]
        flags = [str(ROOT / word) if word.startswith("configs/") else word for word in flags]
        stage.parse(getattr(module, class_name), flags)
    elif words[0].startswith("slurm/"):
        assert (ROOT / words[0]).is_file(), command
    else:
        assert words[0] in ("git", "cd", "tensorboard"), command


def test_there_are_commands_and_the_first_two_are_the_promise():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert len(COMMANDS) > 6


def test_paths_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
    for folder in ("pipeline", "kernels", "configs", "tests", "docs"):
        assert (ROOT / folder).is_dir() and f"{folder}/" in README


def test_the_first_forty_lines_show_what_this_is():
    head = "\n".join(README.splitlines()[:40])
    for part in (
        "docs/samples.png",
        "make demo",
        "make test",
        "shard_data",
        "evaluate",
        "kernels/",
    ):
        assert part in head, part


def test_the_table_of_faults_names_tests_that_are_there():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
