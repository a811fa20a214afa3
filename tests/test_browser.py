"""TensorBoard and report.html in a real browser: what is promised is on the page.

Needs Chromium with its driver (Debian: chromium, chromium-driver), and selenium (extra `browser`).
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_protocol import make_report

from pipeline import stage
from pipeline.data.images import open_images
from pipeline.evaluation import html
from pipeline.evaluation.report import write_report
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.train_vqvae import TrainVQVAE
from pipeline.train_vqvae import main as train_vqvae
from pipeline.training.checkpoint import save_model

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here"),
]
PATIENCE_SEC = 60  # for something to appear
SCORED_AT, CODES = [32, 64, 96], 32
TAG = "evaluation/reconstructions/frechet/judge"

# TensorBoard's elements lie in shadow roots within shadow roots.
ALL = """
const found = [];
const walk = root => root.querySelectorAll('*').forEach(element => {
  if (element.matches(arguments[0])) found.push(element);
  if (element.shadowRoot) walk(element.shadowRoot);
});
walk((arguments[1] && arguments[1].shadowRoot) || document);
return found;
"""
TEXT = """
const text = node => {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName)) return '';
  const inside = node.shadowRoot ? [...node.shadowRoot.childNodes] : [];
  return [...inside, ...node.childNodes].map(text).join(' ');
};
return text(arguments[0] || document.body).replace(/\\s+/g, ' ');
"""


class Page:
    """A browser with one page open."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url):
        self.driver.get("about:blank")  # or an address that differs after # would not be loaded
        self.driver.get(url)

    def all(self, selector, inside=None):
        return self.driver.execute_script(ALL, selector, inside)

    def text(self, element=None):
        return self.driver.execute_script(TEXT, element)

    def wait(self, find, what):
        """The first result of `find` that is not empty."""
        end = time.monotonic() + PATIENCE_SEC
        while time.monotonic() < end:
            if found := find():
                return found
            time.sleep(0.2)
        raise AssertionError(f"no {what}; the page says: {self.text()[:2000]}")

    def enter_frame(self):
        self.driver.switch_to.frame(self.wait(lambda: self.all("iframe"), "frame")[0])

    def assert_no_errors(self):
        log = self.driver.get_log("browser")
        assert [entry for entry in log if entry["level"] == "SEVERE"] == []


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    words = ["--headless=new", "--window-size=1500,1400", "--disable-dev-shm-usage"]
    words += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a GPU
    words += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]
    words += ["--no-sandbox"] if os.geteuid() == 0 else []
    for word in words:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver):
    page = Page(driver)
    yield page
    page.assert_no_errors()
    driver.switch_to.default_content()


@pytest.fixture(scope="module")
def run(face_shards, tmp_path_factory):
    """A tiny run that was scored three times."""
    root, names = tmp_path_factory.mktemp("run"), ("a", "b")
    torch.manual_seed(0)
    judge = Classifier(ClassifierConfig(num_outputs=2, channels=8, kind="attributes", names=names))
    recipe = open_images(face_shards, "valid", 32, progress=False).recipe.hash
    save_model(root / "judge", "classifier", judge, {"half": 1, "recipe": recipe})
    train_vqvae(stage.parse(TrainVQVAE, [
        f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--data={face_shards}",
        f"--out={root / 'vqvae'}", "--total_images=96", "--log_every=16", "--validate_every=32",
        "--save_every=0", "--score_every=32", "--score_images=16", f"--judge={root / 'judge'}",
    ]))  # fmt: skip
    return root / "vqvae"


