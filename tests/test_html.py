"""Pages: whole HTML that holds what the JSON holds, and neither loads nor runs anything else."""

import base64
import copy
import hashlib
import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from test_protocol import make_figure, make_protocol, make_report

from pipeline.evaluation import html, pictures
from pipeline.evaluation.comparison import COLUMNS, with_seeds
from pipeline.evaluation.report import FORCED, compare_reports, number, tables, write_report

VOID = {"meta", "img", "br", "line", "circle", "path"}
HOSTILE = '</td><script>alert("1")</script><img src="https://a.example/" onerror=\'x\'>$style'


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.words = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words += data
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(text, scripts=0):
    page = Page(text)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            if name in ("src", "href", "srcset", "action", "data"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:40])
    assert not page.all("link") and not page.all("iframe") and len(page.all("script")) == scripts
    assert "url(" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert [a["href"][1:] for a in page.all("a")] == ids  # the table of contents
    # the browser is told what it may run: these very bytes
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'")
    for kind in ("style", "script"):
        for content in re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
    return page


def save_picture(path, seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (8, 12, 3)).astype(np.uint8)
    pictures.save_png(image, path)


def embedded(page):
    return [base64.b64decode(img["src"].partition(",")[2]) for img in page.all("img")]


@pytest.fixture
def directory(tmp_path):
    save_picture(tmp_path / "samples.png")
    report = make_report()
    write_report(tmp_path, report["protocol"], report["figures"], report["pictures"],
                 report["curves"], report["absent"])  # fmt: skip
    return tmp_path


def write_metrics(run, lines):
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_report_page_has_every_figure_curve_picture_and_line_of_the_json(directory):
    html.write_report_page(directory)
    page = assert_self_contained((directory / "report.html").read_text())
    report = make_report()
    for figure in report["figures"]:
        assert number(figure["value"]) in page.words
        for end in figure["interval"] or ():
            assert number(end) in page.words
    for table in tables(report):
        for row in table.rows:
            value = row[2].partition(" ")[0]
            assert row[0] in page.texts and (value == "-" or value in page.texts)
    for text in ("5.91", "0.4", "7.77", "The limit is at 0.", "Fréchet over 1/n"):
        assert text in page.words
    assert embedded(page) == [(directory / "samples.png").read_bytes()]
    assert report["absent"][0] in page.texts
    assert "c" * 64 in page.texts and "runs/demo/vqvae" in page.words
    assert "No metrics.jsonl of a training run here." in page.texts
    assert "real against real: -0.01348 ± 0.02006" in page.words


def test_a_page_is_made_of_the_files_alone(directory):
    html.write_report_page(directory)
    first = (directory / "report.html").read_bytes()
    html.write_report_page(directory)
    assert (directory / "report.html").read_bytes() == first


def test_hostile_names_are_words_on_every_page(tmp_path):
    report = make_report(
        protocol=make_protocol(data=HOSTILE, checkpoint={"path": HOSTILE, HOSTILE: HOSTILE}),
        figures=[make_figure(f"samples:{HOSTILE}", HOSTILE, 0.5, features=HOSTILE)],
        pictures={HOSTILE: "absent.png"}, absent=[HOSTILE],
    )  # fmt: skip
    series = {HOSTILE: [[1, 2, 0.5], [2, 3, None]]}
    report["curves"] = {HOSTILE: {"x": HOSTILE, "y": HOSTILE, "note": HOSTILE, "series": series}}
    text = html.report_page(report, tmp_path, report["curves"])
    page = assert_self_contained(text)
    assert page.texts.count(HOSTILE) > 8 and page.all("img") == []
    assert escape(HOSTILE) in text and HOSTILE not in text

    rows = {HOSTILE: {"mse": make_figure("samples", "mse", 0.1)}}
    assert HOSTILE in assert_self_contained(
        html.comparison_page(make_comparison(rows), tmp_path), scripts=1
    ).texts  # fmt: skip
    found = {"value": 1.0, "standard_error": 0.1, "count": 9}
    vae = {"protocol": report["protocol"], "figures": {HOSTILE: found}, "pictures": {}}
    assert HOSTILE in assert_self_contained(html.vae_page(vae, {HOSTILE: HOSTILE}, tmp_path)).texts


