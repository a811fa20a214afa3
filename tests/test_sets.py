"""Images by number: the same image however it is asked for, and protocols that say which."""

import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from test_image_model import save_run, tiny_vqvae

from pipeline.data.images import open_images
from pipeline.evaluation import pictures
from pipeline.evaluation.sets import (
    Blurred,
    Choice,
    Folder,
    Generated,
    Mirrored,
    Reconstructions,
    SampleFiles,
    ShardImages,
    code_usage,
    open_reconstructions,
    open_set,
)
from pipeline.image_model import Asked, Sampling, load_model
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.sample_prior import SamplePrior
from pipeline.sample_prior import main as sample_prior
from pipeline.stage import UserError
from pipeline.training.checkpoint import save_model

CPU, SIZE = torch.device("cpu"), 32


def noise(count, channels=3, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)


def write(folder, images, names=None):
    for number, image in enumerate(images):
        name = names[number] if names else f"{number:03d}.png"
        pictures.save_png(image, folder / name)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A run tree with random weights, and six samples in both formats."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("run") / "demo"
    save_run(root, size=SIZE)
    for kind in ("png", "tar"):
        sample_prior(
            SamplePrior(
                checkpoint=root / "vqvae", out=root / kind, num_images=6, format=kind, seed=3,
                attributes="Smiling=1,Eyeglasses=0", label="owl",
            )
        )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def real(face_shards):
    return ShardImages(open_images(face_shards, "valid", SIZE, progress=False))


