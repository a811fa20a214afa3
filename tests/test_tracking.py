"""What TensorBoard reads of a run: charts, descriptions, texts, final figures, codebooks."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray

from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.training import projector
from pipeline.training.projector import UNUSED, code_pictures, write_codebooks
from pipeline.training.tracking import LAYOUTS, TABS, TAGS, Tracker, check_tag, description


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    channels: int = 8
    ratios: tuple[int, ...] = (2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    out: Path = Path("somewhere")
    data: Path = Path("elsewhere")
    model: Part = Part()
    learning_rate: float = 0.5
    flips: bool = True
    quantizer: str = "ema: 'é'"
    limit: int | None = None
    log_every: int = 7
    workers: int = 3


SCORED = {"evaluation/reconstructions/frechet/judge": 3.0, "throughput/scoring_seconds": 2.0}
SCORES = {"images": 500, "features_sha256": "ab" * 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps that were scored, as TensorBoard reads it: folder, run, its `final`."""
    out = tmp_path_factory.mktemp("run")
    tracker = Tracker(out, "vqvae", 100)
    tracker.introduce(0, "vqvae", Config(), SCORES)
    for seen in (50, 100):
        values = {"loss/total": 1.0 / seen, "validation/mse": 2.0 / seen}
        tracker.log(seen, {**values, "codebook/level1/perplexity": 5.0, **SCORED})
    tracker.document(100, "protocol", {"split": "valid", "n": 500})
    tracker.compare(100, Config(), {"validation/mse": 0.25})
    tracker.close()
    return out, *(read(out / "tensorboard" / name) for name in (".", "final"))


