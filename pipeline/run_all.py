"""Runs the whole pipeline, from images to a report: the table of contents of this project.

    python pipeline/run_all.py --config configs/demo/run_all.yaml
    python pipeline/run_all.py --config configs/demo/run_all.yaml \\
        --source celeba --root ~/celeba --out runs/demo-celeba
    python pipeline/run_all.py --config configs/celeba64/run_all.yaml --processes 2

Each stage is a script of its own with a YAML of its own in the config's folder, and can be run
alone. A stage whose config and inputs have not changed since it was done is skipped; one that was
interrupted goes on where it was.
"""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from pipeline import stage
from pipeline.training.checkpoint import model_sha256

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunAll:
    """Config of the run."""

    configs: Path
    """Folder with a YAML for each stage; a stage without one runs on its defaults."""
    out: Path
    """Run directory; each stage has a directory in it."""
    num_levels: int = 2
    """Levels of the VQ-VAE, and so the number of priors."""
    source: Literal["celeba", "folder", "mnist", "faces"] | None = None
    """Source of the images; None = as in shard_data.yaml."""
    root: Path | None = None
    """Where the source's images are; None = as in shard_data.yaml."""
    processes: int = 1
    """Processes for the stages that can use several."""
    dry_run: bool = False
    """Only print the stages, tab-separated: name, the stages it waits for, whether one or many
    processes, script and flags. slurm/submit_all.sh makes a job of each line."""

    def __post_init__(self) -> None:
        for name in ("num_levels", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of a run: `script` with the YAML `config`, reading `inputs`, writing `out`."""

    name: str
    script: str
    config: str
    flags: dict[str, str | Path]
    inputs: list[Path]
    out: Path
    parallel: bool = True


def read_yaml(path: Path) -> dict[str, Any]:
    """What the config of a stage sets; where it cannot be read, its stage will say so."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        found = yaml.safe_load(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def steps(config: RunAll, configs: Path) -> list[Step]:
    """The stages in order, each with what it reads and writes; `configs` has their YAML."""
    out = config.out
    shards, vqvae, codes = out / "shards", out / "vqvae", out / "codes"
    judge, samples, evaluation = out / "classifier-judge", out / "samples", out / "evaluation"
    priors = [out / f"prior-level{level}" for level in range(config.num_levels)]
    drawing: dict[str, str | Path] = {"checkpoint": vqvae}
    condition = read_yaml(configs / "train_prior_level0.yaml").get("condition", "none")
    asked = {"attributes", "label", "codes", "conditions"}
    if condition != "none" and not asked & read_yaml(configs / "sample_prior.yaml").keys():
        drawing["conditions"] = shards  # what the images have, as often as they have it
    source: dict[str, str | Path] = {}
    if config.source is not None:
        source["source"] = config.source
    if config.root is not None:
        source["root"] = config.root
    return [
        Step("shards", "shard_data", "shard_data", source, [], shards, parallel=False),
        Step("judge", "train_classifier", "train_classifier", {"data": shards}, [shards], judge),
        Step(
            "vqvae", "train_vqvae", "train_vqvae",
            {"data": shards, "judge": judge}, [shards, judge], vqvae,
        ),
        Step(
            "codes", "extract_codes", "extract_codes",
            {"data": shards, "checkpoint": vqvae}, [shards, vqvae], codes,
        ),
        *[
            Step(
                prior.name, "train_prior", f"train_prior_level{level}",
                {"codes": codes, "level": str(level), "judge": judge}, [codes, judge], prior,
            )
            for level, prior in enumerate(priors)
        ],
        Step(
            "samples", "sample_prior", "sample_prior",
            drawing, [shards, vqvae, *priors], samples,
        ),
        Step(
            "evaluation", "evaluate", "evaluate",
            {"data": shards, "checkpoint": vqvae, "samples": samples, "judge": judge},
            [shards, vqvae, samples, judge], evaluation,
        ),
    ]  # fmt: skip


def fingerprint(directory: Path) -> str:
    """What a stage's output is known by: the hash of its weights, index or protocol."""
    if (directory / "final" / "manifest.json").is_file():
        return model_sha256(directory)
    for name in ("index.json", "samples.json", "report.json"):
        if (directory / name).is_file():
            return hashlib.sha256((directory / name).read_bytes()).hexdigest()
    return "absent"


def key_of(step: Step, path: Path) -> str:
    """Changes whenever the stage would have to run again."""
    parts = [step.script, path.read_text() if path.is_file() else ""]
    parts += [f"{name}={value}" for name, value in step.flags.items()]
    parts += [fingerprint(directory) for directory in step.inputs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def arguments_of(step: Step, path: Path) -> list[str]:
    """The flags of a stage, as its docstring shows them."""
    flags = {"config": path} if path.is_file() else {}
    flags |= {**step.flags, "out": step.out}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def command(step: Step, path: Path, processes: int) -> list[str]:
    """The command line of a stage on this machine."""
    launcher = [sys.executable]
    if processes > 1 and step.parallel:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "pipeline" / f"{step.script}.py"), *arguments_of(step, path)]


