"""Studies of the priors: how far they generalise, what their order costs, what they draw.

    python benchmarks/prior_studies.py --study overfitting --run runs/celeba64 \\
        --out runs/bench/priors --json docs/benchmarks/prior_overfitting.json
    python benchmarks/prior_studies.py --study order ...
    python benchmarks/prior_studies.py --study temperature ...
    python benchmarks/prior_studies.py --study attributes --guidance 1 2 ...
    python benchmarks/prior_studies.py ... --total_images 640 --num_samples 64      a quick look

    overfitting  nats per code of the priors of configs/celeba64 with one thing left out: dropout,
                 flips, the attributes (the coarser codes stay)
    order        kinds of prior of as many parameters (within 2 %), and their orders: nats, speed of
                 training, images/s of that level alone where caches can sample it, and, where both
                 levels are asked for, the Fréchet distance of samples
    temperature  Fréchet distance of samples on the judge's features, as a table and a chart
    attributes   accuracy, by the judge, of samples asked for an attribute

The first two train on <run>/codes with pipeline/train_prior.py; runs are kept in --out, which both
may share. `train` is of as many training images as the validation split has, `gap` validation minus
train, at the best validation (`best_at` images); `end_` is at the end of the run. The others draw
--num_samples images a set from --priors, those of the run tree if not given, and keep figures and a
picture of each set in --out; those with Fréchet distances also the images (.npy), for other tools.

Samples for Fréchet distances are asked for the attributes of training images, in the proportions of
the data as is usual for conditional models, or for nothing with `--asked nothing`.

temperature: `ratio` is (samples - floor) / (reconstructions - floor), nothing where reconstructions
lie no farther than the floor, as they may: they are of the very images that all is compared with.
`ratio_floor` takes reconstructions of the floor's own images instead.

attributes, for the ten nearest to half yes, half no, with standard errors over images (`_se`):
    real   validation images
    alone  samples asked for this attribute, every other one for its absence; the rest left open
    all    samples asked for all attributes of a validation image
    wrong  the same held against the attributes of another image; must fall to `base`, how often
           answers and attributes agree that have nothing to do with each other
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import ROOT, print_table, refuse, write_json
from sampling import Sampler
from vae_studies import run

from pipeline import image_model, stage
from pipeline.compare import kept
from pipeline.data.images import ImageSet, open_images
from pipeline.evaluation import extractors, fidelity, pictures
from pipeline.evaluation.accuracy_score import accuracies, agreement, base_rate, most_balanced
from pipeline.evaluation.judge import half_of
from pipeline.evaluation.sets import Choice, Reconstructions, ShardImages, batches_of, choose
from pipeline.models.priors.noise import image_keys
from pipeline.models.priors.prior import Prior
from pipeline.models.priors.sampling import Draw, fastest_method, sample_codes
from pipeline.train_prior import TrainPrior
from pipeline.training.checkpoint import load_model, read_about
from pipeline.training.tracking import progress_bar

CONFIGS = ROOT / "configs" / "celeba64"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = {  # row: config of both levels, and what it changes: a value, or one per level
    "overfitting": {
        "as configured": ("train_prior", {}),
        "without dropout": ("train_prior", {"model.dropout": 0.0}),
        "without flips": ("train_prior", {"flips": "false"}),
        "without conditioning": ("train_prior", {"condition": "none"}),
    },
    "order": {
        "gated PixelCNN, wavefront": ("train_prior", {}),
        "gated PixelCNN, raster":
            ("train_prior", {"model.order": "raster", "model.channels": (85, 86)}),
        "PixelSNAIL, wavefront": ("train_prior_pixelsnail", {}),
        "PixelSNAIL, raster": ("train_prior_pixelsnail", {"model.order": "raster"}),
        "transformer": ("train_prior_transformer", {}),
    },
}  # fmt: skip
NUM_ATTRIBUTES, BATCH_SIZE = 10, 64  # of the samples
TIMED_BATCH, TURNS = 16, 5

Rows = Iterator[dict[str, Any]]


# Runs of train_prior.py.


def settings(study: str, name: str, level: int) -> tuple[Path, dict[str, Any]]:
    """The config of a row at a level, and its changes there."""
    config, changes = RUNS[study][name]
    at_level = {k: v[level] if isinstance(v, tuple) else v for k, v in changes.items()}
    return CONFIGS / f"{config}_level{level}.yaml", at_level


def train(options: argparse.Namespace, config: Path, changes: dict[str, Any], level: int) -> Path:
    """The directory of a run, which goes on where it is not as long yet as asked for."""
    out = options.out / "-".join([config.stem, *(f"{k}={v}" for k, v in changes.items())])
    flags = {"config": config, "codes": options.run / "codes", "level": level, "out": out} | changes
    if options.total_images is not None:
        flags["total_images"] = options.total_images
    asked = stage.parse(TrainPrior, [f"--{k}={v}" for k, v in flags.items()])
    if images_seen(out) < asked.total_images:
        run("train_prior.py", **flags)
    return out


def images_seen(out: Path) -> int:
    """Of a run that has ended; 0 before."""
    path = out / "status.json"
    status = json.loads(path.read_text()) if path.is_file() else {}
    return status["images_seen"] if status.get("state") == "done" else 0


def figures(out: Path) -> dict[str, float]:
    """Nats per code of a run, at its best and at its end, and how fast it was trained."""
    best, speed = read_about(out), "throughput/codes_per_sec"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    end = [line for line in lines if "prior/gap_nats_per_code" in line][-1]
    return {
        "images_seen": images_seen(out),
        "train": best["train_sample_nats_per_code"],
        "validation": best["validation_nats_per_code"],
        "gap": best["gap_nats_per_code"],
        "best_at": best["images_seen"],
        "end_validation": end["prior/validation_nats_per_code"],
        "end_gap": end["prior/gap_nats_per_code"],
        "train_codes_per_sec": statistics.median(line[speed] for line in lines if speed in line),
    }


def trained_rows(options: argparse.Namespace) -> Rows:
    """Those of the studies in RUNS."""
    draws, trained = options.study == "order" and len(options.levels) > 1, []
    if draws:
        read_about(judge_of(options))  # to be missed now, not after the runs
    for level in options.levels:
        rows, priors, outs = {}, {}, {}
        for name in RUNS[options.study]:
            out = outs[name] = train(options, *settings(options.study, name, level), level)
            priors[name] = load_model(out, "prior").requires_grad_(False).to(DEVICE)
            size = sum(weight.numel() for weight in priors[name].parameters())
            row = {"contender": name, "case": f"level {level}", "parameters": size}
            rows[name] = row | figures(out)
        if options.study == "order":
            for name, speed in sampling_speeds(priors).items():
                rows[name]["images_per_sec"] = speed
        yield from rows.values()
        trained.append(outs)
    for name in RUNS["order"] if draws else ():
        options.priors = [outs[name] for outs in trained]
        m, file = Material(options), name.replace(", ", "-").replace(" ", "-")
        yield m.scores(file, partial(m.draw, file, Draw(), m.asked)) | {"contender": name}


def sampling_speeds(priors: Mapping[str, Prior]) -> dict[str, float]:
    """Images/s of a level alone, in turns, given random coarser codes and attributes; of the priors
    that caches can sample."""
    random = partial(torch.randint, device=DEVICE)
    keys, samplers = image_keys(0, torch.arange(TIMED_BATCH, device=DEVICE), level=0), {}
    for name, prior in priors.items():
        shape, config = (TIMED_BATCH, *prior.config.grid), prior.config
        coarser = [random(size, shape) for size in config.coarser_codebook_sizes]
        attributes = random(2, (TIMED_BATCH, config.num_attributes)) * 2 - 1
        condition = prior.condition(TIMED_BATCH, coarser, None, attributes)
        if fastest_method(prior) == "wavefront":
            samplers[name] = Sampler("wavefront", prior, condition, keys)
            samplers[name].whole_ms()  # not timed
    turns = [{name: sampler.whole_ms() for name, sampler in samplers.items()} for _ in range(TURNS)]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in samplers}
    return {name: 1e3 * TIMED_BATCH / median for name, median in medians.items()}


# Samples, and what they are measured by.


def judge_of(options: argparse.Namespace) -> Path:
    return options.judge or options.run / "classifier-judge"


class Material:
    """Images and models; of the images as many as each set has."""

    def __init__(self, options: argparse.Namespace):
        shards, judge = options.run / "shards", judge_of(options)
        self.model = image_model.load_model(options.run, priors=options.priors)
        self.device, size = self.model.device, self.model.image_size
        self.real, self.train = (open_images(shards, split, size) for split in ("valid", "train"))
        extractors.check_recipe(self.real.recipe.hash, size, shards, options.run / "vqvae", judge)
        self.judge = load_model(judge, "classifier").requires_grad_(False).to(self.device)
        self.extractor = extractors.judge_extractor(judge, self.device)
        unseen = np.flatnonzero(half_of(self.train.keys) != read_about(judge)["half"])
        self.out, self.count = options.out, options.num_samples
        self.out.mkdir(parents=True, exist_ok=True)
        least, most = fidelity.MIN_IMAGES, min(len(self.real), len(unseen))
        if not least <= self.count <= most:
            refuse(f"--num_samples must be in {least}..{most}, got {self.count}")
        self.chosen = choose(self.count, np.arange(len(self.real)), 0)
        self.floor = choose(self.count, unseen, 0)
        self.asked = np.zeros((self.count, len(self.model.attribute_names)), np.int8)
        if options.asked == "attributes":
            self.asked[:] = self.attributes(self.train, self.floor)
        self.key = {
            "num_images": self.count,
            "asked": options.asked,
            "data_index_sha256": self.real.index.sha256,
            "vqvae": self.model.sha256,
            "priors": [self.model.prior(level).sha256 for level in range(len(self.model.grids))],
            "judge": self.extractor.sha256,
        }

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a set of images, which are measured where they are not there yet."""
        return kept(self.out / f"{name}.json", {**self.key, "set": name}, measure)

    def attributes(self, images: ImageSet, indices: np.ndarray) -> np.ndarray:
        """Those that the priors know, in their order: (N, A), -1 or +1."""
        known = list(images.index.attribute_names)
        columns = [known.index(name) for name in self.model.attribute_names]
        return images.attributes[indices][:, columns]

    @cached_property
    def real_features(self) -> dict[str, torch.Tensor]:
        return self.features("real", self.real[self.chosen])

    def features(self, name: str, images: np.ndarray) -> dict[str, torch.Tensor]:
        np.save(self.out / f"{name}.npy", images)
        batches = batches_of(images, np.arange(self.count))
        return fidelity.extract([self.extractor], batches, self.count, name)[self.extractor.name]

    def scores(self, name: str, make: Callable[[], np.ndarray]) -> dict[str, Any]:
        """Row of a set of images against the real ones."""

        def measure() -> dict[str, Any]:
            found = fidelity.scores(self.features(name, make()), self.real_features)
            return {metric: score._asdict() for metric, score in found.items()}

        found = self.kept(name, measure)
        row: dict[str, Any] = {"contender": name, "case": f"{self.count} images"}
        row |= {metric: score["value"] for metric, score in found.items()}
        row["frechet_low"], row["frechet_high"] = found["frechet"]["interval"]
        return row

    def reconstructions(self, images: ImageSet, indices: np.ndarray) -> np.ndarray:
        model, originals = self.model, Choice(ShardImages(images), indices)
        made = Reconstructions(model.vqvae, model.sha256, originals, self.device)
        return np.concatenate([*batches_of(made, np.arange(len(made)))])

    @torch.no_grad()
    def draw(self, name: str, how: Draw, attributes: np.ndarray) -> np.ndarray:
        """Images (N, H, W, C) uint8, and the picture of the set. attributes (N, A) are -1, +1 or
        0 = left open; the noise of image n is the same whatever is asked for."""
        model, images = self.model, []
        with progress_bar(self.count, name) as bar:
            for numbers in torch.arange(self.count, device=self.device).split(BATCH_SIZE):
                wanted = torch.from_numpy(attributes).to(self.device)[numbers].float()
                codes = []
                for level in range(len(model.grids)):
                    prior, keys = model.prior(level).model, image_keys(0, numbers, level)
                    given = prior.condition(len(wanted), codes, None, wanted)
                    without = prior.condition(len(wanted), codes) if how.guidance != 1 else None
                    options = {"unconditional": without, "method": fastest_method(prior)}
                    codes.append(sample_codes(prior, given, keys, how, **options).codes)
                images.append(pictures.to_uint8(model.decode(codes)))
                bar.update(len(wanted))
        found = np.concatenate(images)
        pictures.save_png(pictures.grid(found[:64], columns=8), self.out / f"{name}.png")
        return found