def read(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def value(events, tag, at=-1):
    return make_ndarray(events.Tensors(tag)[at].tensor_proto)


def charts(events) -> dict[str, dict[str, list[str]]]:
    """tab -> title -> regular expressions."""
    layout = Layout.FromString(value(events, "custom_scalars__config__").item())
    return {
        tab.title: {chart.title: list(chart.multiline.tag) for chart in tab.chart}
        for tab in layout.category
    }


def text(events, name) -> str:
    return value(events, f"about/{name}/text_summary").item().decode()


def from_yaml(block: str):
    return yaml.safe_load(re.fullmatch(r"```yaml\n(.*)```", block, re.S)[1])


def test_every_chart_shows_tags_that_there_are():
    tags = [tag.replace("{level}", "12").replace("{features}", "judge") for tag in TAGS]
    tags += [f"evaluation/reconstructions/{m}/judge" for m in ("frechet", "kid", "recall")]
    for kind, layout in LAYOUTS.items():
        assert set(layout) <= set(TABS)
        for title, expressions in (item for tab in layout.values() for item in tab.items()):
            for expression in expressions:  # matched from the start, as the plugin does
                assert any(re.match(expression, tag) for tag in tags), (kind, title, expression)


def test_codebooks_and_scores_over_images_seen_stand_on_one_page(run):
    _, events, _ = run
    found = charts(events)
    assert tuple(found) == TABS
    expressions = [e for chart in found["codebooks"].values() for e in chart]
    assert any(re.match(e, "codebook/level0/perplexity") for e in expressions)
    for tag in ("fid/inception", "rfid/inception", "frechet/judge", *SCORED):
        shown = [e for tab in found.values() for chart in tab.values() for e in chart]
        assert any(re.match(e, tag) for e in shown), tag
    assert [event.step for event in events.Tensors(next(iter(SCORED)))] == [50, 100]


def test_a_run_that_is_not_scored_has_no_empty_charts_of_scores(tmp_path):
    tracker = Tracker(tmp_path, "prior", 10)
    tracker.introduce(0, "prior", Config())
    tracker.close()
    found = read(tmp_path / "tensorboard")
    assert tuple(charts(found)) == ("loss", "throughput")
    assert "about/scores/text_summary" not in found.Tags()["tensors"]


def test_every_tag_is_described_and_an_unknown_one_refused(run):
    _, events, _ = run
    for tag in ("loss/total", "codebook/level1/perplexity"):
        expected = TAGS[tag.replace("level1", "level{level}")]
        assert events.SummaryMetadata(tag).summary_description == expected
    assert description("evaluation/reconstructions/frechet/judge") == (
        f"{TAGS['frechet/{features}']} (reconstructions)"
    )
    assert description("evaluation/anything") == ""
    assert all(description(tag.replace("{level}", "3").replace("{features}", "judge"))
               for tag in TAGS)  # fmt: skip
    for tag in ("kid/dinov2-vit-s-14", "frechet/clip-vit-b-32", "frechet/0123abcd"):
        check_tag(tag)
    for tag in ("fid/judges", "frechet/dinov2", "loss/total/more", "codebook/level/revived"):
        with pytest.raises(KeyError, match=tag):
            check_tag(tag)


def test_texts_are_the_config_the_command_and_the_protocols(run):
    _, events, _ = run
    config = from_yaml(text(events, "config"))
    assert config == {
        "out": "somewhere", "data": "elsewhere", "model": {"channels": 8, "ratios": [2, 4]},
        "learning_rate": 0.5, "flips": True, "quantizer": "ema: 'é'", "limit": None,
        "log_every": 7, "workers": 3,
    }  # fmt: skip
    command = from_yaml(text(events, "command"))
    assert command["command"].startswith(Path(sys.executable).name)
    assert command["commit"] and command["versions"]["torch"] == torch.__version__.split("+")[0]
    assert from_yaml(text(events, "scores")) == SCORES
    assert from_yaml(text(events, "protocol")) == {"split": "valid", "n": 500}
    for tab in ("CUSTOM SCALARS", "PROJECTOR", "images seen"):
        assert tab in value(events, "README/text_summary").item().decode()


def test_runs_are_compared_by_final_figures_and_what_decides_them(run):
    _, events, final = run
    content = final.summary_metadata[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content
    start = hparams_metadata.parse_session_start_info_plugin_data(content)
    assert {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()} == {
        "model.channels": 8, "model.ratios": "[2, 4]", "learning_rate": 0.5, "flips": True,
        "quantizer": "ema: 'é'", "limit": "null",
    }  # fmt: skip
    # every scalar of that run becomes a column, so there are the final ones alone
    figures = {tag for tag in final.Tags()["tensors"] if not tag.startswith("_hparams_")}
    assert figures == {"validation/mse", "evaluation/reconstructions/frechet/judge"}
    assert value(final, "validation/mse") == 0.25  # given, instead of the last one
    assert value(final, "evaluation/reconstructions/frechet/judge") == 3.0
    assert hparams_metadata.SESSION_START_INFO_TAG not in events.Tags()["tensors"]


def test_a_second_end_of_a_run_replaces_its_final_figures(tmp_path):
    for total in (10, 20):
        tracker = Tracker(tmp_path, "vqvae", total, images_seen=total - 10)
        tracker.log(total, {"validation/mse": 1.0 / total})
        tracker.compare(total, Config())
        tracker.close()
    (event,) = read(tmp_path / "tensorboard" / "final").Tensors("validation/mse")
    assert event.step == 20


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "run", "x", 100, enabled=False)
    tracker.introduce(0, "vae", Config(), SCORES)
    tracker.document(0, "protocol", {})
    tracker.compare(0, Config())
    tracker.embedding(0, "codes", torch.ones(2, 3), {"code": [0, 1]}, np.zeros((2, 4, 4, 3)))
    write_codebooks(tracker, 0, None, None)
    assert not (tmp_path / "run").exists()


# The projector.


def pictures_one_by_one(images, codes, shown):
    """`code_pictures` by loops over places, before the enlargement."""
    cell = images.shape[-1] // codes.shape[-1]
    padded = np.pad(images, ((0, 0), (0, 0), (cell, cell), (cell, cell)), mode="edge")
    drawn = []
    for code in shown:
        places = np.argwhere(codes == code)
        found = [padded[b, :, i * cell : (i + 3) * cell, j * cell : (j + 3) * cell]
                 for b, i, j in places]  # fmt: skip
        unused = np.full((images.shape[1], 3 * cell, 3 * cell), UNUSED / 255)
        drawn.append(np.mean(found, axis=0) if len(found) else unused)
    return np.moveaxis(np.stack(drawn), 1, -1) * 255


@pytest.mark.parametrize(("grid", "channels"), [(4, 3), (2, 1), (1, 3)])
def test_a_code_is_drawn_as_the_mean_of_what_it_drew(grid, channels):
    rng = np.random.default_rng(0)
    images = rng.random((3, channels, 8, 8))
    codes = rng.integers(0, 6, (3, grid, grid))
    shown = np.array([5, 2, 9, 0])  # not all that occur, and one that does not
    drawn = code_pictures(*(torch.from_numpy(each) for each in (images, codes, shown)))
    expected = pictures_one_by_one(images, codes, shown)
    scale = drawn.shape[1] // expected.shape[1]
    assert drawn.shape[1] >= projector.MIN_SIDE and scale * expected.shape[1] == drawn.shape[1]
    np.testing.assert_allclose(drawn[:, ::scale, ::scale], expected, atol=0.501)
    assert np.array_equal(drawn, drawn[:, ::scale, ::scale].repeat(scale, 1).repeat(scale, 2))
    assert (drawn[2] == UNUSED).all()


@pytest.mark.parametrize("most", [1_024, 7])
def test_the_projector_has_each_code_with_its_use_and_picture(tmp_path, monkeypatch, most):
    monkeypatch.setattr(projector, "MAX_CODES", most)
    model = VQVAE(VQVAEConfig(
        channels=8, residual_channels=4, residual_layers=0, code_dim=4, codebook_size=(5, 12),
        quantizer=("fsq", "simvq"),
    )).eval()  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3)).astype(np.uint8)
    tracker = Tracker(tmp_path, "vqvae", 100)
    write_codebooks(tracker, 100, model, images)
    tracker.close()

    folder = tmp_path / "tensorboard"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [info.tensor_name.split(":")[0] for info in config.embeddings] == [
        "codebook-level0", "codebook-level1",
    ]  # fmt: skip
    with torch.no_grad():
        unit = torch.from_numpy(images).movedim(-1, 1) / 255
        output = model(unit)
    for level, info in enumerate(config.embeddings):
        header, *rows = (folder / info.metadata_path).read_text().splitlines()
        assert header == "code\tuses"
        codes, uses = np.array([list(map(int, row.split("\t"))) for row in rows]).T
        counts = output.codes[level].flatten().bincount(minlength=(5, 12)[level]).numpy()
        assert len(codes) == min(most, len(counts)) and (np.diff(codes) > 0).all()
        assert np.array_equal(uses, counts[codes])
        left_out = np.setdiff1d(np.arange(len(counts)), codes)
        assert not len(left_out) or counts[left_out].max() <= uses.min()  # those used most
        vectors = np.loadtxt(folder / info.tensor_path, delimiter="\t", ndmin=2)
        quantizer = model.quantizers[level]
        for code, vector in zip(codes, vectors, strict=True):
            expected = quantizer.lookup(torch.tensor([[[code]]])).flatten().detach().numpy()
            np.testing.assert_allclose(vector, expected, rtol=1e-5)
        # the sprite: row by row, in the order of the codes
        clamped = output.reconstructions.clamp(0, 1).double().numpy()
        expected = pictures_one_by_one(clamped, output.codes[level].numpy(), codes)
        side, columns = info.sprite.single_image_dim[0], int(np.ceil(len(codes) ** 0.5))
        assert list(info.sprite.single_image_dim) == [side, side]
        sprite = np.asarray(Image.open(folder / info.sprite.image_path)).astype(float)
        assert sprite.shape == (columns * side, columns * side, 3)
        scale = side // expected.shape[1]
        for number in range(len(codes)):
            top, left = (side * place for place in divmod(number, columns))
            tile = sprite[top : top + side : scale, left : left + side : scale]
            np.testing.assert_allclose(tile, expected[number], atol=1.6)  # rounded twice


def test_lines_for_programs_hold_the_same_values(run):
    out, events, _ = run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        index = [50, 100].index(line["images_seen"])
        assert value(events, "loss/total", index) == pytest.approx(line["loss/total"])
