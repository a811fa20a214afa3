"""Reports as one HTML file each, for people: no network, no file beside it, light and dark.

    write_report_page(Path("runs/demo/evaluation"), [Path("runs/demo/vqvae"), ...])
    write_comparison_page(Path("runs/celeba64/comparison"))

A page is made from the JSON of its report, the PNG files named there and the metrics.jsonl of runs,
alone. All that comes from them is escaped, and the page's own policy (CSP) lets the browser load
nothing and run no script but the one below, known by its hash.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from pipeline.evaluation import report as reports
from pipeline.evaluation.comparison import COLUMNS, COMPONENTS, NOTES
from pipeline.evaluation.comparison import SETS as COMPARED_SETS
from pipeline.evaluation.fidelity import tag as distance_tag
from pipeline.evaluation.report import Table

Curve = Mapping[str, Any]  # {"x", "y", "note", "series"} as in report.json


class Section(NamedTuple):
    """A part of a page: `body` is HTML."""

    title: str
    body: str


# The page.

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<nav aria-label="Contents"><ol>
$contents
</ol></nav>
<main>
<header>
<h1>$title</h1>
<p class="quiet">$subtitle</p>
</header>
$sections
</main>
$script
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --quiet: #5b6472; --line: #dde1e7;
  --paper: #fff; --raised: #f6f7f9; --accent: #0b5cad; --warn: #a33b00;
  --c0: #0b5cad; --c1: #d9480f; --c2: #2b8a3e; --c3: #862e9c; --c4: #b02a5b; --c5: #0b7285; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --quiet: #9aa4b2; --line: #313843;
  --paper: #14171c; --raised: #1c2027; --accent: #7ab8ff; --warn: #ffa064;
  --c0: #7ab8ff; --c1: #ff9a5c; --c2: #74d68a; --c3: #d69af0; --c4: #f58fb4; --c5: #62d3e3; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; display: grid; grid-template-columns: 14rem minmax(0, 1fr); background:
  var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", sans-serif; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow: auto;
  padding: 2.6rem 1rem 2rem 1.5rem; font-size: 0.875rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav a { display: block; padding: 0.2rem 0.6rem; color: var(--quiet); text-decoration: none;
  border-left: 2px solid var(--line); }
nav a:hover, nav a:focus { color: var(--accent); border-color: var(--accent); }
main { max-width: 74rem; padding: 2rem 2rem 5rem; min-width: 0; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid
  var(--line); }
h1, h2, p, li, figcaption, td, th { overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0.5rem 0; }
.quiet, figcaption, caption { color: var(--quiet); font-size: 0.875rem; }
.warn { border-left: 4px solid var(--warn); padding: 0.5rem 1rem; background: var(--raised); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
  gap: 0.8rem; margin: 1.4rem 0 0.8rem; padding: 0; }
.cards div { background: var(--raised); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.8rem 1rem; }
.cards div.quote { border-color: var(--accent); }
.cards dt { color: var(--quiet); font-size: 0.875rem; }
.cards dd { margin: 0; }
.cards dd.value { font-size: 1.7rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.quote dd.value { color: var(--accent); font-weight: 650; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.3rem; }
th, td { padding: 0.3rem 0.55rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: baseline; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background:
  var(--paper); }
td small { color: var(--quiet); font-size: 0.8rem; }
tbody tr:hover > * { background: var(--raised); }
tbody.reference { border-bottom: 2px solid var(--line); }
tbody.reference > tr > * { color: var(--quiet); }
td.words, th.words { text-align: left; }
table.wrapped td.words { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
th button { all: unset; cursor: pointer; }
th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\25B4"; }
th[aria-sort=descending] button::after { content: " \\25BE"; }
figure { margin: 1rem 0; min-width: 0; }
figcaption { margin-top: 0.4rem; max-width: 46rem; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; border: 1px solid
  var(--line); }
.gallery { columns: 26rem; column-gap: 2rem; }
.gallery figure { break-inside: avoid; margin: 0; padding: 0.5rem 0; }
.pixels { image-rendering: pixelated; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1rem 2rem; }
.chart > svg { display: block; width: 100%; height: auto; }
.chart strong { color: var(--ink); }
svg text { font-size: 11px; fill: var(--quiet); font-family: inherit; }
svg .grid { stroke: var(--line); }
svg .line { stroke: currentColor; stroke-width: 1.8; fill: none; }
svg .line .bar { stroke-width: 1; stroke-dasharray: none; }
svg .line.dashed { stroke-dasharray: 5 4; }
svg .line circle { fill: currentColor; stroke: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0.2rem 0;
  padding: 0; font-size: 0.8rem; }
.legend li::before { content: ""; display: inline-block; width: 1.1em; margin-right: 0.4em;
  vertical-align: 0.25em; border-top: 3px solid currentColor; }
.legend li.dashed::before { border-top-style: dotted; }
.legend span { color: var(--ink); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.strip { display: grid; grid-template-columns: minmax(6rem, 13rem) minmax(5rem, 11rem) 1fr;
  gap: 0 0.9rem; align-items: center; font-size: 0.875rem; max-width: 52rem; margin: 0.8rem 0;
  font-variant-numeric: tabular-nums; }
.strip > div { display: contents; }
.strip svg { width: 100%; height: 1.9rem; display: block; }
.strip .floor { stroke: var(--quiet); stroke-dasharray: 3 3; }
.strip line { vector-effect: non-scaling-stroke; stroke: currentColor; }
.strip .dot { stroke-width: 9px; stroke-linecap: round; }
.strip .bar { stroke-width: 2px; }
.strip .axis { stroke: var(--line); }
details { margin: 0.4rem 0; font-size: 0.9rem; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 60rem) {
  html { scroll-padding-top: 4rem; }
  body { grid-template-columns: minmax(0, 1fr); }
  nav { z-index: 1; padding: 0; background: var(--paper); border-bottom: 1px solid var(--line); }
  nav ol { display: flex; overflow-x: auto; padding: 0.3rem 0.6rem; }
  nav a { white-space: nowrap; border: 0; padding: 0.5rem 0.6rem; }
  main { padding: 1.2rem 1rem 4rem; }
  .strip, .strip > div { display: block; }
  .strip .value { float: right; }
}
@media print { nav { display: none; } body { display: block; } }
"""

