"""Scores samples and reconstructions against real images: report.json, report.md and report.html.

    python pipeline/evaluate.py --data runs/demo/shards --checkpoint runs/demo/vqvae \\
        --samples runs/demo/samples --judge runs/demo/classifier-judge --out runs/demo/evaluation
    python pipeline/evaluate.py ... --inception_weights weights-inception-2015-12-05-6726825d.pth
    python pipeline/evaluate.py ... --samples '[runs/a/seed0, runs/a/seed1, runs/a/seed2]'
    python pipeline/evaluate.py ... --num_images 500          a quick look
    torchrun --nproc_per_node 2 pipeline/evaluate.py ...      features by several processes

--samples is a run of sample_prior.py, a folder of PNG or JPEG files, image shards, or a run tree
whose models draw as they are scored. Several are taken for one model under several seeds: each has
its figures, and `samples` is their mean with its spread; pictures and what takes long are of the
first. With samples of which attributes or classes were asked (sample_prior.py --conditions) come
what the judge sees of them, with --accuracy_score true what a classifier learns from them, and with
--selector distances over the acceptance rate of rejection sampling.

FID needs the published Inception weights; without them the distances are on the judge's features,
and named so. Features are kept in --features and found again by what they are of. Every figure
carries its protocol:

    python pipeline/evaluate.py verify runs/demo/evaluation      measures all again and compares
    python pipeline/evaluate.py compare runs/a/evaluation runs/b/evaluation --out runs/a-and-b

`compare` refuses figures of different protocols, unless --force true.
"""

import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from pipeline import stage
from pipeline.data.images import open_images
from pipeline.evaluation import (
    conditional,
    extractors,
    features,
    fidelity,
    html,
    pictures,
    pixels,
    protocol,
    rejection,
    report,
)
from pipeline.evaluation.accuracy_score import AccuracyScore
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.fidelity import Score
from pipeline.evaluation.findings import Findings
from pipeline.evaluation.judge import half_of
from pipeline.evaluation.sets import (
    Blurred,
    Choice,
    Images,
    Mirrored,
    ShardImages,
    batches_of,
    choose,
    code_usage,
    open_reconstructions,
    open_set,
)
from pipeline.models.vqvae import VQVAE
from pipeline.training.checkpoint import load_model, model_sha256, read_about
from pipeline.training.distributed import make_accelerator
from pipeline.training.tracking import Tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Config of the stage."""

    data: Path
    """Directory with image shards, made by shard_data.py."""
    checkpoint: Path
    """Run directory of train_vqvae.py or train_vae.py, whose reconstructions are scored."""
    out: Path
    """Where the reports, the pictures, metrics.jsonl and tensorboard/ go."""
    samples: list[Path] | Path | None = None
    """Images to score, see above; several = the same model under several seeds."""
    judge: Path | None = None
    """Run directory of train_classifier.py; None = Inception features only."""
    selector: Path | None = None
    """Run directory of train_classifier.py --half 0: distances over the acceptance rate."""
    inception_weights: Path | None = None
    """File with Inception weights; None = the published file, if torch.hub has it already."""
    download: bool = False
    """Fetch the published Inception weights where there are none."""
    dinov2_weights: Path | None = None
    """File with the weights of DINOv2 ViT-L/14."""
    dinov2_code: Path | None = None
    """Checkout of DINOv2's repository, whose code is run; None = torch.hub's."""
    clip_weights: Path | None = None
    """File with the weights of CLIP ViT-B/32."""
    lpips_weights: Path | None = None
    """File with the weights of LPIPS; None = torch.hub's, if it is there."""
    vgg16_weights: Path | None = None
    """File with the weights of VGG16 for LPIPS; None = torch.hub's, if it is there."""
    extractor_sha256: str | None = None
    """SHA-256 of weights files other than the published ones, separated by commas; their figures
    are named by its first 8 digits."""
    features: Path | None = None
    """Where features are kept; None = features/ beside --out."""
    split: Literal["valid", "test"] = "valid"
    """Real images to compare with."""
    num_images: int | None = None
    """Images in every set; None = as many as there are in all of them."""
    train_images: int = 10_000
    """At most so many training images are searched for what samples repeat; 0 = none."""
    accuracy_score: bool = False
    """Train classifiers on samples, reconstructions and real images, and test them on real ones
    (minutes)."""
    classifier: AccuracyScore = AccuracyScore()
    """How these are trained."""
    seed: int = 0
    """Seed of the choice of images, the subsets of KID and the bootstrap."""

    def __post_init__(self) -> None:
        for name, nothing in (("num_images", None), ("train_images", 0)):
            value, least = getattr(self, name), fidelity.MIN_IMAGES
            if value != nothing and value < least:
                raise ValueError(f"{name} must be {nothing} or at least {least}, got {value}")


