"""The report of an evaluation: `report.json` for programs, `report.md` for people.

    {"protocol": {...},
     "figures": [{"tag", "images", "metric", "features", "value", "interval", ...}, ...],
     "curves": {title: {"x", "y", "note", "series": {name: [[x, y, error or null], ...]}}},
     "pictures": {title: relative path},
     "absent": [what was not measured, why, and how to get it]}

The Markdown is made from the JSON alone, so the two cannot disagree; html.py makes report.html from
the same tables. Several reports stand side by side only where their protocols allow it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from pipeline.evaluation import protocol as protocols
from pipeline.evaluation.protocol import check_keys, flat
from pipeline.failpoint import failpoint
from pipeline.stage import UserError, write_json

Figure = Mapping[str, Any]

REPORT_KEYS = frozenset({"protocol", "figures", "curves", "pictures", "absent"})
FIGURE_KEYS = frozenset(
    {"tag", "images", "metric", "features", "features_sha256", "value", "interval", "spread"}
    | {"num_images", "num_reference"}
)
PLACE = ("images", "features", "features_sha256", "num_images", "num_reference")
CURVE_KEYS = frozenset({"x", "y", "note", "series"})
SETS = {
    "floor": "real against real (floor)",
    "reconstructions": "reconstructions",
    "blurred": "blurred real (ceiling)",
    "samples": "samples",
}
METRICS = {  # where no line is here, the metric's own name is the title
    "frechet": "Fréchet distance ↓",
    "frechet_extrapolated": "Fréchet distance, n → ∞ ↓",
    "kid": "KID ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "inception_score": "inception score ↑",
    "auc": "AUC, told from real ↓",
    "duplicates": "duplicates ↓",
    "exact_copies": "exact copies ↓",
    "mse": "MSE ↓",
    "psnr": "PSNR, dB ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "cas_accuracy": "CAS, accuracy ↑",
    "cas_average_precision": "CAS, average precision ↑",
}
READING = (
    "↓ lower is better, ↑ higher; [ ] is a 95 % interval, ± the spread over subsets or seeds. A "
    "set as good as real images scores as the floor does."
)
KID_HEADLINE_BELOW = 10_000  # images; below it the bias of a Fréchet distance is too large


class Table(NamedTuple):
    """What Markdown and HTML print alike; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Headline(NamedTuple):
    """The figure to quote."""

    name: str  # KID, Fréchet distance or FID
    figure: Figure
    floor: Figure | None
    why: str  # this metric; empty where it needs no word


# Writing and reading.


def write_report(
    out: Path,
    protocol: Mapping[str, Any],
    figures: Sequence[Figure],
    pictures: Mapping[str, str],
    curves: Mapping[str, Any] | None = None,
    absent: Sequence[str] = (),
) -> None:
    """Writes report.json and report.md.

    ValueError names a key that is missing or unknown, a tag that is there twice, and a figure or
    curve that is not finite; then nothing is written.
    """
    report = {
        "protocol": dict(protocol),
        "figures": list(figures),
        "curves": dict(curves or {}),
        "pictures": dict(pictures),
        "absent": list(absent),
    }
    check(report)
    write_json(out / "report.json", report)
    write_text(out / "report.md", markdown(report))


def check(report: Mapping[str, Any]) -> None:
    """ValueError for what `write_report` refuses."""
    check_keys("report", report, REPORT_KEYS)
    protocols.check(report["protocol"])
    seen = set()
    for figure in report["figures"]:
        tag = figure.get("tag")
        check_keys(f"figure {tag}", figure, FIGURE_KEYS)
        if not math.isfinite(figure["value"]):
            raise ValueError(f"figure {tag} is {figure['value']}")
        place = title_of_metric(figure), *(figure[key] for key in PLACE)  # in the tables
        if tag in seen or place in seen:
            raise ValueError(f"figure {tag} is there twice")
        seen |= {tag, place}
    for title, curve in report["curves"].items():
        check_keys(f"curve {title}", curve, CURVE_KEYS)
        for x, y, error in (point for points in curve["series"].values() for point in points):
            if not all(math.isfinite(number) for number in (x, y, error or 0)):
                raise ValueError(f"curve {title} has the point {x}, {y}, {error}")


def read_report(path: Path) -> dict[str, Any]:
    """A report.json, or that of a directory; UserError where it is not one of this version."""
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
        check(report)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no report of evaluate.py: {reason}; evaluate again") from error
    return report


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    failpoint("commit")
    temporary.replace(path)


# What a report says, as sentences and tables.


