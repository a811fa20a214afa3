"""The reconstruction of any folder of images: pixels as from shards, figures by brute force."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import reconstruct, stage
from pipeline.data.images import open_images, recipe_for
from pipeline.models.priors import make_prior
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.reconstruct import Reconstruct
from pipeline.shard_data import ShardData
from pipeline.shard_data import main as shard_data
from pipeline.stage import UserError
from pipeline.training.checkpoint import load_model, model_sha256, save_model

GRIDS, SIZES = [(4, 4), (8, 8)], (7, 12)


def save_vqvae(out, recipe, channels=3):
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(in_channels=channels, channels=8, residual_channels=4,
                              ratios=(2, 4), codebook_size=SIZES, code_dim=4))  # fmt: skip
    about = {"config": {"image_size": recipe.size}, "recipe": recipe.hash}
    save_model(out, "vqvae", model, about)


def save_prior(out, level, sha256):
    torch.manual_seed(level)
    model = make_prior(PriorConfig(
        channels=8, layers=1, kernel_size=3, condition_layers=1, num_attributes=2,
        grid=GRIDS[level], codebook_size=SIZES[level], coarser_codebook_sizes=SIZES[:level],
    ))  # fmt: skip
    save_model(out, "prior", model, {
        "level": level, "codes": {"checkpoint_sha256": sha256},
        "attribute_names": ["Smiling", "Eyeglasses"], "class_names": [],
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run tree with an untrained VQ-VAE and untrained priors."""
    root = tmp_path_factory.mktemp("run")
    save_vqvae(root / "vqvae", recipe_for("folder", 32))
    for level in range(2):
        save_prior(root / f"prior-level{level}", level, model_sha256(root / "vqvae"))
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of all kinds and sizes, and three files that only have an image's name."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)

    def noise(height, width, *channels):
        smooth = rng.integers(0, 256, (4, 4, *channels)).astype(np.uint8)
        return smooth.repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)[:height, :width]

    (root / "sub" / "deep").mkdir(parents=True)
    Image.fromarray(noise(47, 33, 3)).save(root / "a colour.jpg")
    Image.fromarray(noise(33, 70)).save(root / "grey.png")
    Image.fromarray(noise(40, 40, 4)).save(root / "sub" / "alpha.png")
    Image.fromarray(noise(31, 32)).save(root / "sub" / "grey.JPEG", "JPEG")
    sixteen = noise(35, 45).astype(np.uint16) * 257
    Image.fromarray(sixteen).save(root / "sixteen.png")
    palette = Image.fromarray(noise(64, 50, 3)).convert("P")
    palette.save(root / "palette.png", transparency=3)
    Image.fromarray(noise(5, 9, 3)).save(root / "sub" / "deep" / "tiny.bmp")
    Image.fromarray(noise(90, 61, 3)).save(root / "sub" / "web.webp", lossless=True)
    whole = (root / "a colour.jpg").read_bytes()
    (root / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("not an image")
    os.symlink(root / "gone.png", root / "sub" / "broken.png")
    (root / "notes.txt").write_text("not named like an image")
    (root / ".hidden.png").write_bytes(b"")
    return root


UNREADABLE = {"sub/broken.png", "text.png", "torn.jpg"}


def config(run, photos, out, **changes):
    return Reconstruct(checkpoint=run / "vqvae", images=photos, out=out, **changes)


def report_of(out):
    return json.loads((out / "reconstructions.json").read_text())


def test_pixels_are_those_of_the_folder_as_shards(photos, tmp_path):
    shard_data(ShardData(source="folder", root=photos, out=tmp_path, workers=1,
                         max_quarantined=1.0))  # fmt: skip
    expected = {}
    for split in ("train", "valid", "test"):
        images = open_images(tmp_path, split, 32, cache=False, progress=False)
        expected |= dict(zip(images.keys.tolist(), images[:], strict=True))
    skipped = []
    items = reconstruct.find_images(photos)
    found = reconstruct.read_images(items, recipe_for("folder", 32), None, skipped)
    pixels = {key.encode(): image for _, key, image in found}
    assert pixels.keys() == expected.keys() and len(pixels) == 8
    for key, image in pixels.items():
        assert np.array_equal(image, expected[key]), key
    assert {bad["path"] for bad in skipped} == UNREADABLE


def test_figures_against_brute_force(run, photos, tmp_path, capsys):
    reconstruct.main(config(run, photos, tmp_path, batch_size=4))
    report, model = report_of(tmp_path), load_model(run / "vqvae").double()
    priors = [load_model(run / f"prior-level{level}").double() for level in range(2)]
    assert report["num_images"] == len(report["images"]) == 8
    read = reconstruct.read_images(
        reconstruct.find_images(photos), recipe_for("folder", 32), None, []
    )
    with torch.no_grad():
        for row, (path, _, pixels) in zip(report["images"], read, strict=True):
            assert row["path"] == path
            unit = torch.from_numpy(pixels).double().movedim(-1, 0)[None] / 255
            decoded, levels = model(unit)
            clamped = decoded.clamp(0, 1)
            mse = float(((clamped - unit) ** 2).mean())
            assert row["mse"] == pytest.approx(mse, rel=1e-4)
            assert row["psnr"] == pytest.approx(10 * math.log10(1 / mse), abs=1e-3)
            file = np.asarray(Image.open(tmp_path / row["reconstruction"]))
            assert np.abs(file - 255 * clamped[0].movedim(0, -1).numpy()).max() < 0.51
            bits, codes = 0.0, [level.codes for level in levels]
            for level, prior in enumerate(priors):
                unknown = torch.zeros(1, 2)
                logits = prior.logits(
                    codes[level], prior.condition(1, codes[:level], None, unknown)
                )
                table = torch.softmax(logits[0], -1).numpy()
                for i, j in np.ndindex(GRIDS[level]):
                    bits -= math.log2(table[i, j, codes[level][0, i, j]])
            assert row["prior_bits"] == pytest.approx(bits, rel=1e-5)
    for name in ("mse", "psnr", "prior_bits"):
        mean = np.mean([row[name] for row in report["images"]])
        assert report["means"][name] == pytest.approx(mean)
    fixed = 16 * math.log2(7) + 64 * math.log2(12)
    assert report["means"]["fixed_length_bits"] == pytest.approx(fixed)
    printed = capsys.readouterr().out
    by_priors = f"{report['means']['prior_bits']:,.0f} by the priors"
    assert f"{fixed:,.0f} bits per image of fixed length, {by_priors}" in printed


def test_what_cannot_be_read_is_named_and_counted(run, photos, tmp_path, capsys):
    reconstruct.main(config(run, photos, tmp_path))
    report, printed = report_of(tmp_path), capsys.readouterr().out
    reasons = {bad["path"]: bad["reason"] for bad in report["skipped"]}
    assert reasons.keys() == UNREADABLE and report["num_skipped"] == 3
    assert "not a JPEG, PNG, WebP or BMP image" in reasons["text.png"]
    assert "skipped: 3" in printed and "'torn.jpg': cannot be decoded" in printed
    assert len(list((tmp_path / "images").iterdir())) == 8


def test_figures_do_not_depend_on_the_batches(run, photos, tmp_path):
    reports = []
    for size in (1, 3, 32):
        reconstruct.main(config(run, photos, tmp_path / str(size), batch_size=size))
        reports.append(report_of(tmp_path / str(size)))
    for row in reports[1:]:
        assert row["skipped"] == reports[0]["skipped"]
        for image, alone in zip(row["images"], reports[0]["images"], strict=True):
            assert image["path"] == alone["path"]
            assert image["mse"] == pytest.approx(alone["mse"], rel=1e-5)
            assert image["prior_bits"] == pytest.approx(alone["prior_bits"], rel=1e-5)


def test_the_picture_has_originals_above_their_reconstructions(run, photos, tmp_path):
    """Five images are one row of pairs; of eleven in rows of eight only the whole row is shown."""
    folder = tmp_path / "eleven"
    folder.mkdir()
    for number in range(11):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number:02d}.png")
    for count, columns in ((5, 5), (11, 8)):
        out = tmp_path / str(count)
        reconstruct.main(config(run, folder, out, num_images=count))
        sheet = np.asarray(Image.open(out / "reconstructions.png"))[::2, ::2]
        assert sheet.shape == (2 + 2 * 34, 2 + columns * 34, 3)
        for column in range(columns):
            cells = sheet[2:, 2 + 34 * column :][:, :32]
            assert (cells[:32] == (20 * column, 0, 0)).all()
            file = np.asarray(Image.open(out / "images" / f"{column:02d}.png"))
            assert np.array_equal(cells[34:66], file)
        assert report_of(out)["num_images"] == count