# Sorts the rows of a table by the first number of their cells; references stay at the top.
SCRIPT = """
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.onclick = () => {
    const head = button.parentElement, table = head.closest("table");
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const each of table.querySelectorAll("thead th")) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = table.tBodies[table.tBodies.length - 1];
    const text = row => row.cells[head.cellIndex].textContent;
    const value = row => head.cellIndex ? parseFloat(text(row).replaceAll(",", "")) : NaN;
    body.append(...[...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (isNaN(x) && isNaN(y)) return head.cellIndex ? 0 : sign * text(a).localeCompare(text(b));
      return isNaN(x) ? 1 : isNaN(y) ? -1 : sign * (x - y);
    }));
  };
}
"""


def page(title: str, subtitle: str, sections: Sequence[Section], sortable: bool = False) -> str:
    """A whole page. Titles are plain text, bodies HTML."""

    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    contents = [
        f'<li><a href="#part-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections)
    ]
    bodies = [
        f'<section id="part-{number}">\n<h2>{escape(section.title)}</h2>\n{section.body}\n'
        "</section>"
        for number, section in enumerate(sections)
    ]
    policy = f"default-src 'none'; img-src data:; style-src {allowed(STYLE)}"
    if sortable:
        policy += f"; script-src {allowed(SCRIPT)}"
    return PAGE.substitute(
        policy=policy,
        title=escape(title),
        subtitle=escape(subtitle),
        style=STYLE,
        contents="\n".join(contents),
        sections="\n".join(bodies),
        script=f"<script>{SCRIPT}</script>" if sortable else "",
    )


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def table(found: Table, kind: str = "", num_references: int = 0) -> str:
    """A table that scrolls by itself where it is wide.

    Args:
        kind: sortable, or wrapped where cells are long.
        num_references: first rows, which stay at the top of a sortable table.
    """
    columns = [[row[number] for row in found.rows] for number in range(len(found.columns))]
    kinds = ["" if _is_numeric(column) else "words" for column in columns]
    head = [escape(column) for column in found.columns]
    if kind == "sortable":
        head = [f'<button type="button">{column}</button>' for column in head]
    head = [f'<th scope="col" class="{k}">{cell}</th>' for k, cell in zip(kinds, head, strict=True)]
    rows = [
        f'<tr><th scope="row">{escape(first)}</th>{"".join(map(_cell, kinds[1:], cells))}</tr>'
        for first, *cells in found.rows
    ]
    bodies = f"<tbody>{''.join(rows[num_references:])}</tbody>"
    if num_references:
        references = "".join(rows[:num_references])
        bodies = f'<tbody class="reference">{references}</tbody>{bodies}'
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{''.join(head)}</tr></thead>{bodies}</table></div>"
    )


