"""docs/<name>.md from docs/<name>.template.md and the figures in docs/benchmarks/*.json.

    python benchmarks/results.py            writes docs/results.md and every other such page
    python benchmarks/results.py --check    fails where that would change one

A template is Markdown with the signs of Jinja2 (jinja.palletsprojects.com/templates):

    {% set beta = load("vae_beta") %}                       docs/benchmarks/vae_beta.json
    {{ beta.environment.commit[:7] }}                       a value of it
    {{ row(beta.rows, contender="beta 4.0").kl | sig(3) }}  a value of the row with this contender
    {{ beta.rows | table("contender", "KL, nats: kl ± kl_sd") }}    a table of all rows
    {% for r in beta.rows %} ... {% endfor %}               one written out, line by line

A key that is no name, or is a method of dict, stands in brackets: r["validation/mse"], r["values"].

No figure is typed by hand. In a table every digit must come out of {{ }}, but for headings and the
first cell of a line; elsewhere every number with a decimal point or an exponent. Code, in spans or
blocks, is left alone: a setting in prose is written so (`variance 0.135`).
"""

import argparse
import difflib
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError, nodes

DOCS = Path(__file__).resolve().parents[1] / "docs"
OPEN, CLOSE = "\x02", "\x03"  # around what came out of {{ }}, until the page has been checked
NOT_TYPED = re.compile(  # a code span ends with its paragraph
    r"\x02[^\x03]*\x03|```.*?```|`(?:[^`\n]|\n(?!\n))*`|\]\([^)\s]*\)", re.DOTALL
)


class NoPage(Exception):
    """Why not, in one line."""


class Stored(dict):
    """An object of a JSON file, which says what it lacks."""

    def __init__(self, file: str, values: dict[str, Any]):
        super().__init__(values)
        self.stored_in = file

    def __missing__(self, key: str) -> Any:
        raise NoPage(f"{self.stored_in}: no {key!r} beside {', '.join(map(repr, self))}")


# What a template can use.


def row(rows: Sequence[Stored], **wanted: Any) -> Stored:
    """The only one of the rows with these values."""
    found = [r for r in rows if all(r.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise NoPage(f"{rows[0].stored_in}: {len(found)} rows instead of one with {wanted}")
    return found[0]


def fix(value: float, decimals: int = 0) -> str:
    """1,234.5 for one decimal; a negative number of them rounds to tens, hundreds ..."""
    return f"{round(value, decimals) + 0.0:,.{max(decimals, 0)}f}"  # + 0.0: no minus before zero


def sig(value: float, digits: int = 3) -> str:
    """That many significant digits: 46,800, 0.0650, 1.8e-16 for two."""
    exponent = exponent_of(value, digits)
    if exponent < -4:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-")
    return fix(value, digits - 1 - exponent)


def pm(value: float, error: float) -> str:
    """7.85 ± 0.30: two digits of the error, and as many decimals of the value."""
    decimals = 1 - exponent_of(error, 2)
    return f"{fix(value, decimals)} ± {fix(error, decimals)}"


def score(figure: Stored) -> str:
    """A stored fidelity.Score: 7.85 ± 0.30, its spread, or 7.44 [6.54, 8.34], its interval."""
    if figure["spread"] is not None:
        return pm(figure["value"], figure["spread"])
    if figure["interval"] is None:
        return sig(figure["value"])
    low, high = figure["interval"]
    decimals = 1 - exponent_of((high - low) / 2, 2)
    return f"{fix(figure['value'], decimals)} [{fix(low, decimals)}, {fix(high, decimals)}]"


def minutes(seconds: float) -> str:
    """12 min 20 s."""
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def table(rows: Sequence[Stored] | Mapping[str, Stored], *columns: str) -> str:
    """A table with a line for each of the rows, their names first where they have some.

    A column is "key", "heading: key" or "heading: key ± key of its error". A cell is empty where
    the row lacks the key or has null there, but some row must have it.
    """
    names: list[str] = []
    if isinstance(rows, Mapping):
        names, rows = list(rows), list(rows.values())
    parts = [column.rpartition(": ") for column in columns]
    lines = [[heading or keys for heading, _, keys in parts], ["---"] * len(parts)]
    for r in rows:
        lines.append([cell(r, keys.split(" ± "), rows) for *_, keys in parts])
    if names:
        lines = [[name, *line] for name, line in zip(["", "---", *names], lines, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(r: Stored, keys: list[str], rows: Sequence[Stored]) -> str:
    values: list[Any] = [
        r.get(key) if any(key in other for other in rows) else r[key] for key in keys
    ]
    if None in values:
        return ""
    if len(values) == 2:
        return pm(*values)
    if isinstance(values[0], str):
        return values[0]
    if isinstance(values[0], Stored):
        return score(values[0])
    return f"{values[0]:,}" if isinstance(values[0], int) else sig(values[0])


def exponent_of(value: float, digits: int) -> int:
    """Of the power of ten that the first digit counts, after rounding to so many digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


# The page.


def render(template: str, stored: Path) -> str:
    """The page of a template.

    Args:
        template: Markdown with Jinja2's signs.
        stored: the directory of the JSON files.
    Raises:
        NoPage: a file, key or row is not there, or a figure was typed by hand.
    """

    def load(name: str) -> Any:
        path = stored / f"{name}.json"
        if not path.is_file():
            raise NoPage(f"{path.name} is not in docs/benchmarks")
        return json.loads(path.read_text(), object_hook=lambda values: Stored(path.name, values))

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=mark,
    )
    environment.globals |= {"load": load, "row": row}
    environment.filters |= {f.__name__: f for f in (fix, sig, pm, score, minutes, table)}
    try:
        refuse_constants(environment.parse(template, filename="<template>"))
        page = environment.from_string(template).render()
    except (NoPage, TemplateError, LookupError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        raise NoPage(f"line {lines[-1]}: {error}" if lines else str(error)) from error
    refuse_typed(page)
    return page.replace(OPEN, "").replace(CLOSE, "")


def mark(value: Any) -> str:
    text = str(value)
    return text if OPEN in text else f"{OPEN}{text}{CLOSE}"  # a macro's parts have theirs


def refuse_constants(tree: nodes.Template) -> None:
    """A figure between {{ }} that comes from no file would be typed by hand, too."""
    for output in tree.find_all(nodes.Output):
        for part in output.nodes:
            named = isinstance(part, nodes.TemplateData | nodes.Name) or part.find(nodes.Name)
            if not named:
                raise NoPage(f"line {part.lineno}: {{{{ }}}} around what was typed by hand")


def refuse_typed(page: str) -> None:
    before = ""
    for line in NOT_TYPED.sub("", page).splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            typed = before.startswith("|") and re.search(r"\d", "|".join(cells[2:]))
        else:
            typed = re.search(r"\d\.\d|\d[eE][-+]?\d", line)
        if typed:
            raise NoPage(f"typed by hand: {line}")
        before = line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    pages = {}
    for template in sorted(DOCS.glob("*.template.md")):
        try:
            page = render(template.read_text(), DOCS / "benchmarks")
        except NoPage as error:
            sys.exit(f"docs/{template.name}: {error}")
        pages[DOCS / template.name.replace(".template", "")] = page
    for path, page in pages.items():
        if not check:
            path.write_text(page)
        elif page != (old := path.read_text() if path.is_file() else ""):
            print(*difflib.unified_diff(old.splitlines(), page.splitlines(), n=0), sep="\n")
            sys.exit(f"docs/{path.name} is not what its template and JSON give: make results")


if __name__ == "__main__":
    main()