def ratio(samples: float, reconstructions: float, floor: float) -> float | None:
    """How many times as far above the floor samples lie; None where that says nothing."""
    above = reconstructions - floor
    return (samples - floor) / above if above > 0 else None


def temperature_rows(m: Material, options: argparse.Namespace) -> Rows:
    compared = {
        "floor": lambda: m.train[m.floor],
        "reconstructions": lambda: m.reconstructions(m.real, m.chosen),
        "floor-reconstructions": lambda: m.reconstructions(m.train, m.floor),
    }
    frechet = []
    for name, make in compared.items():
        row = m.scores(name, make)
        frechet.append(row["frechet"])
        yield row
    floor, *references = frechet
    for value in options.temperatures:
        name = f"temperature-{value:g}"
        row = m.scores(name, partial(m.draw, name, Draw(temperature=value), m.asked))
        row["temperature"] = value
        row["ratio"], row["ratio_floor"] = (ratio(row["frechet"], r, floor) for r in references)
        yield row


def draw_chart(rows: list[dict], path: Path) -> None:
    """Fréchet distance over temperature, with floor and reconstructions as lines."""
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [row for row in rows if "temperature" in row]
    x, y = [row["temperature"] for row in points], [row["frechet"] for row in points]
    error = [row["frechet_high"] - row["frechet"] for row in points]
    axes.errorbar(x, y, error, fmt="o-", capsize=3, label="samples")
    for row, style in zip(rows[:3], ("-", "--", ":"), strict=True):
        axes.axhline(row["frechet"], color="0.4", linestyle=style, label=row["contender"])
    axes.set(xlabel="temperature", ylabel="Fréchet distance on the judge's features", ylim=0)
    axes.legend(title=points[0]["case"])
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def others(count: int) -> np.ndarray:
    """(count,) int64: for each image another one, along one random cycle."""
    order = np.random.default_rng(0).permutation(count)
    return np.roll(order, 1)[np.argsort(order)]


