"""The report of an evaluation: `report.json` for programs, `report.md` for people.

    {"protocol": {...}, "figures": [{"tag", "images", "metric", "features", "value", ...}, ...],
     "pictures": {"title": "relative path"}}

The Markdown is made from the JSON alone, so the two cannot disagree.
"""

import math
from pathlib import Path
from typing import Any

from pipeline.stage import write_json

PROTOCOL_KEYS = frozenset(
    {"data", "data_index_sha256", "source", "split", "image_size", "recipe", "file_format"}
    | {"num_images", "seed", "checkpoint", "samples", "features", "kid_subsets", "kid_subset_size"}
    | {"neighbourhood", "bootstrap_resamples", "blur_sigma", "pixels", "sets"}
    | {"commit", "versions", "hardware", "date"}
)
FIGURE_KEYS = frozenset(
    {"tag", "images", "metric", "features", "features_sha256", "value", "interval", "spread"}
    | {"num_images", "num_reference"}
)
SETS = {
    "floor": "real against real (floor)",
    "reconstructions": "reconstructions",
    "blurred": "blurred real (ceiling)",
    "samples": "samples",
}
KID_HEADLINE_BELOW = 10_000  # images; below it the bias of a Fréchet distance is too large


def write_report(
    out: Path,
    protocol: dict[str, Any],
    figures: list[dict[str, Any]],
    pictures: dict[str, str],
) -> None:
    """Writes report.json and report.md; ValueError names a key that is missing or unknown."""
    _check_keys("protocol", protocol.keys(), PROTOCOL_KEYS)
    for figure in figures:
        _check_keys(f"figure {figure.get('tag')}", figure.keys(), FIGURE_KEYS)
        if not math.isfinite(figure["value"]):
            raise ValueError(f"figure {figure['tag']} is {figure['value']}")
    report = {"protocol": protocol, "figures": figures, "pictures": pictures}
    write_json(out / "report.json", report)
    temporary = out / ".report.md"
    temporary.write_text(markdown(report))
    temporary.replace(out / "report.md")


def _check_keys(what: str, keys: Any, expected: frozenset[str]) -> None:
    if different := sorted(set(keys) ^ expected):
        raise ValueError(f"{what}: keys missing or unknown: {', '.join(different)}")


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: a table per feature extractor, reconstructions, protocol."""
    protocol, figures = report["protocol"], report["figures"]
    lines = ["# Evaluation", "", _headline(protocol, figures), ""]
    for name, features in protocol["features"].items():
        own = [figure for figure in figures if figure["features"] == name]
        lines += [f"## Features: {name} ({features['sha256'][:8]})", "", *_distances(own), ""]
    pixels = [figure for figure in figures if figure["features"] is None]
    lines += ["## Reconstructions", "", "| figure | value |", "|---|---|"]
    lines += [f"| {figure['metric']} | {_number(figure['value'])} |" for figure in pixels]
    for title, path in report["pictures"].items():
        lines += ["", f"![{title}]({path})"]
    lines += ["", "## Protocol", "", "| key | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in _flat(protocol)]
    return "\n".join(lines) + "\n"


def _headline(protocol: dict[str, Any], figures: list[dict[str, Any]]) -> str:
    """One sentence with the figure to quote: KID for few images, else the Fréchet distance."""
    few = protocol["num_images"] < KID_HEADLINE_BELOW
    metric, name = ("kid", "KID") if few else ("frechet", "Fréchet distance")
    have = {(figure["images"], figure["features"]): figure for figure in figures
            if figure["metric"] == metric}  # fmt: skip
    images = "samples" if any(key[0] == "samples" for key in have) else "reconstructions"
    features = "inception" if (images, "inception") in have else next(iter(protocol["features"]))
    figure, floor = have[images, features], have["floor", features]
    why = " (KID, because below 10,000 images a Fréchet distance is mostly bias)" if few else ""
    if not few and features == "inception":
        name = "FID"
    return (
        f"{name} of {SETS[images]} on {features} features: **{_with_error(figure)}** with "
        f"{figure['num_images']:,} images; real against real: {_with_error(floor)}{why}."
    )


def _distances(figures: list[dict[str, Any]]) -> list[str]:
    """The table of one extractor: sets of images down, metrics across."""
    metrics = list(dict.fromkeys(figure["metric"] for figure in figures))
    cells = {(figure["images"], figure["metric"]): _with_error(figure) for figure in figures}
    counts = {figure["images"]: f"{figure['num_images']:,}" for figure in figures}
    fid = any(figure["tag"].endswith("fid/inception") for figure in figures)
    titles = ["FID" if fid and metric == "frechet" else metric for metric in metrics]
    lines = [f"| images | n | {' | '.join(titles)} |", "|---|---|" + "---|" * len(metrics)]
    for images, title in SETS.items():
        if images in counts:
            row = " | ".join(cells.get((images, metric), "") for metric in metrics)
            lines.append(f"| {title} | {counts[images]} | {row} |")
    return lines


def _number(value: float) -> str:
    return f"{value:.4g}"


def _with_error(figure: dict[str, Any]) -> str:
    """The value with its 95 % interval, or ± the spread over subsets."""
    if figure["interval"] is not None:
        low, high = figure["interval"]
        return f"{_number(figure['value'])} [{_number(low)}, {_number(high)}]"
    if figure["spread"] is not None:
        return f"{_number(figure['value'])} ± {_number(figure['spread'])}"
    return _number(figure["value"])


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as dotted keys."""
    rows = []
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            rows += _flat(entry, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, entry))
    return rows