def headline(report: Mapping[str, Any]) -> Headline | None:
    """KID for few images, else the Fréchet distance: of samples if there are any, on Inception
    features if there are any. None where no distance was measured."""
    few = report["protocol"]["num_images"] < KID_HEADLINE_BELOW
    metric, name = ("kid", "KID") if few else ("frechet", "Fréchet distance")
    have = [figure for figure in report["figures"] if figure["metric"] == metric]
    samples = [f for f in have if f["images"].startswith("samples:")]  # one of several runs
    own = {name: [f for f in have if f["images"] == name] for name in SETS}
    candidates = own["samples"] or samples or own["reconstructions"]
    if not candidates:
        return None
    figure = candidates[0]
    for other in candidates:
        if (other["images"], other["features"]) == (figure["images"], "inception"):
            figure = other
    floors = [f for f in have if (f["images"], f["features"]) == ("floor", figure["features"])]
    if not few and figure["features"] == "inception":
        name = "FID"
    why = "KID, because below 10,000 images a Fréchet distance is mostly bias" if few else ""
    return Headline(name, figure, floors[0] if floors else None, why)


def headline_text(report: Mapping[str, Any]) -> str:
    """The headline as one sentence, in Markdown."""
    if (found := headline(report)) is None:
        return "No distance between sets of images was measured."
    figure, floor = found.figure, found.floor
    real = "not measured" if floor is None else with_error(floor)
    return (
        f"{found.name} of {title_of_set(figure['images'])} on {figure['features']} features: "
        f"**{with_error(figure)}** with {figure['num_images']:,} images; real against real: {real}"
        + (f" ({found.why})." if found.why else ".")
    )


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All figures: a table of sets and metrics per feature extractor, then the others."""
    found, others = [], []
    by_features: dict[tuple[str, str], list[Figure]] = {}
    for figure in report["figures"]:
        if figure["features"] is None or "/" in figure["metric"]:  # of an attribute, a level
            others.append(figure)
        else:
            key = figure["features"], figure["features_sha256"]
            by_features.setdefault(key, []).append(figure)
    for (name, sha256), figures in by_features.items():
        found.append(_distances(f"Features: {name} ({sha256[:8]})", figures))
    return [*found, _others(others)] if others else found


def _others(figures: Sequence[Figure]) -> Table:
    """Metrics down, sets of images across."""
    columns = list(dict.fromkeys(_set_and_count(figure) for figure in figures))
    found: dict[str, dict[str, str]] = {}
    for figure in figures:
        found.setdefault(_label(figure), {})[_set_and_count(figure)] = with_error(figure)
    rows = [[label, *(cells.get(c, "-") for c in columns)] for label, cells in found.items()]
    return Table("Pixels, codes and labels", ["figure", *columns], rows)


def _distances(title: str, figures: Sequence[Figure]) -> Table:
    """Sets of images down, metrics across."""
    metrics = list(dict.fromkeys(title_of_metric(figure) for figure in figures))
    found: dict[tuple[str, str], dict[str, str]] = {}  # a row for each count of a set
    for figure in figures:
        cells = found.setdefault((figure["images"], _count(figure)), {})
        cells[title_of_metric(figure)] = with_error(figure)
    order = [*SETS, *(images for images, _ in found)]
    rows = [
        [title_of_set(images), count, *(cells.get(metric, "-") for metric in metrics)]
        for (images, count), cells in sorted(found.items(), key=lambda row: order.index(row[0][0]))
    ]
    return Table(title, ["images", "n", *metrics], rows)


def curve_table(title: str, curve: Mapping[str, Any]) -> Table:
    """The points of a curve; x down, series across."""
    series = {name: {x: (y, error) for x, y, error in points}
              for name, points in curve["series"].items()}  # fmt: skip
    rows = []
    for x in sorted({x for points in series.values() for x in points}):
        cells = [points.get(x) for points in series.values()]
        rows.append([number(x), *("-" if cell is None else plus_minus(*cell) for cell in cells)])
    return Table(title, [curve["x"], *series], rows)


def protocol_table(protocol: Mapping[str, Any]) -> Table:
    return Table("Protocol", ["key", "value"], [[key, str(value)] for key, value in flat(protocol)])


def title_of_set(images: str) -> str:
    kind, _, name = images.partition(":")
    return f"{SETS.get(kind, kind)}: {name}" if name else SETS.get(kind, kind)


def title_of_metric(figure: Figure) -> str:
    metric: str = figure["metric"]
    name, slash, part = metric.partition("/")  # of an attribute or a level
    title = METRICS.get(name, name) + (slash and f": {part}")
    if figure["features"] == "inception":
        title = title.replace("Fréchet distance", "FID")
    return title.replace("_", " ")


def _label(figure: Figure) -> str:
    """The metric and its features."""
    on = "" if figure["features"] is None else f", {figure['features']}"
    on += f" ({figure['features_sha256'][:8]})" if figure["features_sha256"] else ""
    return title_of_metric(figure) + on


def _set_and_count(figure: Figure) -> str:
    return f"{title_of_set(figure['images'])}, n = {_count(figure)}"


def _count(figure: Figure) -> str:
    """Images scored, and those they are compared with where these are not as many."""
    count, reference = figure["num_images"], figure["num_reference"]
    same = reference in (None, count)
    return f"{count:,}" if same else f"{count:,} against {reference:,}"


def number(value: float) -> str:
    """Four digits; all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def with_error(figure: Figure) -> str:
    """The value with its 95 % interval, or ± the spread over subsets."""
    if figure["interval"] is not None:
        low, high = figure["interval"]
        return f"{number(figure['value'])} [{number(low)}, {number(high)}]"
    return plus_minus(figure["value"], figure["spread"])