def print_plan(plan: list[Step], configs: Path) -> None:
    """A line per stage, in an order in which each comes after those it waits for."""
    for step in plan:
        waits = [other.name for other in plan if other.out in step.inputs]
        script = f"pipeline/{step.script}.py"
        line = [
            step.name,
            ",".join(waits) or "-",
            "many" if step.parallel else "one",
            script,
            *arguments_of(step, configs / f"{step.config}.yaml"),
        ]
        if any(set("\t\n") & set(word) for word in line):
            raise stage.UserError("--dry_run: no path may have a tab or an end of line in it")
        print("\t".join(line))


def collect(out: Path) -> None:
    """Puts what a person wants to see first at the top of the run directory."""
    for source in ("samples/samples.png", "vqvae/reconstructions.png"):
        if (out / source).is_file():
            shutil.copy(out / source, out / Path(source).name)
    shutil.copy(out / "evaluation" / "report.html", out / "report.html")
    report = (out / "evaluation" / "report.md").read_text()
    (out / "report.md").write_text(report.replace("](", "](evaluation/"))
    logs = out / "tensorboard"
    logs.mkdir(exist_ok=True)
    for log in sorted(out.glob("*/tensorboard")):
        link = logs / log.parent.name
        if not link.is_symlink():
            link.symlink_to(Path("..") / log.parent.name / "tensorboard")


def end(step: Step, code: int) -> NoReturn:
    """Passes a stage's end on: a launcher turns every code into 1, so its status has the truth."""
    status = step.out / "status.json"
    if code == stage.EXIT_FAILED and status.is_file():
        code = json.loads(status.read_text())["exit_code"]
    message = f"stage {step.name} ended with exit code {code}; see above"
    if code == stage.EXIT_REQUEUE:
        raise stage.Requeue(message)
    if code == stage.EXIT_USER_ERROR:
        raise stage.UserError(f"{message}; to start that stage anew delete {step.out}")
    raise RuntimeError(message)


def main(config: RunAll) -> None:
    if not stage.is_rank_zero():
        return  # it starts the processes of its stages itself
    configs = config.configs if config.configs.is_dir() else ROOT / config.configs
    if not configs.is_dir():
        raise stage.UserError(f"{config.configs} is not a folder of stage configs")
    if config.dry_run:
        return print_plan(steps(config, configs), configs)
    done_file = config.out / "done.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    for number, step in enumerate(plan := steps(config, configs), start=1):
        path = configs / f"{step.config}.yaml"
        title, key = f"[{number}/{len(plan)}] {step.name}", key_of(step, path)
        # shards are always looked at: that is quick, and the images may have changed
        if step.inputs and done.get(step.name) == key and fingerprint(step.out) != "absent":
            print(f"{title}: unchanged, skipped", flush=True)
            continue
        arguments = command(step, path, config.processes)
        print(f"\n{title}\n  {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        code = subprocess.run(arguments, check=False).returncode
        if code != 0:
            end(step, code)
        print(f"  {step.name}: {time.monotonic() - start:.0f} s", flush=True)
        done[step.name] = key
        stage.write_json(done_file, done)
    collect(config.out)
    print(f"\nsamples          {config.out / 'samples.png'}")
    print(f"reconstructions  {config.out / 'reconstructions.png'}")
    print(f"report           {config.out / 'report.html'}")
    tensorboard = f"{sys.executable} -m tensorboard.main --logdir {config.out / 'tensorboard'}"
    print(f"TensorBoard      {tensorboard}")


if __name__ == "__main__":
    stage.run(RunAll, main, __doc__)