def main(config: Evaluate) -> int:
    """Returns the images that the checkpoint has seen."""
    accelerator = make_accelerator(timeout_sec=86_400)  # rank 0 works on alone
    evaluation = Evaluation(config, accelerator.device)
    evaluation.extract()  # the features are all that several processes share
    if accelerator.is_main_process:
        stage.remove_leftovers(config.out)
        evaluation.score()
        evaluation.write()
    return evaluation.about["images_seen"]


class Evaluation:
    """The sets of an evaluation, their features, and what is found of them."""

    def __init__(self, config: Evaluate, device: torch.device):
        self.config, self.device = config, device
        self.about = read_about(config.checkpoint)
        size = self.size = self.about["config"]["image_size"]
        self.scorers, absent = extractors.find_extractors(
            config.judge, config.inception_weights, config.extractor_sha256, device,
            dinov2=config.dinov2_weights, dinov2_code=config.dinov2_code,
            clip=config.clip_weights, download=config.download,
        )  # fmt: skip
        if not self.scorers:
            raise stage.UserError(f"no features to score on: {'; '.join(absent[:2])}")
        self.similarity, no_similarity = extractors.find_similarity(
            config.lpips_weights, config.vgg16_weights, config.extractor_sha256, device
        )
        self.real, self.train = (
            open_images(config.data, split, size) for split in (config.split, "train")
        )
        recipe = self.real.recipe.hash
        extractors.check_recipe(recipe, size, config.data, config.checkpoint, config.judge)
        self.selector = config.selector and rejection.load_selector(config.selector, recipe, device)

        # All sets have the same number of images. The floor is of training images that the judge
        # has not seen, because it would know the others too well.
        real, train = ShardImages(self.real), ShardImages(self.train)
        samples = {name: self._open(path) for name, path in named(config.samples).items()}
        half = read_about(config.judge)["half"] if config.judge else None
        if self.selector and half == rejection.SELECTOR_HALF:
            raise stage.UserError(
                f"{config.judge} was trained on the selector's half of the images and would praise "
                "what the selector chose; give a judge trained with train_classifier.py --half 1"
            )
        unseen = np.flatnonzero(half_of(self.train.keys) != half)
        sizes = {config.split: len(real), "train (floor)": len(unseen)}
        sizes |= {name: len(images) for name, images in samples.items()}
        count = self.count = config.num_images or min(sizes.values())
        if count > min(sizes.values()) or count < fidelity.MIN_IMAGES:
            raise stage.UserError(f"--num_images {count} does not fit: there are {sizes} images")

        def some(images: Images, number: int = count, among: np.ndarray | None = None) -> Choice:
            among = np.arange(len(images)) if among is None else among
            return Choice(images, choose(number, among, config.seed))

        self.reference = some(real)
        self.reconstructed = open_reconstructions(config.checkpoint, self.reference, device)
        self.blur_sigma = size / 32
        self.samples = {name: some(images) for name, images in samples.items()}
        self.sets: dict[str, Images] = {
            "floor": some(train, among=unseen),
            "reconstructions": self.reconstructed,
            "blurred": Blurred(self.reference, self.blur_sigma),
            **self.samples,
        }
        self.searched = some(train, min(config.train_images, len(train)) if samples else 0)
        self.found = Findings(count)
        self.found.absent += [*absent, *no_similarity]

    def _open(self, path: Path) -> Images:
        """The images of --samples; UserError for those of another checkpoint."""
        images = open_set(
            path, self.size, self.real.recipe.channels, split="train",
            count=self.config.num_images or len(self.real), device=self.device,
        )  # fmt: skip
        if images.protocol.get("vqvae_sha256") not in (None, model_sha256(self.config.checkpoint)):
            raise stage.UserError(
                f"{path} was not decoded by {self.config.checkpoint}; give the checkpoint that "
                "made the samples"
            )
        return images

    def extract(self) -> None:
        """Features of all sets, by all processes; they are there on the first only."""
        sets, searched = {"real": self.reference, **self.sets}, {}
        if len(self.searched):
            searched = {"training": self.searched, "real mirrored": Mirrored(self.reference)}
            searched["samples mirrored"] = Mirrored(next(iter(self.samples.values())))
        directory = self.config.features or self.config.out.parent / "features"
        self.features = {
            # copies are searched by the features that are quickest to have
            name: features.extract(
                images, self.scorers[:1] if name in searched else self.scorers, directory, name
            )
            for name, images in {**sets, **searched}.items()
        }

    def layer(self, name: str, scorer: Extractor) -> torch.Tensor:
        """The features (N, F) of a set that distances are of."""
        return next(iter(self.features[name][scorer.name].values()))

    # The parts.

    def score(self) -> None:
        """All figures. What takes long is of the first samples only."""
        found, config = self.found, self.config
        for scorer in self.scorers:
            layers = {name: self.features[name][scorer.name] for name in ("real", *self.sets)}
            found.add_distances(scorer, layers, config.seed)
        if len(self.samples) > 1:
            found.add_means(list(self.samples), "samples")
        self._reconstructions()
        for name, images in self.samples.items():
            grid = pictures.grid(images[np.arange(min(64, self.count))], columns=8)
            found.pictures[name.replace(":", " ")] = grid
        for name in list(self.samples)[:1]:
            self._copies(name)
            self._conditions(name)

    def _reconstructions(self) -> None:
        """How near they are, pixel by pixel, and how much of the codebooks they use."""
        found, name = self.found, "reconstructions"
        found.add_all(name, pixels.pixel_figures(self.reference, self.reconstructed))
        if self.similarity:
            pair = (batches_of(s, range(self.count)) for s in (self.reference, self.reconstructed))
            values = torch.cat(list(map(self.similarity, *pair)))
            found.add(name, "lpips", Score(float(values.mean())), self.similarity)
        if isinstance(self.reconstructed.model, VQVAE):
            usage = code_usage(self.reconstructed.model, self.reference, self.device)
            found.add_all(name, {metric: Score(value) for metric, value in usage.items()})
        found.pictures[name] = self.reconstructed.grid()

    def _copies(self, name: str) -> None:
        """Training images among the samples, and near them."""
        if not len(self.searched):
            self.found.absent.append("no search for training images: --train_images is 0")
            return
        scorer = self.scorers[0]
        own, held_out = (
            [self.layer(each, scorer) for each in views]
            for views in ((name, "samples mirrored"), ("real", "real mirrored"))
        )
        self.found.add_copies(
            name, self.samples[name], self.searched, scorer, own, held_out,
            self.layer("training", scorer), self.config.seed,
        )  # fmt: skip

    def _conditions(self, name: str) -> None:
        """What the samples show of what was asked for."""
        config, found = self.config, self.found
        images = self.samples[name]
        asked = conditional.asked_of(images)
        if asked is None:
            found.absent.append(
                "no attribute accuracy, no acceptance rate and no classification accuracy score: "
                "nothing was asked of the samples; sample_prior.py --conditions does"
            )
            return
        data = conditional.Data(self.reference, self.real, self.train)
        if config.judge:
            with found.trying("attribute accuracy"):
                judge = load_model(config.judge, "classifier").to(self.device)
                rows = conditional.attributes(judge, asked, images, name, data, self.device)
                found.add_rows(rows)
        if self.selector:
            with found.trying("distances over the acceptance rate"):
                both = {s.name: (self.layer(name, s), self.layer("real", s)) for s in self.scorers}
                found.curves |= conditional.curves(
                    self.selector, asked, images, both, self.device, config.seed
                )
        else:
            found.absent.append("no distances over the acceptance rate: give --selector")
        if config.accuracy_score:
            with found.trying("classification accuracy score"):
                found.add_rows(conditional.classification(
                    asked, images, name, data,
                    lambda of: open_reconstructions(config.checkpoint, of, self.device),
                    config.classifier, self.device, config.seed,
                ))  # fmt: skip
        else:
            found.absent.append("no classification accuracy score: --accuracy_score true")

    # The report.

    def write(self) -> None:
        config, found, seen = self.config, self.found, self.about["images_seen"]
        about = self.protocol()
        tracker = Tracker(config.out, "evaluate", seen, seen, anew=True)
        tracker.introduce(seen, "evaluation", config)
        tracker.document(seen, "protocol", about)
        tracker.log(seen, {figure["tag"]: figure["value"] for figure in found.figures})
        files = {title: f"{title.replace(' ', '_')}.png" for title in found.pictures}
        for title, image in found.pictures.items():
            tracker.image(seen, f"evaluation/{title}", image)
            pictures.save_png(image, config.out / files[title])
        tracker.close()
        report.write_report(config.out, about, found.figures, files, found.curves, found.absent)
        runs = [config.checkpoint, *sorted(config.checkpoint.resolve().parent.glob("prior-level*"))]
        html.write_report_page(config.out, [*runs, *([config.judge] if config.judge else [])])
        print(f"{config.out / 'report.html'}: {self.count:,} images per set")

    def protocol(self) -> dict[str, Any]:
        """All that decides a figure, and what does not."""
        config, real = self.config, self.real
        hashes = {scorer.name: {"sha256": scorer.sha256} for scorer in self.scorers}
        if config.judge:
            hashes["judge"] |= describe(config.judge)
        if self.similarity:
            hashes[self.similarity.name] = {"sha256": self.similarity.sha256}
        return {
            "data": str(config.data),
            "data_index_sha256": real.index.sha256,
            "source": real.index.source,
            "split": config.split,
            "image_size": self.size,
            "recipe": real.recipe.hash,
            "file_format": "uint8 as in PNG files, lossless, all sets alike",
            "num_images": self.count,
            "train_images": len(self.searched),
            "seed": config.seed,
            "classifier": stage.to_dict(config.classifier) if config.accuracy_score else None,
            "checkpoint": describe(config.checkpoint),
            "samples": {name: chosen.images.protocol for name, chosen in self.samples.items()},
            "selector": self.selector and self.selector.sha256,
            "features": hashes,
            "kid_subsets": fidelity.KID_SUBSETS,
            "kid_subset_size": fidelity.kid_subset_size(self.count),
            "neighbourhood": fidelity.NEIGHBOURHOOD,
            "bootstrap_resamples": fidelity.RESAMPLES,
            "blur_sigma": self.blur_sigma,
            "pixels": "MSE in [0, 1], PSNR and SSIM per image, of 8-bit pixels",
            "sets": {
                "reference": self.reference.protocol,
                "floor": self.sets["floor"].protocol,
                "reconstructions": "of the reference images themselves, so perhaps below the floor",
                "blurred": "the reference images themselves",
                "held-out real": "the reference images; duplicates: the half that set no threshold",
            },
            "config": stage.to_dict(config),
            "threads": torch.get_num_threads(),
            **stage.provenance(),
        }