def loud(model):
    """Random weights that tell images apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def sets(tree, real, tmp_path_factory):
    """One of each kind."""
    torch.manual_seed(1)
    files = write(tmp_path_factory.mktemp("files"), noise(9))
    vae = loud(VAE(VAEConfig(image_size=SIZE, channels=4, latent_dim=3)))
    return {
        "shards": real,
        "choice": Choice(real, np.array([5, 1, 7, 2])),
        "choice of a choice": Choice(Choice(real, np.array([5, 1, 7, 2])), np.array([3, 0])),
        "blurred": Blurred(real, 1.5),
        "mirrored": Mirrored(real),
        "folder": Folder(files),
        "png": SampleFiles(tree / "png", SIZE, 3),
        "tar": SampleFiles(tree / "tar", SIZE, 3),
        "vqvae": Reconstructions(loud(tiny_vqvae()), "a" * 64, real, CPU),
        "vae": Reconstructions(vae, "b" * 64, real, CPU),
        "generated": Generated(load_model(tree, device="cpu"), Sampling(seed=3), 5),
    }


def test_an_image_depends_on_its_number_alone(sets):
    for name, images in sets.items():
        count = len(images)
        whole = images[np.arange(count)]
        assert whole.shape == (count, SIZE, SIZE, 3) and whole.dtype == np.uint8, name
        assert len(np.unique(whole, axis=0)) == count, name  # or the rest would say nothing
        order = np.random.default_rng(0).permutation(count)
        parts = [images[numbers] for numbers in (order[:1], order[1:], order[:0]) if len(numbers)]
        # a network's last bit may depend on the batch
        slack = 1 if name in ("vqvae", "vae", "generated") else 0
        difference = np.concatenate(parts).astype(int) - whole[order]
        assert np.abs(difference).max() <= slack, name


def test_sets_made_of_others_are_of_the_images_they_name(sets, real):
    assert np.array_equal(sets["choice"][np.array([2, 0])], real[np.array([7, 5])])
    assert np.array_equal(sets["choice of a choice"][np.arange(2)], real[np.array([2, 5])])
    mirrored = sets["mirrored"][np.array([4])]
    assert np.array_equal(mirrored[0, 3, 0], real[np.array([4])][0, 3, -1])
    assert mirrored.flags.c_contiguous  # as torch wants it
    plane = real[np.array([4])][0, :, :, 1].astype(float)
    expected = gaussian_filter(plane, 1.5, mode="nearest")
    assert np.abs(sets["blurred"][np.array([4])][0, :, :, 1] - expected).max() <= 0.51


def test_protocols_tell_all_sets_apart_and_are_json(sets, tree, real, face_shards):
    model, how = load_model(tree, device="cpu"), Sampling(seed=3)
    train = ShardImages(open_images(face_shards, "train", SIZE, progress=False))
    vqvae = tiny_vqvae().eval()
    asked = model.asked(how, 5)
    signs, labels = np.array([[1, -1]] * 4 + [[1, 0]]), np.array([0, 1, 2, 0, 1])
    others = [
        train,
        Choice(train, np.array([5, 1, 7, 2])),
        Choice(real, np.array([1, 5, 7, 2])),
        Choice(real, np.array([5, 1, 7])),
        Blurred(real, 2.0),
        Blurred(sets["choice"], 1.5),
        Reconstructions(vqvae, "c" * 64, real, CPU),
        Reconstructions(vqvae, "a" * 64, sets["choice"], CPU),
        Generated(model, Sampling(seed=4), 5),
        Generated(model, Sampling(seed=3, temperature=0.9), 5),
        Generated(model, Sampling(seed=3, attributes="Smiling=1"), 5),
        Generated(model, Sampling(seed=3, label="cat"), 5),
        Generated(model, how, 5, asked._replace(attributes=signs)),
        Generated(model, how, 5, asked._replace(labels=labels)),
        Generated(load_model(tree, device="cpu", precision="bf16"), how, 5),
    ]
    texts = [json.dumps(images.protocol, sort_keys=True) for images in [*sets.values(), *others]]
    assert len(set(texts)) == len(texts)
    assert not any(str(tree) in text or str(face_shards) in text for text in texts)
    again = Generated(load_model(tree, device="cpu"), Sampling(seed=3, method="raster"), 5)
    assert again.protocol == sets["generated"].protocol  # all methods draw the same codes


def test_the_protocol_is_of_the_content_and_not_of_the_path(tree, real, face_shards, tmp_path):
    shutil.copytree(face_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("cache"))
    copy = ShardImages(open_images(tmp_path / "shards", "valid", SIZE, cache=False))
    assert copy.protocol == real.protocol and np.array_equal(copy[np.arange(3)], real[np.arange(3)])
    for kind in ("png", "tar"):
        shutil.copytree(tree / kind, tmp_path / kind)
        moved = SampleFiles(tmp_path / kind, SIZE, 3)
        assert moved.protocol == SampleFiles(tree / kind, SIZE, 3).protocol
        assert not {"provenance", "images_per_sec"} & moved.protocol.keys()
        assert moved.note["images_per_sec"] > 0
    files = write(tmp_path / "a", noise(3))
    before = Folder(files).protocol
    files = files.rename(tmp_path / "b")
    assert Folder(files).protocol == before
    changed = noise(3)
    changed[2, 5, 5, 1] ^= 1
    assert Folder(write(tmp_path / "c", changed)).protocol != before
    (files / "001.png").rename(files / "1.png")  # now another number
    assert Folder(files).protocol != before


def test_a_folder_is_read_by_name_below_all_its_folders(tmp_path):
    images = noise(4)
    write(tmp_path, images, ["b/2.PNG", "a.png", "b/10.png", "c.png"])
    for ignored in (".d.png", "notes.txt"):
        (tmp_path / ignored).write_text("no image")
    Image.fromarray(images[0]).save(tmp_path / "z.JPG", quality=95)
    found = Folder(tmp_path, SIZE, 3)
    assert found.names == ["a.png", "b/10.png", "b/2.PNG", "c.png", "z.JPG"]
    assert np.array_equal(found[np.arange(4)], images[[1, 2, 0, 3]])
    assert found.protocol["file_format"] == "JPEG and PNG"


def test_grey_files_are_grey_among_grey_and_repeated_among_colours(tmp_path):
    grey = write(tmp_path / "grey", noise(2, channels=1))
    assert np.array_equal(Folder(grey)[np.arange(2)], noise(2, channels=1))
    assert np.array_equal(Folder(grey, channels=3)[np.array([1])], noise(2, 1)[[1]].repeat(3, 3))
    write(grey, noise(1), ["x.png"])
    assert Folder(grey)[np.arange(3)].shape == (3, SIZE, SIZE, 3)
    with pytest.raises(UserError, match=r"x\.png has colours"):
        Folder(grey, channels=1)


def png_of_16_bits(colour_type, channels):
    """A PNG of two bytes per channel, which Pillow itself does not write in colours."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + bytes(2 * channels * SIZE)) * SIZE
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has 1 image files .* at least 2"),
        (png_of_16_bits(0, 1), r"b\.png has 16 bits"),
        (png_of_16_bits(2, 3), r"b\.png has 16 bits"),
        (b"", r"b\.png cannot be read"),
        (b"\x89PNG\r\n\x1a\n nothing more", r"b\.png cannot be read"),
        (encoded(noise(1)[0], format="GIF"), r"b\.png cannot be read"),
        (encoded(noise(1, size=16)[0], format="PNG"), r"b\.png has 16x16 .* 32x32; shards"),
        (encoded(noise(1)[0, :20], format="PNG"), r"b\.png has 32x20 pixels"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused_in_one_line(tmp_path, content, message):
    write(tmp_path, noise(1), ["a.png"])
    if content is not None:
        (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        Folder(tmp_path)
    assert "\n" not in str(refusal.value)


def test_an_empty_folder_and_other_sizes_and_damaged_pixels_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no image files"):
        Folder(tmp_path)
    write(tmp_path, noise(2))
    with pytest.raises(UserError, match=r"000\.png has 32x32 pixels, needed 64x64"):
        Folder(tmp_path, size=64)
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[:-200])
    images = Folder(tmp_path)
    assert len(images[np.array([0])]) == 1
    with pytest.raises(UserError, match=r"001\.png cannot be decoded"):
        images[np.arange(2)]


def test_both_formats_of_samples_hold_the_same_images_and_what_was_asked_for(tree):
    png, tar = (SampleFiles(tree / kind, SIZE, 3) for kind in ("png", "tar"))
    model = load_model(tree, device="cpu")
    how = {"attributes": {"Smiling": 1, "Eyeglasses": -1}, "label": "owl"}
    expected = pictures.to_uint8(model.sample(6, seed=3, **how))
    for images in (png, tar):
        assert np.array_equal(images[np.arange(6)], expected)
        assert images.shards.index.attribute_names == ("Smiling", "Eyeglasses")
        assert images.shards.attributes.tolist() == [[1, -1]] * 6
        assert images.shards.labels.tolist() == [2] * 6
        assert images.protocol["vqvae_sha256"] == model.sha256
    grey = SampleFiles(tree / "tar", SIZE, 1)
    assert grey[np.array([2])].shape == (1, SIZE, SIZE, 1)


def test_unfinished_samples_are_refused(tree, tmp_path):
    with pytest.raises(UserError, match=r"samples\.json"):
        SampleFiles(tmp_path, SIZE, 3)
    shutil.copytree(tree / "png", tmp_path / "png")
    (tmp_path / "png" / "images" / "000003.png").unlink()
    with pytest.raises(UserError, match="has 5 of 6 images"):
        SampleFiles(tmp_path / "png", SIZE, 3)
    shutil.copytree(tree / "tar", tmp_path / "tar")
    (tmp_path / "tar" / "shards" / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json is missing"):
        SampleFiles(tmp_path / "tar", SIZE, 3)


def test_each_image_may_be_asked_for_something_else(tree):
    model = load_model(tree, device="cpu")
    for prior in model.priors.values():
        prior.model.double()
    attributes = np.array([[1, -1], [0, 0], [-1, 0], [1, -1]], np.int8)
    labels = np.array([2, -1, 0, 1])
    asked = Asked(model.attribute_names, attributes, model.class_names, labels)
    found = Generated(model, Sampling(seed=7), 4, asked)[np.arange(4)]
    for number, (signs, label) in enumerate(zip(attributes, labels, strict=True)):
        wanted = {n: int(s) for n, s in zip(model.attribute_names, signs, strict=True) if s}
        alone = {"attributes": wanted, "label": None if label < 0 else int(label)}
        expected = pictures.to_uint8(model.sample(number + 1, seed=7, **alone))[number]
        assert np.abs(found[number].astype(int) - expected).max() <= 1, number
    left_open = Generated(model, Sampling(seed=7), 4)
    assert not left_open.asked.attributes.any() and (left_open.asked.labels == -1).all()
    differs = [(a != b).any() for a, b in zip(found, left_open[np.arange(4)], strict=True)]
    assert differs == [1, 0, 1, 1]
    with pytest.raises(ValueError, match="4 images are asked for something, expected 3"):
        Generated(model, Sampling(), 3, asked)
    with pytest.raises(UserError, match="unknown attribute Beard"):
        Generated(model, Sampling(attributes="Beard=1"), 4)


def test_guidance_is_towards_the_conditions(tree):
    model = load_model(tree, device="cpu")
    how = {"seed": 1, "guidance": 3.0, "attributes": {"Smiling": 1}}
    expected = pictures.to_uint8(model.sample(3, **how))
    assert np.array_equal(Generated(model, Sampling(**how), 3)[np.arange(3)], expected)
    plain = Generated(model, Sampling(**{**how, "guidance": 1.0}), 3)[np.arange(3)]
    assert not np.array_equal(plain, expected)


def test_reconstructions_are_the_models_own(sets, real):
    numbers = np.array([3, 0])
    batch = torch.from_numpy(real[numbers]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        model = sets["vae"].model
        mean = model.posterior(batch, torch.zeros(2, 0)).mean
        decoded = {
            "vae": model.decode_mean(mean, torch.zeros(2, 0)),
            "vqvae": sets["vqvae"].model(batch).reconstructions,
        }
    for name, images in decoded.items():
        expected = images.clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
        assert np.abs(sets[name][numbers] - expected).max() <= 0.5 + 1e-3
    grid = sets["vqvae"].grid(count=4)
    above, below = (grid[2 + r : 2 + SIZE + r, 2 : 2 + SIZE] for r in (0, SIZE + 2))
    assert np.array_equal(above, real[np.array([0])][0])
    assert np.array_equal(below, sets["vqvae"][np.array([0])][0])


def test_code_usage_against_counting(sets, real):
    model = sets["vqvae"].model
    with torch.no_grad():
        codes = model.encode_codes(pictures.to_unit(real[np.arange(len(real))]))
    found = code_usage(model, real, CPU)
    for level, grid in enumerate(codes):
        share = np.unique(grid, return_counts=True)[1] / grid.numel()
        assert found[f"level{level}/codes_used"] == len(share) > 1
        perplexity = np.exp(-(share * np.log(share)).sum())
        assert found[f"level{level}/perplexity"] == pytest.approx(perplexity, rel=1e-6)


def test_reconstructions_are_opened_by_what_the_run_holds(tree, real, tmp_path):
    found = open_reconstructions(tree / "vqvae", real, CPU)
    assert found.protocol["checkpoint_sha256"] == load_model(tree, device="cpu").sha256
    for number, (changes, about) in enumerate(
        [({"num_classes": 3}, {"binarize": False}), ({}, {"binarize": True})]
    ):
        model = VAE(VAEConfig(image_size=SIZE, channels=4, latent_dim=3, **changes))
        save_model(tmp_path / f"{number}", "vae", model, {"config": about})
        with pytest.raises(UserError, match="conditions or binarized"):
            open_reconstructions(tmp_path / f"{number}", real, CPU)
    with pytest.raises(UserError, match="holds a prior"):
        open_reconstructions(tree / "prior-level0", real, CPU)


def test_a_set_is_opened_by_what_lies_there(tree, real, face_shards, tmp_path):
    assert open_set(face_shards, SIZE, 3, split="valid").protocol == real.protocol
    for kind in ("png", "tar"):
        assert isinstance(open_set(tree / kind, SIZE, 3), SampleFiles)
    for path in (tree, tree / "vqvae"):
        drawn = open_set(path, SIZE, 3, count=7, how=Sampling(seed=2), device=CPU)
        assert isinstance(drawn, Generated) and len(drawn) == 7 and drawn.how.seed == 2
    assert isinstance(open_set(tree / "png" / "images", SIZE, 3), Folder)
    for path, size, count, message in (
        (tmp_path / "absent", SIZE, 4, "is not a directory"),
        (tree, SIZE, None, "say how many"),
        (tree, 64, 4, "draws images of 32 pixels, needed 64"),
        (tmp_path, SIZE, 4, "no image files"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            open_set(path, size, 3, count=count, device=CPU)
        assert "\n" not in str(refusal.value)