def _is_numeric(column: Sequence[str]) -> bool:
    return all(re.match(r"-?\d|-$", cell) for cell in column)


def _cell(kind: str, text: str) -> str:
    """A number large and its uncertainty small, or words."""
    if kind:
        return f'<td class="words">{escape(text)}</td>'
    value, space, error = text.partition(" ")
    small = f"<small>{escape(space + error)}</small>" if error else ""
    return f"<td>{escape(value)}{small}</td>"


# Pictures and charts.


def picture(directory: Path, title: str, path: str, caption: str = "") -> str:
    """A PNG file below `directory` as it is, in base64; plain words where there is none."""
    file = directory / path
    if not file.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"picture {title} is outside of the report: {path}")
    content = file.read_bytes() if file.is_file() else b""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return paragraph(f"{title}: {path} is missing or no PNG file.", "quiet")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    scale = max(1, 960 // max(1, width))  # small images are shown in whole pixels
    return (
        f'<figure><img class="{"pixels" if scale > 1 else ""}" alt="{escape(title)}" '
        f'width="{width * scale}" height="{height * scale}" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{escape(caption or title)}</figcaption></figure>"
    )


def gallery(directory: Path, pictures: Mapping[str, str]) -> str:
    shown = [picture(directory, title, path) for title, path in pictures.items()]
    return '<div class="gallery">\n' + "\n".join(shown) + "\n</div>"


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 260, 58, 14, 12, 40  # of a chart and its margins
NUM_COLORS = 6
LOGARITHMIC_ABOVE = 10  # ratio of the largest to the smallest value
SHOWN_POINTS = 60  # with more, a line has no dots


def chart(title: str, curve: Curve, numbers: bool) -> str:
    """A curve as a figure: lines, dots with their errors, a legend.

    Args:
        numbers: with all of its points as a table that unfolds.
    """
    points = [point for series in curve["series"].values() for point in series]
    if not points:
        return ""
    ends = [y + sign * (error or 0) for _, y, error in points for sign in (-1, 1)]
    logarithmic = min(ends) > 0 and max(ends) / min(ends) > LOGARITHMIC_ABOVE
    x_of, x_ticks = _axis([x for x, _, _ in points], LEFT, WIDTH - RIGHT)
    y_of, y_ticks = _axis(ends, HEIGHT - BOTTOM, TOP, logarithmic)
    drawn = [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, curve["x"], "middle")]
    for tick in y_ticks:
        drawn.append(f'<path class="grid" d="M{LEFT} {y_of(tick)}H{WIDTH - RIGHT}"/>')
        drawn.append(_text(LEFT - 6, y_of(tick) + 4, _tick(tick), "end"))
    for tick in x_ticks:
        drawn.append(f'<path class="grid" d="M{x_of(tick)} {HEIGHT - BOTTOM}v4"/>')
        drawn.append(_text(x_of(tick), HEIGHT - BOTTOM + 16, _tick(tick), "middle"))
    legend = []
    for number, (name, series) in enumerate(curve["series"].items()):
        color, dashed = f"c{number % NUM_COLORS}", " dashed" if number >= NUM_COLORS else ""
        drawn.append(f'<g class="line {color}{dashed}">{_line(series, x_of, y_of)}</g>')
        legend.append(f'<li class="{color}{dashed}"><span>{escape(name)}</span></li>')
    unit = curve["y"] + (", logarithmic" if logarithmic else "")
    parts = [
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong> '
        f"({escape(unit)})</figcaption>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *drawn,
        f'</svg><ul class="legend">{"".join(legend)}</ul>',
    ]
    if curve["note"]:
        parts.append(f"<figcaption>{escape(curve['note'])}</figcaption>")
    if numbers:
        unfolded = table(reports.curve_table("", curve))
        parts.append(f"<details><summary>Numbers</summary>{unfolded}</details>")
    return "\n".join([*parts, "</figure>"])