def test_an_image_is_cut_as_the_training_images_were_in_proportion(tmp_path):
    """A white centre on black: the cut is white throughout, and with a centre smaller by a rim of
    one pixel it is not."""
    for source, size, side, crop in (("celeba", 64, 178, 140), ("celeba", 128, 178, 178)):
        recipe, of = reconstruct.find_recipe(size, recipe_for(source, size).hash)
        assert (recipe, of) == (recipe_for(source, size), side)
        assert reconstruct.in_proportion(recipe, side, of) == recipe  # the data set's own size
        for shorter in (1, 2, 50, 89, 1000):
            wanted = max(1, round(crop * shorter / side))
            for rim in (0, 1):
                centre, left = wanted - 2 * rim, (shorter - wanted) // 2 + rim
                if centre < 1:
                    continue
                pixels = np.zeros((shorter, shorter, 3), np.uint8)
                pixels[left : left + centre, left : left + centre] = 255
                Image.fromarray(pixels).save(tmp_path / "image.png")
                (found,) = reconstruct.read_images(
                    [reconstruct.find_images(tmp_path)[0]], recipe, of, []
                )
                assert found[2].shape == (size, size, 3)
                assert (found[2] == 255).all() == (rim == 0)


def test_digits_are_padded_and_grey(digit_shards, tmp_path):
    images = open_images(digit_shards, "test", 32, cache=False, progress=False)
    assert images[0].shape == (32, 32, 1)
    (tmp_path / "digits").mkdir()
    for number, pixels in enumerate(images[:3]):
        Image.fromarray(pixels[2:-2, 2:-2, 0]).save(tmp_path / "digits" / f"{number}.png")
    recipe, side = reconstruct.find_recipe(32, images.recipe.hash)
    items = reconstruct.find_images(tmp_path / "digits")
    found = [pixels for _, _, pixels in reconstruct.read_images(items, recipe, side, [])]
    assert np.array_equal(found, images[:3])
    save_vqvae(tmp_path / "run" / "vqvae", recipe, channels=1)
    reconstruct.main(config(tmp_path / "run", tmp_path / "digits", tmp_path / "out"))
    assert Image.open(tmp_path / "out" / "images" / "0.png").mode == "L"


