"""Every YAML fits its stage and round-trips; what a user gets wrong is named in one line."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_stage

from pipeline import stage
from pipeline.models.priors import make_prior
from pipeline.models.vqvae import VQVAE
from pipeline.stage import UserError
from pipeline.train_prior import level_number
from pipeline.train_vqvae import TrainVQVAE

CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name != "accelerate")
REQUIRED = {
    "shard_data": ["--out=o", "--root=r", "--source=faces"],
    "train_vqvae": ["--out=o", "--data=d"],
    "train_vae": ["--out=o", "--data=d"],
    "report_vae": ["--out=o", "--data=d", "--checkpoint=c"],
    "extract_codes": ["--out=o", "--data=d", "--checkpoint=c"],
    "train_prior": ["--out=o", "--codes=c"],
    "sample_prior": ["--out=o", "--checkpoint=c"],
    "train_classifier": ["--out=o", "--data=d"],
    "evaluate": ["--out=o", "--data=d", "--checkpoint=c", "--judge=j"],
    "compare": ["--out=o", "--data=d", "--runs=[r]", "--judge=j"],
    "report_levels": ["--out=o", "--data=d", "--checkpoint=c"],
    "run_all": ["--out=o", "--configs=c"],
}


def stage_name(path: Path) -> str:
    """train_prior_level0.yaml -> train_prior, train_vae_iwae.yaml -> train_vae."""
    return re.sub(r"(?<=^train_prior)_.*$|(?<=^train_vae)_.*$", "", path.stem)


def stage_of(path: Path):
    """The module and config class of the stage that a YAML belongs to."""
    name = stage_name(path)
    module = importlib.import_module(f"pipeline.{name}")
    class_name = "".join(word.capitalize() for word in name.split("_"))
    return module, getattr(module, class_name.replace("Vqvae", "VQVAE").replace("Vae", "VAE"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_yaml_round_trips_through_print_config(path, tmp_path, capsys):
    _, config_type = stage_of(path)
    required = [
        flag for flag in REQUIRED[stage_name(path)]
        if flag[2:].split("=")[0] not in yaml.safe_load(path.read_text())
    ]  # fmt: skip
    config = stage.parse(config_type, [f"--config={path}", *required])
    parser = stage.make_parser(config_type)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--config={path}", *required, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert stage.parse(config_type, [f"--config={printed}"]) == config


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.stem.startswith(("train_vqvae", "train_prior"))],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_every_yaml_builds_its_model(path):
    _, config_type = stage_of(path)
    required = REQUIRED[stage_name(path)]
    config = stage.parse(config_type, [*required, f"--config={path}"])
    with torch.device("meta"):
        model = (VQVAE if config_type is TrainVQVAE else make_prior)(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


def test_the_paper_sizes_are_the_papers():
    path = ROOT / "configs/celeba256/train_vqvae.yaml"
    config = stage.parse(TrainVQVAE, [*REQUIRED["train_vqvae"], f"--config={path}"])
    model = config.model
    assert (model.channels, model.residual_channels, model.residual_layers) == (128, 64, 2)
    assert (model.codebook_sizes, model.code_dim, model.decay) == ((512, 512), 64, 0.99)
    assert (config.beta, config.batch_size) == (0.25, 128)
    assert model.grids(256, 256) == [(32, 32), (64, 64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data, out"),
        (["--data=d", "--out=o", "--modle.channels=3"], "modle.channels"),
        (["--data=d", "--out=o", "--model.chan=3"], "model.chan"),  # no abbreviations
        (["--data=d", "--out=o", "--model.channels=three"], "model.channels"),
        (["--data=d", "--out=o", "--model.channels=0"], "model.channels must be at least 1"),
        (["--data=d", "--out=o", "--image_size=60"], "image_size must be divisible"),
        (["--data=d", "--out=o", "--total_images=0"], "total_images must be positive"),
        (["--data=d", "--out=o", "--schedule=linear"], "schedule"),
        (["--out=o"], "data"),
    ],
)
def test_user_errors_are_one_line_that_names_the_key(arguments, message):
    with pytest.raises(UserError) as caught:
        stage.parse(TrainVQVAE, arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_keys_and_python_objects_in_yaml_are_refused(tmp_path):
    for text, message in (("modell: 3", "modell"), ("seed: !!python/object:os.system {}", "tag")):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            stage.parse(TrainVQVAE, [*REQUIRED["train_vqvae"], f"--config={path}"])


def test_flag_over_yaml_over_default(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 5\nlearning_rate: 1e-4\n")
    config = stage.parse(TrainVQVAE, [*REQUIRED["train_vqvae"], f"--config={path}", "--seed=7"])
    assert (config.seed, config.learning_rate, config.beta) == (7, 1e-4, 0.25)


def test_level_aliases():
    assert [level_number(level, 3) for level in ("top", "bottom", 1)] == [0, 2, 1]
    for bad in (3, -1, "middle"):
        with pytest.raises(UserError, match="level must be in"):
            level_number(bad, 3)


@pytest.mark.parametrize("script", sorted(REQUIRED))
def test_help_teaches_and_errors_exit_2(script, capsys, monkeypatch):
    """In this process: to import torch for each of them would take minutes."""
    module, config_type = stage_of(Path(f"{script}.yaml"))

    def run(*flags: str):
        monkeypatch.setattr("sys.argv", [f"{script}.py", *flags])
        with pytest.raises(SystemExit) as end:
            stage.run(config_type, module.main, module.__doc__)
        return end.value.code, capsys.readouterr()

    code, printed = run("--help")
    assert code == 0 and "python pipeline/" in printed.out and "--out" in printed.out
    code, printed = run("--nonsense", "1")
    assert code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_a_script_runs_from_any_directory(tmp_path):
    assert "--out" in run_stage("compare.py", "--help", cwd=tmp_path).stdout


def test_missing_inputs_are_named_in_one_line(tmp_path):
    failed = run_stage(
        "train_vqvae.py", "--data", tmp_path / "absent", "--out", tmp_path / "out", check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1 and "absent" in failed.stderr
    status = yaml.safe_load((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_an_out_that_is_a_file_is_named_in_one_line(tmp_path):
    (tmp_path / "out").write_text("mine")
    failed = run_stage("train_vqvae.py", "--data", tmp_path, "--out", tmp_path / "out", check=False)
    assert failed.returncode == 2
    assert failed.stderr == f"error: {tmp_path / 'out'} is a file; --out needs a directory\n"
    assert (tmp_path / "out").read_text() == "mine"