def plus_minus(value: float, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


# Markdown.


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, from the JSON alone."""
    lines = ["# Evaluation", "", headline_text(report), "", READING]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", *markdown_table(table)]
    for title, curve in report["curves"].items():
        table = curve_table(title, curve)
        lines += ["", f"## {title}", "", f"{curve['y']}. {curve['note']}", ""]
        lines += markdown_table(table)
    if report["pictures"]:
        lines += ["", "## Pictures"]
    for title, path in report["pictures"].items():
        lines += ["", f"![{title}]({quote(path)})"]
    lines += ["", "## What is absent", "", *_absent(report["absent"])]
    lines += ["", "## Protocol", "", *markdown_table(protocol_table(report["protocol"]))]
    return "\n".join(lines) + "\n"


def markdown_table(table: Table) -> list[str]:
    """The table's lines; what would end a cell or the line, or be HTML, is escaped."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    cells = [
        [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line]
        for line in lines
    ]
    return [f"| {' | '.join(line)} |" for line in cells]


def _absent(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines] or ["Nothing that evaluate.py can measure."]


# Several reports.


def compare_reports(paths: Sequence[Path], force: bool = False) -> dict[str, Any]:
    """Reports side by side, as JSON for `comparison_markdown` and html.side_by_side_page:

        {"reports": {name: protocol}, "rows": [{"tag", "features_sha256", "figures": {name: ...}}],
         "differences": [plain lines], "pictures": {name: {title: path}}}

    A row holds figures of one tag on the same features. UserError names the keys in which protocols
    differ, unless `force`; then they are kept in "differences".
    """
    names = [str(path.parent if path.is_file() else path) for path in paths]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise UserError("give at least two reports, each of them once")
    reports = {name: read_report(path) for name, path in zip(names, paths, strict=True)}
    first = names[0]
    lines = [
        f"{found.key} is {found.first} in {first}, {found.second} in {name}"
        for name in names[1:]
        for found in protocols.differences(reports[first]["protocol"], reports[name]["protocol"])
    ]
    rows: dict[tuple, dict[str, Any]] = {}
    for name, report in reports.items():
        for figure in report["figures"]:
            key = figure["tag"], figure["features_sha256"]
            row = rows.setdefault(key, {"tag": key[0], "features_sha256": key[1], "figures": {}})
            row["figures"][name] = figure
    for row in rows.values() if not lines else ():  # else that is why
        counts = {name: _count(figure) for name, figure in row["figures"].items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} in {name}" for name, count in counts.items())
            lines.append(f"{row['tag']} is of other counts: {told}")
    if lines and not force:
        raise UserError(
            f"these reports are not comparable: {'; '.join(lines)}; evaluate them alike, or force "
            "the comparison"
        )
    return {
        "reports": {name: report["protocol"] for name, report in reports.items()},
        "rows": list(rows.values()),
        "differences": lines,
        "pictures": {name: report["pictures"] for name, report in reports.items()},
    }


FORCED = "Forced: the protocols differ, so that figures of a row are not comparable."


def side_by_side(comparison: Mapping[str, Any]) -> list[Table]:
    """Figures down, reports across: a table per set of images."""
    names = list(comparison["reports"])
    by_set: dict[str, list[list[str]]] = {}
    for row in comparison["rows"]:
        figure = next(iter(row["figures"].values()))
        cells = [with_error(row["figures"][n]) if n in row["figures"] else "-" for n in names]
        by_set.setdefault(title_of_set(figure["images"]), []).append([_label(figure), *cells])
    return [Table(title, ["figure", *names], rows) for title, rows in by_set.items()]


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """Reports side by side as Markdown, from the JSON alone."""
    lines = ["# Evaluations side by side", ""]
    if comparison["differences"]:
        lines += [f"**{FORCED}**", "", *(f"- {line}" for line in comparison["differences"]), ""]
    lines += [READING, ""]
    for table in side_by_side(comparison):
        lines += [f"## {table.title}", "", *markdown_table(table), ""]
    return "\n".join(lines)