def accuracy_rows(names: list[str], columns: dict[str, np.ndarray], base: np.ndarray) -> Rows:
    """A row per attribute and one of their mean, from agreements (N, k)."""
    found = {column: accuracies(values) for column, values in columns.items()}
    for i, name in enumerate([*names, "mean"]):
        row: dict[str, Any] = {"contender": name, "base": float([*base, base.mean()][i])}
        for column, estimates in found.items():
            row[column], row[f"{column}_se"] = estimates[i]
        yield row


def attribute_rows(m: Material, options: argparse.Namespace) -> Rows:
    known, asked = list(m.real.index.attribute_names), m.model.attribute_names
    judged = list(m.judge.config.names)
    usable = set(asked) & set(judged)
    names = most_balanced(m.train.attributes, known, usable, NUM_ATTRIBUTES)
    if not names:
        refuse("no attribute is known to both the priors and the judge")
    full = m.attributes(m.real, m.chosen)
    wanted = full[:, [asked.index(name) for name in names]]
    in_turn = np.where(np.arange(m.count) % 2 == 0, 1, -1)

    def answers(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The judge's yes (N, k) bool to the images of a set."""

        def measure() -> dict[str, Any]:
            batches = batches_of(make(), np.arange(m.count))
            logits = torch.cat([m.judge(pictures.to_unit(batch, m.device)) for batch in batches])
            return {name: {"yes": (logits[:, judged.index(name)] > 0).tolist()} for name in names}

        found = m.kept(name, measure)
        return np.array([found[name]["yes"] for name in names]).T

    real = answers("real", lambda: m.real[m.chosen])
    for guidance in options.guidance:
        how, prefix = Draw(guidance=guidance), f"guidance-{guidance:g}"
        alone = np.empty(wanted.shape)
        for i, name in enumerate(names):
            one = np.zeros_like(full)
            one[:, asked.index(name)] = in_turn
            this = f"{prefix}-{name}"
            alone[:, i] = agreement(answers(this, partial(m.draw, this, how, one))[:, i], in_turn)
        found = answers(prefix, partial(m.draw, prefix, how, full))
        columns = {
            "real": agreement(real, wanted),
            "alone": alone,
            "all": agreement(found, wanted),
            "wrong": agreement(found, wanted[others(m.count)]),
        }
        for row in accuracy_rows(names, columns, base_rate(found, wanted)):
            yield {"case": f"{prefix}, {m.count} images", **row}


SAMPLED = {"temperature": temperature_rows, "attributes": attribute_rows}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--study", choices=[*RUNS, *SAMPLED], required=True)
    add("--run", type=Path, required=True, help="run tree, as run_all.py leaves it")
    add("--out", type=Path, required=True, help="where runs, figures of sets and pictures go")
    add("--json", type=Path, required=True, help="where the table goes")
    add("--levels", type=int, nargs="+", choices=(0, 1), default=[0, 1], help="to train")
    add("--total_images", type=int, help="length of a run, if not the config's")
    add("--judge", type=Path, help="if not <run>/classifier-judge")
    add("--asked", choices=["attributes", "nothing"], default="attributes", help="see above")
    add("--priors", type=Path, nargs="+", help="coarse to fine, if not <run>/prior-level0 ...")
    add("--num_samples", type=int, default=2_000, help="images in each set")
    add("--temperatures", type=float, nargs="+", default=[0.7, 0.8, 0.9, 0.95, 1.0, 1.1])
    add("--guidance", type=float, nargs="+", default=[1.0], help="scales of the guidance")
    options = parser.parse_args()
    options.levels = sorted(set(options.levels))
    rows, about, study = [], {}, trained_rows(options)
    try:
        if options.study in SAMPLED:
            material = Material(options)
            about, study = {"sets": material.key}, SAMPLED[options.study](material, options)
        for row in study:
            rows.append(row)
            write_json(options.json, rows, DEVICE, **about)
    except stage.UserError as error:
        refuse(str(error))
    if options.study == "temperature":
        draw_chart(rows, options.json.with_suffix(".png"))
    for case in dict.fromkeys(row["case"] for row in rows):
        print_table(case, [row for row in rows if row["case"] == case])


if __name__ == "__main__":
    main()