def _axis(values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Any:
    """A map from values to places between `start` and `end`, and the ticks within the values."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    warp = math.log10 if logarithmic else float
    if not logarithmic:
        low, high = low - (high - low) * 0.03, high + (high - low) * 0.03
    locator = LogLocator(subs=(1, 2, 5)) if logarithmic else MaxNLocator(5, steps=[1, 2, 5, 10])

    def place(value: float) -> float:
        share = (warp(value) - warp(low)) / (warp(high) - warp(low))
        return round(start + (end - start) * share, 1)

    return place, [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _line(series: Sequence[Sequence[Any]], x_of: Any, y_of: Any) -> str:
    """A polyline, and where there is room for them dots with error bars that tell their values."""
    path = "L".join(f"{x_of(x)} {y_of(y)}" for x, y, _ in series)
    parts = [f'<path d="M{path}"/>']
    for x, y, error in series if len(series) <= SHOWN_POINTS else ():
        if error:
            parts.append(f'<path class="bar" d="M{x_of(x)} {y_of(y - error)}V{y_of(y + error)}"/>')
        told = escape(f"{_tick(x)}: {reports.plus_minus(y, error)}")
        parts.append(
            f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="2.6"><title>{told}</title></circle>'
        )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _tick(value: float) -> str:
    return EngFormatter(sep="")(value) if abs(value) >= 1e3 else f"{value:g}"


def strips(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], floor: float | None) -> str:
    """Figures on one scale: a dot with its interval or spread each, the floor as a dashed line."""
    spans = [_span(figure) for _, figure in rows]
    low, high = min(0.0, *(low for low, _ in spans)), max(high for _, high in spans)
    scale = 96 / ((high - low) or 1.0)

    def place(value: float) -> float:
        return round(2 + (value - low) * scale, 2)

    parts = []
    for (name, figure), (start, end) in zip(rows, spans, strict=True):
        middle = place(figure["value"])
        lines = ['<line class="axis" x1="0" x2="100" y1="5" y2="5"/>']
        if floor is not None:
            at = place(floor)
            lines.append(f'<line class="floor" x1="{at}" x2="{at}" y1="0" y2="10"/>')
        lines.append(f'<line class="bar" x1="{place(start)}" x2="{place(end)}" y1="5" y2="5"/>')
        lines.append(f'<line class="dot" x1="{middle}" x2="{middle}" y1="5" y2="5"/>')
        parts.append(
            f"<div><span>{escape(name)}</span>"
            f'<span class="value">{escape(reports.with_error(figure))}</span>'
            '<svg class="c0" viewBox="0 0 100 10" preserveAspectRatio="none" '
            f'role="img" aria-label="{escape(name)}">{"".join(lines)}</svg></div>'
        )
    caption = f"{title}; from {reports.number(low)} to {reports.number(high)}" + (
        "" if floor is None else f", dashed: the floor, {reports.number(floor)}"
    )
    return (
        f'<figure><div class="strip">{"".join(parts)}</div>'
        f"<figcaption>{escape(caption)}.</figcaption></figure>"
    )


def _span(figure: Mapping[str, Any]) -> tuple[float, float]:
    if figure["interval"] is not None:
        return figure["interval"]
    return figure["value"] - (figure["spread"] or 0), figure["value"] + (figure["spread"] or 0)


# Training.

TRAINING = {  # title -> unit, tags
    "Reconstruction error": ("MSE, pixels in [0, 1]", r"loss/reconstruction|validation/mse"),
    "Objective": ("nats per image", r"vae/(loss|negative_elbo)|validation/negative_elbo"),
    "Priors": ("nats per code", r"prior/(train|validation)_nats_per_code"),
    "Classifier": ("cross-entropy in nats", r"classifier/(train|validation)_loss"),
    "Effective codes": ("perplexity", r"(codebook|validation)/level\d+/perplexity"),
    "Unused codes": ("share since the last line", r"codebook/level\d+/unused_fraction"),
    "Revived codes": ("codes since the last line", r"codebook/level\d+/revived"),
    "FID": ("distance", r"r?fid/.*"),
    "Fréchet distance": ("distance, not an FID", r"(evaluation/\w+/)?frechet/.*"),
    "Kernel distance": ("KID", r"(evaluation/\w+/)?kid/.*"),
}
MOST_POINTS = 300  # of a training curve on a page


def training_curves(runs: Sequence[Path]) -> dict[str, Curve]:
    """Losses, codebook health and distances over images seen, from the metrics.jsonl of training
    runs; a run without one is left out. What is not finite is no point, of long curves every k-th
    point is kept and the last."""
    series: dict[str, dict[str, list]] = {title: {} for title in TRAINING}
    for run in runs:
        path = run / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        # a line without its end is being written, or was torn by whatever ended the run
        for line in (json.loads(line) for line in text.splitlines(True) if line.endswith("\n")):
            for tag, value in line.items():
                for title, (_, tags) in TRAINING.items():
                    if re.fullmatch(tags, tag) and math.isfinite(value):
                        points = series[title].setdefault(f"{run.name} {tag}", [])
                        points.append([line["images_seen"], value, None])
    curves = {}
    for title, found in series.items():
        if found:
            shown = {name: _thinned(points) for name, points in found.items()}
            unit = TRAINING[title][0]
            curves[title] = {"x": "images seen", "y": unit, "note": "", "series": shown}
    return curves


def _thinned(points: list) -> list:
    step = -(-len(points) // MOST_POINTS)
    return points[:-1:step] + points[-1:]


def charts(curves: Mapping[str, Curve], numbers: bool) -> str:
    drawn = [chart(title, curve, numbers) for title, curve in curves.items()]
    return '<div class="charts">\n' + "\n".join(drawn) + "\n</div>"


# The report of evaluate.py.


def report_page(report: Mapping[str, Any], directory: Path, training: Mapping[str, Curve]) -> str:
    """The page of a report.json.

    Args:
        directory: where its pictures are.
        training: as `training_curves` returns it; empty where there is none.
    """
    protocol, figures = report["protocol"], report["figures"]
    sections = [Section("The figure to quote", _quote(report))]
    if report["pictures"]:
        sections.append(Section("Pictures", gallery(directory, report["pictures"])))
    for found in reports.tables(report):
        body = table(found)
        for name in dict.fromkeys(figure["features"] for figure in figures):
            if name is not None and found.title.startswith(f"Features: {name} ("):
                body = _standing(figures, name) + body
        sections.append(Section(found.title, body))
    if report["curves"]:
        sections.append(Section("Curves", charts(report["curves"], numbers=True)))
    if training:
        note = paragraph("From the metrics.jsonl of the training runs, over images seen.", "quiet")
        sections.append(Section("Training", note + charts(training, numbers=False)))
    else:
        sections.append(Section("Training", paragraph("No metrics.jsonl of a training run here.")))
    absent = report["absent"]
    nothing = paragraph("Nothing that evaluate.py can measure.")
    sections.append(Section("What is absent", bullets(absent) if absent else nothing))
    sections.append(Section("Protocol", _protocol(protocol)))
    subtitle = (
        f"{protocol['source']}, split {protocol['split']}, {protocol['image_size']} px, "
        f"{protocol['num_images']:,} images per set; {protocol['date']}, commit "
        f"{protocol['commit'][:8]}"
    )
    return page(f"Evaluation of {protocol['checkpoint']['path']}", subtitle, sections)


def _quote(report: Mapping[str, Any]) -> str:
    """Cards: the figure to quote, and on the same metric what to read it against."""
    if (found := reports.headline(report)) is None:
        return paragraph(reports.headline_text(report))
    keys = ("metric", "features", "features_sha256", "num_images")
    own = [f for f in report["figures"] if all(f[key] == found.figure[key] for key in keys)]
    cards = []
    for figure in sorted(own, key=lambda figure: figure is not found.figure):
        value, error = reports.number(figure["value"]), reports.with_error(figure)
        cards.append(
            f'<div class="{"quote" if figure is found.figure else ""}">'
            f"<dt>{escape(reports.title_of_set(figure['images']))}</dt>"
            f'<dd class="value">{escape(value)}</dd>'
            f'<dd class="quiet">{escape(error.removeprefix(value)) or "&nbsp;"}</dd></div>'
        )
    text = reports.headline_text(report).replace("**", "")
    return (
        paragraph(text)
        + f'<dl class="cards">{"".join(cards)}</dl>'
        + paragraph(reports.READING, "quiet")
    )


def _standing(figures: Sequence[Mapping[str, Any]], features: str) -> str:
    """The Fréchet distances of all sets on one scale."""
    own = [f for f in figures if (f["metric"], f["features"]) == ("frechet", features)]
    if not own:
        return ""
    floors = [figure["value"] for figure in own if figure["images"] == "floor"]
    rows = [(reports.title_of_set(figure["images"]), figure) for figure in own]
    name = reports.title_of_metric(own[0])
    return strips(name, rows, floors[0] if floors else None)


def _protocol(protocol: Mapping[str, Any]) -> str:
    """Its keys; what is nested unfolds."""
    nested = {key: value for key, value in protocol.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in protocol.items() if key not in nested}
    parts = [table(reports.protocol_table(plain), "wrapped")]
    for key, value in nested.items():
        unfolded = table(reports.protocol_table(value), "wrapped")
        parts.append(f"<details><summary>{escape(key)}</summary>{unfolded}</details>")
    return "".join(parts)


def write_report_page(directory: Path, runs: Sequence[Path] = ()) -> None:
    """Writes report.html beside report.json, with the training curves of `runs`."""
    report = reports.read_report(directory)
    text = report_page(report, directory, training_curves(runs))
    reports.write_text(directory / "report.html", text)


def side_by_side_page(comparison: Mapping[str, Any]) -> str:
    """The page of `report.compare_reports`, with the pictures of each report."""
    sections = []
    if comparison["differences"]:
        lines = bullets(comparison["differences"])
        forced = f'<div class="warn">{paragraph(reports.FORCED)}{lines}</div>'
        sections.append(Section("Not comparable", forced))
    for found in reports.side_by_side(comparison):
        sections.append(Section(found.title, table(found)))
    for name, pictures in comparison["pictures"].items():
        if pictures:
            sections.append(Section(f"Pictures of {name}", gallery(Path(name), pictures)))
    for name, protocol in comparison["reports"].items():
        sections.append(Section(f"Protocol of {name}", _protocol(protocol)))
    return page("Evaluations side by side", reports.READING, sections)


# The comparison of compare.py.

DASHES = (
    "A dash means that the run does not have the figure. Samples, code length and bound of a "
    "VQ-VAE need samples and priors beside it (sample_prior.py, train_prior.py). -ELBO, bound, KL "
    "and information of a VAE need its report (report_vae.py, in <run>/report); an autoencoder "
    "without a density has none. gaussian and mixture are of VAEs alone."
)


def comparison_page(report: Mapping[str, Any], directory: Path) -> str:
    """The page of a comparison.json; its pictures are in `directory`."""
    protocol, rows = report["protocol"], report["rows"]
    notes = (NOTES["sets"], NOTES["distances"], DASHES)
    sections = [Section("How to read it", "".join(map(paragraph, notes)))]
    for features, about in protocol["features"].items():
        body = _samples(report, features)
        for metric in ("frechet", "kid"):
            body += table(_distances(report, metric, features), "sortable", num_references=2)
        sections.append(Section(f"Features: {features} ({about['sha256'][:8]})", body))
    probes = {
        tag: tag.removeprefix("probe/").replace("/", ", ").replace("_", " ")
        for tag in sorted({tag for figures in rows.values() for tag in figures})
        if tag.startswith("probe/")
    }
    for name, titles in [*COLUMNS.items(), ("probes", probes)]:
        if titles:
            found = _table("run", titles, rows)
            note = paragraph(NOTES[name], "quiet") if name in NOTES else ""
            sections.append(Section(name.capitalize(), note + table(found, "sortable")))
    caption = f"Rows: real images, then, where there are any, {', '.join(COMPARED_SETS)}."
    shown = [
        picture(directory, name, path, f"{name}. {'' if name == 'scatter' else caption}")
        for name, path in report["pictures"].items()
    ]
    sections.append(Section("Pictures", "\n".join(shown)))
    if absent := report.get("absent"):
        sections.append(Section("What is absent", bullets(absent)))
    sections.append(Section("Protocol", _protocol(protocol)))
    runs = [
        [name, about["path"], about["kind"], f"{about['images_seen']:,}", about["sha256"]]
        for name, about in report["runs"].items()
    ]
    columns = ["run", "path", "kind", "images seen", "SHA-256"]
    sections.append(Section("Runs", table(Table("", columns, runs), "wrapped")))
    subtitle = (
        f"{protocol['num_images']:,} images in every set, against as many of the "
        f"{protocol['split']} split; {protocol['date']}, commit {protocol['commit'][:8]}"
    )
    return page(f"Comparison of {len(report['runs'])} runs", subtitle, sections, sortable=True)


def _samples(report: Mapping[str, Any], features: str) -> str:
    """The runs' samples on one scale, by the metric that a report would quote."""
    few = report["protocol"]["num_images"] < reports.KID_HEADLINE_BELOW
    metric = "kid" if few else "frechet"
    tag = distance_tag("samples", metric, features)
    found = [(name, figures[tag]) for name, figures in report["rows"].items() if tag in figures]
    if not found:
        return paragraph("No run has samples.", "quiet")
    floor = report["references"][distance_tag("floor", metric, features)]
    title = reports.title_of_metric({"metric": metric, "features": features})
    return strips(f"{title} of samples", found, floor["value"])


def _distances(report: Mapping[str, Any], metric: str, features: str) -> Table:
    """Floor, ceiling and runs down, the sets of images across."""
    title = reports.title_of_metric({"metric": metric, "features": features})
    titles = {distance_tag(images, metric, features): images for images in COMPARED_SETS}
    titles[distance_tag("mixture", metric, features)] = f"mixture of {COMPONENTS}"
    rows = {}
    for name in ("floor", "blurred"):  # the same whatever they are compared with
        found = report["references"][distance_tag(name, metric, features)]
        rows[reports.SETS[name]] = dict.fromkeys(titles, found)
    return _table(title, titles, rows | report["rows"])


def _table(first: str, titles: Mapping[str, str], rows: Mapping[str, Mapping]) -> Table:
    """Rows down, the figures whose tags are in `titles` across; a dash for none."""
    cells = [
        [name, *(reports.with_error(figures[tag]) if tag in figures else "-" for tag in titles)]
        for name, figures in rows.items()
    ]
    return Table("", [first, *titles.values()], cells)


def write_comparison_page(directory: Path) -> None:
    """Writes comparison.html beside comparison.json."""
    report = json.loads((directory / "comparison.json").read_text())
    reports.write_text(directory / "comparison.html", comparison_page(report, directory))


# The report of report_vae.py.


def vae_page(report: Mapping[str, Any], meanings: Mapping[str, str], directory: Path) -> str:
    """The page of a VAE's report.json; `meanings` says what its figures are, by name."""
    protocol, figures = report["protocol"], report["figures"]
    rows = []
    for name in [name for name in meanings if name in figures]:
        found = figures[name]
        value = reports.plus_minus(found["value"], found["standard_error"])
        rows.append([name, value, f"{found['count']:,}", meanings[name]])
    note = "Nats are per image, sums over pixels and latent dimensions; ± is one standard error."
    sections = [
        Section("Figures", paragraph(note, "quiet")
                + table(Table("", ["figure", "value", "n", "meaning"], rows), "wrapped")),
        Section("Pictures", gallery(directory, report["pictures"])),
        Section("Protocol", _protocol(protocol)),
    ]  # fmt: skip
    subtitle = f"split {protocol['split']}; {protocol['date']}, commit {protocol['commit'][:8]}"
    return page(f"Report of {protocol['checkpoint']['path']}", subtitle, sections)


def write_vae_page(directory: Path, meanings: Mapping[str, str]) -> None:
    """Writes report.html beside a VAE's report.json."""
    report = json.loads((directory / "report.json").read_text())
    reports.write_text(directory / "report.html", vae_page(report, meanings, directory))