@pytest.fixture(scope="module")
def tensorboard(run):
    """The address of a TensorBoard that has read the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.parent)]
    command += ["--host", "localhost", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, tabs = f"http://localhost:{port}", ("custom_scalars", "images", "hparams", "projector")
    end, shown = time.monotonic() + PATIENCE_SEC, {}
    while not all(shown.get(tab, {}).get("enabled") for tab in tabs):
        assert process.poll() is None and time.monotonic() < end, shown
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(f"{address}/data/plugins_listing") as answer:
                shown = json.load(answer)
        except OSError:  # not yet there
            continue
    yield address
    process.terminate()
    process.wait()


def test_the_scores_over_images_seen_stand_beside_the_codebooks(page, tensorboard):
    page.open(f"{tensorboard}/#custom_scalars")

    def charts(start, *tags):
        """Those whose text starts so and names the tags that were found for it."""
        cards = page.all("tf-custom-scalar-multi-line-chart-card")
        texts = [page.text(card).strip() for card in cards]
        return [card for card, text in zip(cards, texts, strict=True)
                if text.startswith(start) and all(tag in text for tag in tags)]  # fmt: skip

    def lines(card):
        """Number of points of each line."""
        drawn = page.all(".line-plot:not(.ghost) path", card)
        return [len(re.findall("[ML]", path.get_attribute("d") or "")) for path in drawn]

    def scores():  # of a line only what is within the chart's limits is drawn
        return [c for c in charts("FID or Fréchet distance", TAG) if max(lines(c), default=0) > 1]

    page.wait(scores, "line of the scores")
    perplexities = [f"codebook/level{level}/perplexity" for level in range(2)]
    page.wait(lambda: charts("codes in effective use", *perplexities), "chart of both codebooks")
    for tab in ("loss", "codebooks", "scores", "throughput"):
        assert tab in page.text()


def test_the_images_are_on_the_page(page, tensorboard):
    page.open(f"{tensorboard}/#images")

    def sizes(tag):
        cards = [card for card in page.all("tf-image-loader") if f"tag: {tag} " in page.text(card)]
        images = [image for card in cards for image in page.all("#main-image-container img", card)]
        return [(image.get_property("naturalWidth"), image.get_property("naturalHeight"))
                for image in images if image.get_property("complete")]  # fmt: skip

    side = 32 + 2  # of an image with its gap; 16 in rows of 8
    for tag, rows in (("reconstructions/scored", 2), ("reconstructions", 4)):
        page.wait(lambda t=tag, r=rows: sizes(t) == [(8 * side + 2, r * side + 2)], f"grid {tag}")


def test_the_codebooks_are_in_the_projector_as_pictures(page, tensorboard, run):
    page.open(f"{tensorboard}/#projector")
    page.enter_frame()
    page.enter_frame()

    def embeddings():
        return set(
            re.findall(r"codebook-level\d", " ".join(map(page.text, page.all("paper-item"))))
        )

    assert page.wait(embeddings, "list of codebooks") == {"codebook-level0", "codebook-level1"}
    expected = rf"Points: {CODES}\b.*?Dimension: 8\b"
    page.wait(lambda: re.search(expected, page.text()), "count of codes")
    assert {"code", "uses"} <= {page.text(item).strip() for item in page.all("paper-item")}

    # the pictures themselves: colours of the sprite, whose tiles are nearly flat at this age
    sprite = np.asarray(
        Image.open(next((run / "tensorboard").glob("*/codebook-level0/sprite.png")))
    )
    side = sprite.shape[0] // 6  # 32 codes in 6 rows
    tiles = sprite.reshape(6, side, 6, side, 3).mean((1, 3)).reshape(-1, 3)[:CODES]

    def places():
        canvas = max(page.all("canvas"), key=lambda c: c.size["width"] * c.size["height"])
        shot = Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB")
        pixels = np.asarray(shot).reshape(-1, 1, 3).astype(float)
        pixels = pixels[pixels.min((1, 2)) < 200]  # not the ground
        return (np.abs(pixels - tiles).max(2) < 12).any(1).sum() > 200

    page.wait(places, "pictures in the canvas")


def test_texts_and_final_figures_are_on_the_page(page, tensorboard):
    page.open(f"{tensorboard}/#text")
    for part in ("The step of every curve is images seen", "total_images: 96", "commit: ",
                 "features_sha256: "):  # fmt: skip
        page.wait(lambda part=part: part in page.text(), part)
    page.open(f"{tensorboard}/#hparams")
    for part in ("model.code_dim", "validation/mse", TAG):
        page.wait(lambda part=part: part in page.text(), part)


def test_a_report_shows_series_and_pictures_without_a_network(page, run, tmp_path):
    shutil.copy(run / "reconstructions.png", tmp_path / "samples.png")
    report = make_report()
    write_report(tmp_path, report["protocol"], report["figures"], report["pictures"],
                 report["curves"], report["absent"])  # fmt: skip
    html.write_report_page(tmp_path, [run])
    page.open((tmp_path / "report.html").as_uri())
    text = page.text()
    for part in ("Fréchet distance", "KID", report["absent"][0], f"{run.name} {TAG}"):
        assert part in text
    (image,) = page.all("img")
    with Image.open(tmp_path / "samples.png") as picture:
        assert (image.get_property("naturalWidth"), image.get_property("naturalHeight")) == (
            picture.size
        )  # fmt: skip
    (chart,) = [figure for figure in page.all("figure") if TAG in page.text(figure)
                and "Fréchet" in page.text(figure)]  # fmt: skip
    drawn = chart.find_elements("css selector", "svg circle")
    assert len(drawn) == len(SCORED_AT) and all(dot.rect["width"] > 0 for dot in drawn)
    assert page.driver.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
        ".filter(name => !name.startsWith('data:'))"
    ) == []  # fmt: skip