def test_without_a_prior_for_every_level_bits_are_of_fixed_length(run, photos, tmp_path, capsys):
    save_vqvae(tmp_path / "vqvae", recipe_for("folder", 32))
    sha256 = model_sha256(tmp_path / "vqvae")
    for out in (tmp_path / "none", tmp_path / "one"):
        reconstruct.main(config(tmp_path, photos, out, num_images=2))
        assert report_of(out)["means"].keys() == {"mse", "psnr", "fixed_length_bits"}
        assert "by the priors" not in capsys.readouterr().out
        save_prior(tmp_path / "prior-level0", 0, sha256)
    save_prior(tmp_path / "prior-level1", 1, "f" * 64)
    with pytest.raises(UserError, match="prior-level1 was trained on codes of another checkpoint"):
        reconstruct.main(config(tmp_path, photos, tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_what_a_user_gets_wrong_is_one_line(run, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("not an image")
    (tmp_path / "full" / "images").mkdir(parents=True)
    (tmp_path / "full" / "images" / "old.png").write_bytes(b"")
    unknown = dataclasses.replace(recipe_for("folder", 32), pad=5)
    save_vqvae(tmp_path / "unknown" / "vqvae", unknown)
    good = config(run, photos, tmp_path / "out")
    wrong = {
        "no images in .*empty: expected files named .jpg": {"images": tmp_path / "empty"},
        "absent is not a folder": {"images": tmp_path / "absent"},
        "none of 1 files in .*bad can be read; the first, 'a.png': not a JPEG": {
            "images": tmp_path / "bad"
        },
        "holds images; delete it": {"out": tmp_path / "full"},
        "lies inside --images": {"out": photos / "new"},
        "holds no trained model": {"checkpoint": tmp_path / "empty"},
        "holds a prior, expected a vqvae": {"checkpoint": run / "prior-level0"},
        f"trained with recipe {unknown.hash}": {"checkpoint": tmp_path / "unknown" / "vqvae"},
    }
    before = sorted(photos.rglob("*"))
    for message, change in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            reconstruct.main(dataclasses.replace(good, **change))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="lies inside --images"):  # its own reconstructions
        reconstruct.main(dataclasses.replace(
            good, images=tmp_path / "full" / "images", out=tmp_path / "full"))  # fmt: skip
    assert not (tmp_path / "out").exists() and sorted(photos.rglob("*")) == before
    with pytest.raises(ValueError, match="num_images must be at least 1"):
        dataclasses.replace(good, num_images=0)


def test_as_a_command_it_leaves_its_status(run, photos, tmp_path, monkeypatch, capsys):
    flags = ["--checkpoint", run / "vqvae" / "final", "--images", photos, "--num-images=3"]
    monkeypatch.setattr("sys.argv", ["reconstruct.py", *map(str, flags), f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as caught:
        stage.run(Reconstruct, reconstruct.main, reconstruct.__doc__)
    assert caught.value.code == 0
    assert f"{tmp_path}: 3 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    assert report_of(tmp_path)["means"]["prior_bits"] > 0  # found from final/, too