def named(given: list[Path] | Path | None) -> dict[str, Path]:
    """The sets of samples by name: `samples`, or `samples:<directory>` where there are several."""
    paths = given if isinstance(given, list) else [given] if given else []
    if len(paths) == 1:
        return {"samples": paths[0]}
    names = [f"samples:{path.name}" for path in paths]
    if len(set(names)) < len(names):
        raise stage.UserError(f"--samples: the directories need names of their own, got {names}")
    return dict(zip(names, paths, strict=True))


def describe(path: Path) -> dict[str, Any]:
    """What a report says of a trained model."""
    about = read_about(path)
    keys = ("images_seen", "validation", "half", "recipe")
    chosen = {key: about[key] for key in keys if key in about}
    return {"path": str(path), "sha256": model_sha256(path), **chosen}


# verify and compare.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Config of `evaluate.py verify REPORT`."""

    report: Path
    """report.json, or its directory."""
    relative_tolerance: float = 1e-4
    """By so much may a figure differ: rounding depends on the machine."""


def verify(request: Verify) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise stage.UserError("verify runs in one process; call it with python")
    old = report.read_report(request.report)
    torch.set_num_threads(old["protocol"]["threads"])
    with tempfile.TemporaryDirectory() as directory:
        yaml = Path(directory) / "config.yaml"  # JSON is YAML
        out = Path(directory) / "evaluation"  # beside it features/, which start empty
        yaml.write_text(
            json.dumps({**old["protocol"]["config"], "out": str(out), "features": None})
        )
        main(stage.parse(Evaluate, ["--config", str(yaml)]))
        new = report.read_report(out)
    for difference in protocol.differences(old["protocol"], new["protocol"]):
        print(f"{difference.key} was {difference.first}, is {difference.second}")
    rows = protocol.compare_figures(old, new, request.relative_tolerance)
    for row in rows:
        mark = "same" if row.same else "OTHER"
        print(f"{mark:5}  {row.tag}: {row.old} {'' if row.same else f'now {row.new}'}")
    other = [row.tag for row in rows if not row.same]
    if other:
        raise stage.UserError(
            f"{len(other)} of {len(rows)} figures of {request.report} are others now, {other[0]} "
            "first; see the list above, and the protocol for what else has changed"
        )
    print(f"{request.report}: all {len(rows)} figures came out again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Config of `evaluate.py compare REPORT REPORT ... --out OUT`."""

    reports: list[Path]
    """Reports, each a report.json or its directory."""
    out: Path
    """Where side_by_side.json, .md and .html go."""
    force: bool = False
    """Put figures of different protocols side by side all the same."""


def compare(config: Compare) -> None:
    found = report.compare_reports(config.reports, config.force)
    stage.write_json(config.out / "side_by_side.json", found)
    report.write_text(config.out / "side_by_side.md", report.comparison_markdown(found))
    report.write_text(config.out / "side_by_side.html", html.side_by_side_page(found))
    print(f"{config.out / 'side_by_side.html'}: {len(config.reports)} reports")


def command_line(words: list[str]) -> tuple[type, Callable[[Any], int | None], list[str]]:
    """Config, function and flags of what is asked for: the reports that `verify` and `compare` are
    followed by become flags."""
    if words[:1] == ["verify"]:
        config_type, function, flag, most = Verify, verify, "--report=", 1
    elif words[:1] == ["compare"]:
        config_type, function, flag, most = Compare, compare, "--reports+=", len(words)
    else:
        return Evaluate, main, words
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))[:most]
    return config_type, function, [*(flag + path for path in paths), *words[1 + len(paths) :]]


if __name__ == "__main__":
    config_type, function, sys.argv[1:] = command_line(sys.argv[1:])
    stage.run(config_type, function, __doc__)