def test_a_missing_false_or_distant_picture_is_told(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in ("absent.png", "text.png"):
        found = html.picture(tmp_path, "samples", path)
        assert f"{path} is missing or no PNG file" in found and "<img" not in found
    (tmp_path / "inside").mkdir()
    save_picture(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(ValueError, match="outside of the report"):
            html.picture(tmp_path / "inside", "samples", path)


def test_small_pictures_are_shown_in_whole_pixels(tmp_path):
    save_picture(tmp_path / "small.png")
    (img,) = Page(html.picture(tmp_path, "small", "small.png")).all("img")
    assert (img["width"], img["height"], img["class"]) == ("960", "640", "pixels")
    pictures.save_png(np.zeros((10, 700, 3), np.uint8), tmp_path / "large.png")
    (img,) = Page(html.picture(tmp_path, "large", "large.png")).all("img")
    assert (img["width"], img["height"], img["class"]) == ("700", "10", "")


def test_training_curves_are_the_lines_of_metrics(tmp_path):
    write_metrics(tmp_path / "vqvae", [
        {"images_seen": 10, "time": 1.0, "loss/reconstruction": 0.5, "loss/total": 9.0},
        {"images_seen": 20, "time": 2.0, "loss/reconstruction": float("nan"),
         "codebook/level1/perplexity": 12.5},
        {"images_seen": 20, "time": 3.0, "validation/mse": 0.25, "rfid/inception": 40.0,
         "evaluation/reconstructions/frechet/judge": 4.0},
    ])  # fmt: skip
    write_metrics(tmp_path / "prior-level0", [
        {"images_seen": n, "time": 1.0, "prior/train_nats_per_code": 1 / n} for n in range(1, 1002)
    ])  # fmt: skip
    with open(tmp_path / "vqvae" / "metrics.jsonl", "a") as file:
        file.write('{"images_seen": 30, "loss/rec')  # torn
    names = ("vqvae", "prior-level0", "absent")
    curves = html.training_curves([tmp_path / name for name in names])
    assert list(curves) == ["Reconstruction error", "Priors", "Effective codes", "FID",
                            "Fréchet distance"]  # fmt: skip
    assert curves["Reconstruction error"]["series"] == {
        "vqvae loss/reconstruction": [[10, 0.5, None]], "vqvae validation/mse": [[20, 0.25, None]],
    }  # fmt: skip
    (points,) = curves["Priors"]["series"].values()
    assert len(points) <= html.MOST_POINTS + 1
    assert points[0] == [1, 1.0, None] and points[-1] == [1001, 1 / 1001, None]
    assert all(y == 1 / x for x, y, _ in points)
    page = assert_self_contained(html.report_page(make_report(pictures={}), tmp_path, curves))
    for text in (*curves, "vqvae loss/reconstruction", "prior-level0 prior/train_nats_per_code"):
        assert text in page.texts


def coordinates(figure):
    """The path of each series: [(x, y), ...]."""
    paths = re.findall(r'<path d="M([^"VH]*)"/>', figure)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in paths]


def test_a_chart_has_its_points_where_they_belong():
    points = [[0, 1.0, None], [5, 2.0, 0.5], [10, 3.0, None]]
    curve = {"x": "n", "y": "d", "note": "", "series": {"a": points, "b": [[10, 1.0, None]]}}
    figure = html.chart("title", curve, numbers=False)
    (a, b) = coordinates(figure)
    assert b == [a[-1][:1] + a[0][1:]]  # the x of one, the y of the other
    (x0, y0), (x1, y1), (x2, y2) = a
    assert html.LEFT < x0 < x2 < html.WIDTH - html.RIGHT
    assert html.TOP < y2 < y0 < html.HEIGHT - html.BOTTOM
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    (error,) = re.findall(r'<path class="bar" d="M(\S+) (\S+)V(\S+)"/>', figure)
    assert float(error[0]) == x1
    assert float(error[1]) - y1 == pytest.approx((y0 - y1) / 2, abs=0.2)
    assert y1 - float(error[2]) == pytest.approx((y0 - y1) / 2, abs=0.2)
    ticks = re.findall(r'x="(\S+)" y="\S+" text-anchor="middle">(\S+)</text>', figure)
    assert {text: float(x) for x, text in ticks}["10"] == x2
    assert "logarithmic" not in figure and "<details>" not in figure
    # equal ratios, equal steps
    curve["series"] = {"a": [[0, 0.01, None], [1, 1.0, None], [2, 100.0, None]]}
    figure = html.chart("title", curve, numbers=True)
    ((_, y0), (_, y1), (_, y2)) = coordinates(figure)[0]
    assert "logarithmic" in figure and "<details>" in figure
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


@pytest.mark.parametrize("y", [0.0, -3.0, 5e-324, 1e300])
def test_a_single_point_makes_a_chart(y):
    figure = html.chart(
        "t", {"x": "n", "y": "d", "note": "", "series": {"a": [[7, y, None]]}}, True
    )
    ((point,),) = coordinates(figure)
    assert html.LEFT < point[0] < html.WIDTH and 0 < point[1] < html.HEIGHT
    assert "nan" not in figure and "inf" not in figure


def test_no_points_make_no_chart():
    curve = {"x": "n", "y": "d", "note": "", "series": {"a": []}}
    assert html.chart("t", curve, numbers=True) == ""


def test_dots_of_a_strip_stand_at_their_values():
    rows = [("a", make_figure("samples", "kid", 2.0, interval=[1.0, 4.0])),
            ("b", make_figure("samples", "kid", 0.0))]  # fmt: skip
    text = html.strips("KID", rows, floor=2.0)
    dots = re.findall(r'class="dot" x1="(\S+)" x2="(\S+)"', text)
    (bar, _) = re.findall(r'class="bar" x1="(\S+)" x2="(\S+)"', text)
    assert dots == [("50.0", "50.0"), ("2.0", "2.0")] and bar == ("26.0", "98.0")
    assert text.count('class="floor" x1="50.0"') == 2 and "the floor, 2." in text


def make_comparison(rows):
    """A comparison.json of two references and these rows."""
    references = {
        f"evaluation/{images}/{metric}/judge": make_figure(images, metric, value)
        for images, value in (("floor", 0.644), ("blurred", 10.58))
        for metric in ("frechet", "kid")
    }
    return {
        "protocol": make_protocol(),
        "runs": {name: {"path": f"runs/{name}", "kind": "vae", "sha256": "d" * 64,
                        "images_seen": 100032} for name in rows},
        "references": references, "rows": with_seeds(rows),
        "pictures": {name: f"{number}.png" for number, name in enumerate(rows)},
    }  # fmt: skip


def test_a_comparison_page_has_every_figure_and_picture(tmp_path):
    rng = np.random.default_rng(0)
    tags = [tag for titles in COLUMNS.values() for tag in titles]
    tags += ["kid/judge", "frechet/judge", "evaluation/mixture/kid/judge"]
    rows = {
        name: {tag: make_figure("x", tag, rng.uniform(1, 10)) for tag in tags}
        for name in ("vae-seed0", "vae-seed1")
    } | {"vqvae": {"probe/level0/average_precision": make_figure("x", "y", 0.123)}}
    report = make_comparison(copy.deepcopy(rows))
    for index in range(3):
        save_picture(tmp_path / f"{index}.png", index)
    (tmp_path / "comparison.json").write_text(json.dumps(report))
    html.write_comparison_page(tmp_path)
    page = assert_self_contained((tmp_path / "comparison.html").read_text(), scripts=1)
    for figures in report["rows"].values():
        for figure in figures.values():
            assert number(figure["value"]) in page.texts
    assert "vae, 2 seeds" in page.texts and "level0, average precision" in page.texts
    assert "A dash means" in page.words
    assert embedded(page) == [(tmp_path / f"{index}.png").read_bytes() for index in range(3)]
    sortable = [table for table in page.all("table") if table["class"] == "sortable"]
    assert len(sortable) == 6  # Fréchet, KID, likelihood, latent, cost, probes
    assert len(page.all("button")) > 20 and {b["type"] for b in page.all("button")} == {"button"}
    # references stay out of what is sorted
    bodies = re.findall(r'<tbody class="reference">(.*?)</tbody>', html.comparison_page(
        report, tmp_path))  # fmt: skip
    assert len(bodies) == 2 and all("0.644" in b and "10.58" in b for b in bodies)


def test_a_forced_comparison_of_reports_says_so_on_the_page(tmp_path):
    reports = {"a": make_report(), "b": make_report(protocol=make_protocol(split="test"))}
    for index, (name, report) in enumerate(reports.items()):
        save_picture(tmp_path / name / "samples.png", index)
        write_report(tmp_path / name, report["protocol"], report["figures"], report["pictures"])
    comparison = compare_reports([tmp_path / "a", tmp_path / "b"], force=True)
    page = assert_self_contained(html.side_by_side_page(comparison))
    assert FORCED in page.texts and any("split is valid in" in text for text in page.texts)
    assert embedded(page) == [(tmp_path / name / "samples.png").read_bytes() for name in reports]
    comparison["differences"] = []
    assert FORCED not in html.side_by_side_page(comparison)


def test_a_vae_page_has_its_figures_with_their_meaning(tmp_path):
    save_picture(tmp_path / "traversal.png")
    report = {
        "protocol": make_protocol(),
        "figures": {"kl": {"value": 48.2377, "standard_error": 0.2, "count": 2000}},
        "pictures": {"traversal": "traversal.png"},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    html.write_vae_page(tmp_path, {"kl": "KL(q(z|x) || p(z))", "mse": "not measured here"})
    page = assert_self_contained((tmp_path / "report.html").read_text())
    for text in ("kl", "48.24", " ± 0.2", "2,000", "KL(q(z|x) || p(z))"):
        assert text in page.texts
    assert "not measured here" not in page.words
    assert embedded(page) == [(tmp_path / "traversal.png").read_bytes()]


SORTED = """
const bad = [], table = document.querySelector("table.sortable");
document.addEventListener("securitypolicyviolation", event => bad.push(event.violatedDirective));
const order = () => [...table.tBodies[1].rows].map(row => row.cells[0].textContent);
const orders = {};
for (const [number, name] of [[2, "up"], [2, "down"], [0, "names"]]) {
  table.querySelectorAll("th button")[number].click();
  orders[name] = order();
}
orders.references = table.tBodies[0].rows.length;
"""
LOADED = """
const pictures = [...document.images].map(image => [image.naturalWidth, image.naturalHeight]);
const paper = getComputedStyle(document.body).backgroundColor;
const wide = document.documentElement.scrollWidth > innerWidth;
"""


def browse(text, script, result, path, *flags):
    """What a browser makes of a page: the value of `result` after `script`, which it is allowed."""
    probe = f"{script}setTimeout(() => {{ document.title = JSON.stringify({result}); }}, 200);"
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    before, semicolon, after = text.partition("style-src ")
    allowed = f"script-src 'sha256-{digest}'" + "".join(re.findall(r"script-src( [^\"]*)", after))
    after = re.sub(r"; script-src [^\"]*", "", after)
    text = f"{before}{allowed}; {semicolon}{after}".replace("</body>", f"<script>{probe}</script>")
    path.write_text(text)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *flags,
               "--virtual-time-budget=2000", path.as_uri()]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(re.search("<title>(.*?)</title>", run.stdout, re.DOTALL)[1]))


needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs chromium (Debian's)"
)


@pytest.mark.browser
@needs_browser
def test_a_browser_sorts_the_comparison_and_runs_nothing_else(tmp_path):
    values = {"b": 2.0, "a": 10.0, "c": 1234567.0}
    rows = {name: {"kid/judge": make_figure("samples", "kid", v)} for name, v in values.items()}
    for figures in rows.values():
        figures["frechet/judge"] = figures["kid/judge"]
    rows |= {"none": {}, HOSTILE: {"frechet/judge": make_figure("samples", "frechet", 5.0)}}
    text = html.comparison_page(make_comparison(rows), tmp_path)
    found = browse(text, SORTED, "{bad, orders, title: document.title}", tmp_path / "page.html")
    assert found["bad"] == [] and found["title"] == "Comparison of 5 runs"
    assert found["orders"] == {
        "up": ["b", HOSTILE, "a", "c", "none"],
        "down": ["c", "a", HOSTILE, "b", "none"],
        "names": [HOSTILE, "a", "b", "c", "none"],
        "references": 2,
    }


@pytest.mark.browser
@needs_browser
def test_a_browser_shows_the_pictures_of_a_report_on_a_phone_in_the_dark(directory):
    html.write_report_page(directory)
    text = (directory / "report.html").read_text()
    found = browse(
        text, LOADED, "{pictures, paper, wide}", directory / "page.html",
        "--window-size=500,900", "--force-dark-mode",
    )  # fmt: skip
    assert found == {"pictures": [[12, 8]], "paper": "rgb(20, 23, 28)", "wide": False}
