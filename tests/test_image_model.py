"""The model for use from elsewhere: against its parts put together by hand, and enumeration."""

import itertools
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from PIL import Image

from pipeline import image_model
from pipeline.image_model import Given, ImageModel, LevelPrior, Sampling, load_model
from pipeline.models.priors import make_prior
from pipeline.models.priors.noise import image_keys
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.priors.sampling import Draw, sample_codes
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.stage import UserError
from pipeline.training import checkpoint

ATTRIBUTES, CLASSES = ["Smiling", "Eyeglasses"], ["cat", "dog", "owl"]
SIZE, GRIDS, SIZES = 16, [(2, 2), (4, 4)], [5, 7]  # pixels, codes, their number


def tiny_vqvae() -> VQVAE:
    return VQVAE(VQVAEConfig(
        channels=8, residual_channels=4, residual_layers=1, code_dim=4, codebook_size=tuple(SIZES),
    ))  # fmt: skip


def tiny_prior(level: int, **changes):
    """Random weights, loud enough that every code matters to the later ones."""
    sizes = {
        "channels": 8, "layers": 1, "kernel_size": 3, "condition_layers": 1, "grid": GRIDS[level],
        "codebook_size": SIZES[level], "coarser_codebook_sizes": tuple(SIZES[:level]),
        "num_attributes": len(ATTRIBUTES), "num_classes": len(CLASSES),
    }  # fmt: skip
    prior = make_prior(PriorConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(2)
    return prior


def save_run(tree, size: int = SIZE, **changes) -> None:
    """A run tree of a VQ-VAE and two priors with random weights."""
    grids = [(size // 8, size // 8), (size // 4, size // 4)]
    about = {"config": {"image_size": size}, "recipe": "r"}
    sha256 = checkpoint.save_model(tree / "vqvae", "vqvae", tiny_vqvae(), about)
    for level, grid in enumerate(grids):
        about = {
            "level": level, "codes": {"checkpoint_sha256": sha256, "grids": grids},
            "attribute_names": ATTRIBUTES, "class_names": CLASSES,
        }  # fmt: skip
        prior = tiny_prior(level, grid=grid, **changes)
        checkpoint.save_model(tree / f"prior-level{level}", "prior", prior, about)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("run") / "runs" / "demo"
    save_run(root)
    return root


@pytest.fixture
def model(tree) -> ImageModel:
    """In float64, where equal means equal."""
    loaded = load_model(tree, device="cpu")
    for prior in loaded.priors.values():
        prior.model.double()
    return loaded


def test_the_ten_lines_of_the_docstring_and_the_readme_run_as_they_stand(tree):
    program = textwrap.dedent(re.findall(r"\n\n((?: {4}.*\n|\n)+)", image_model.__doc__)[0]).strip()
    assert re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) == [
        f"{program}\n"
    ]
    assert len(program.splitlines()) <= 10 + 1  # with an empty one
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tree.parents[1], capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with Image.open(tree.parents[1] / "images.png") as image:
        assert image.size == (4 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)


def test_encode_and_decode_are_the_two_halves_of_the_vqvae(model):
    images = torch.rand(3, 3, SIZE, SIZE)
    codes = model.encode(images)
    assert [tuple(level.shape) for level in codes] == [(3, 2, 2), (3, 4, 4)]
    assert all(level.dtype == torch.int64 for level in codes)
    with torch.no_grad():
        for parameter in model.vqvae.decoder.parameters():
            parameter.mul_(4)  # beyond black and white
        expected = model.vqvae(images).reconstructions
    assert expected.min() < 0 and expected.max() > 1
    torch.testing.assert_close(model.decode(codes), expected.clamp(0, 1))
    wide = model.encode(torch.rand(1, 3, 8, 24))  # other sizes have codes, too
    assert [tuple(level.shape) for level in wide] == [(1, 1, 3), (1, 2, 6)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, SIZE, SIZE), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 1, SIZE, SIZE), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "floats"),
        (torch.full((1, 3, SIZE, SIZE), 255.0), r"in \[0, 1\], got 255"),
        (torch.full((1, 3, SIZE, SIZE), torch.nan), r"in \[0, 1\]"),
        (torch.zeros(1, 3, SIZE, 12), "divisible"),
    ],
)
def test_images_that_are_none_are_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        model.encode(images)


def test_codes_are_drawn_level_by_level_with_what_was_asked_for(model):
    how = Sampling(
        seed=3, temperature=(0.9, 0.7), top_k=4, top_p=(1.0, 0.8), guidance=(1.0, 2.0),
        attributes={"Eyeglasses": -1}, label="owl",
    )  # fmt: skip
    numbers = [9, 2, 5]
    drawn, codes = model.draw_codes(numbers, how), []
    asked = (torch.full((3,), 2), torch.tensor([[0.0, -1.0]] * 3))
    for level, draw in enumerate([
        Draw(temperature=0.9, top_k=4), Draw(temperature=0.7, top_k=4, top_p=0.8, guidance=2.0)
    ]):  # fmt: skip
        prior = model.prior(level).model
        keys = image_keys(3, torch.tensor(numbers), level)
        condition, without = prior.condition(3, codes, *asked), prior.condition(3, codes)
        sampled = sample_codes(
            prior, condition, keys, draw, unconditional=without, method="naive"
        )  # fmt: skip
        codes.append(sampled.codes)
    assert all(torch.equal(a, b) for a, b in zip(drawn, codes, strict=True))
    # text and numbers mean the same
    text = Sampling(**{**vars(how), "attributes": "Eyeglasses=0", "label": 2})
    assert all(map(torch.equal, model.draw_codes(numbers, text), drawn))
    # and all of it matters
    for change in (
        {"seed": 4}, {"temperature": 0.9}, {"top_k": 1}, {"top_p": 0.3}, {"guidance": 0.5},
        {"attributes": {"Eyeglasses": 1}}, {"label": "cat"},
    ):  # fmt: skip
        other = model.draw_codes(numbers, Sampling(**{**vars(how), **change}))
        assert not all(map(torch.equal, other, drawn)), change


def test_samples_depend_on_their_number_alone(model):
    whole = model.sample(5, seed=1)
    assert whole.shape == (5, 3, SIZE, SIZE) and 0 <= whole.min() < whole.max() <= 1
    torch.testing.assert_close(model.sample(5, seed=1, batch_size=2), whole)
    assert not torch.equal(model.sample(5, seed=2), whole)
    for method in ("raster", "rows-above", "naive"):
        torch.testing.assert_close(model.sample(5, seed=1, method=method), whole)


def test_given_codes_stay_and_the_rest_is_that_of_the_engine(model):
    codes = [torch.randint(size, (4, *grid)) for size, grid in zip(SIZES, GRIDS, strict=True)]
    keep = [torch.ones(2, 2, dtype=torch.bool), torch.rand(4, 4) < 0.5]
    numbers, how = torch.arange(4), Sampling(seed=2, label="dog")
    drawn = model.draw_codes(numbers, how, given=Given(codes, keep))
    assert torch.equal(drawn[0], codes[0])  # a fixed top
    assert torch.equal(drawn[1][:, keep[1]], codes[1][:, keep[1]])
    prior = model.prior(1).model
    expected = sample_codes(
        prior, prior.condition(4, codes[:1], torch.ones(4, dtype=torch.int64)),
        image_keys(2, numbers, 1), given=(codes[1], keep[1].expand(4, 4, 4)), method="naive",
    )  # fmt: skip
    assert torch.equal(drawn[1], expected.codes)
    # the prior of a level that stays is not needed
    del model.priors[0]
    again = model.draw_codes(numbers, how, given=Given(codes, keep))
    assert torch.equal(again[1], drawn[1])
    model.check(how, keep)
    with pytest.raises(UserError, match=r"level 0 has no prior at .*--level 0"):
        model.check(how)


def test_resampling_approaches_the_distribution_given_the_later_code():
    """2 x 2 codes of 3, the last one given: exact enumeration of the other three."""
    torch.manual_seed(1)
    prior = tiny_prior(0, codebook_size=3, num_attributes=0, num_classes=0).double()
    vqvae = VQVAE(VQVAEConfig(ratios=(2,), channels=8, code_dim=4, codebook_size=(3,)))
    model = ImageModel(
        vqvae=vqvae, priors={0: LevelPrior(prior, [], [], "")}, prior_paths=[], image_size=4,
        recipe="", sha256="", device=torch.device("cpu"),
    )  # fmt: skip
    codes = torch.zeros(2000, 2, 2, dtype=torch.int64)
    keep = torch.tensor([[False, False], [False, True]])

    grids = torch.tensor(list(itertools.product(range(3), repeat=3)))
    everything = torch.cat([grids, torch.zeros(27, 1, dtype=torch.int64)], 1).view(27, 2, 2)
    with torch.no_grad():
        logits = prior.logits(everything, prior.condition(27)).log_softmax(-1)
    log_probs = logits.gather(-1, everything[..., None])[..., 0].flatten(1)
    joint, prefix = log_probs.sum(1).softmax(0), log_probs[:, :3].sum(1).exp()
    assert (joint - prefix).abs().sum() / 2 > 0.1  # the given code says something

    def distance(resample: int, expected: torch.Tensor) -> float:
        drawn = model.draw_codes(
            range(2000), Sampling(), given=Given([codes], [keep]), resample=resample
        )[0].flatten(1)
        assert (drawn[:, 3] == 0).all()
        found = (drawn[:, :3] @ torch.tensor([9, 3, 1])).bincount(minlength=27) / 2000
        return float((found - expected).abs().sum() / 2)

    # the expected distance of 2,000 exact draws from 27 probabilities is below sqrt(27/2000)/2
    bound = 1.5 * (27 / 2000) ** 0.5 / 2
    assert distance(1, prefix) < bound and distance(48, joint) < bound
    assert distance(1, joint) > bound  # a clamped sample is not informed by it


def test_what_cannot_be_drawn_is_said_in_one_line(model, tree):
    for options, message in (
        ({"attributes": {"Smilin": 1}}, "unknown attribute Smilin; known: Smiling, Eyeglasses"),
        ({"label": "cow"}, "unknown class cow; known: cat, dog, owl"),
        ({"label": 3}, "unknown class 3"),
        ({"temperature": (1.0, 0.9, 0.8)}, "temperature needs one value, or one for each of 2"),
        ({"top_k": 6}, "top_k must be at most 5"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            model.sample(2, **options)
        assert "\n" not in str(caught.value)
    for options, message in (
        ({"attributes": {"Smiling": 0}}, "1 .with. or -1"),
        ({"attributes": "Smiling=yes"}, "Smiling=1,Eyeglasses=0"),
        ({"temperature": 0.0}, "temperature must be finite"),
        ({"temperature": (1.0, float("nan"))}, "temperature must be finite"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"guidance": -1.0, "label": "cat"}, "guidance"),
        ({"guidance": 2.0}, "guidance needs attributes or a label"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(2, **options)
    with pytest.raises(ValueError, match="count"):
        model.sample(0)


def test_priors_without_conditions_refuse_them(tmp_path):
    save_run(tmp_path, num_attributes=0, num_classes=0)
    model = load_model(tmp_path, device="cpu")
    assert (model.attribute_names, model.class_names) == ([], [])
    for asked in ({"attributes": "Smiling=1"}, {"label": "cat"}):
        with pytest.raises(UserError, match=f"not trained with {next(iter(asked))}"):
            model.sample(1, **asked)


def test_the_classic_pixelcnn_names_the_method_it_needs(tmp_path):
    save_run(tmp_path, order="raster", layers=2)
    model = load_model(tmp_path, device="cpu")
    for method in ("wavefront", "raster"):
        with pytest.raises(UserError, match=r"level 0: .*--method rows-above"):
            model.sample(1, method=method)
    assert model.sample(1, method="rows-above").shape == (1, 3, SIZE, SIZE)


def test_a_vqvae_alone_encodes_and_decodes(tree, tmp_path):
    (tmp_path / "copy" / "vqvae").mkdir(parents=True)
    for file in (tree / "vqvae" / "final").iterdir():
        (tmp_path / "copy" / "vqvae" / file.name).write_bytes(file.read_bytes())
    model = load_model(tmp_path / "copy" / "vqvae", device="cpu")
    assert model.decode(model.encode(torch.rand(1, 3, SIZE, SIZE))).shape == (1, 3, SIZE, SIZE)
    with pytest.raises(UserError, match="level 0 has no prior"):
        model.sample(1)
    given = [tree / "prior-level0", tree / "prior-level1"]
    whole = load_model(tmp_path / "copy" / "vqvae", priors=given, device="cpu")
    assert torch.equal(whole.sample(2), load_model(tree / "vqvae", device="cpu").sample(2))


def test_priors_that_do_not_belong_are_refused(tree, tmp_path):
    with pytest.raises(UserError, match="prior of level 1, needed 0"):
        load_model(tree, priors=[tree / "prior-level1", tree / "prior-level0"])
    with pytest.raises(UserError, match="needs 2 directories, got 1"):
        load_model(tree, priors=[tree / "prior-level0"])
    with pytest.raises(UserError, match="holds no trained model"):
        load_model(tree, priors=[tree / "prior-level0", tmp_path])
    with pytest.raises(UserError, match="holds no trained model"):
        load_model(tmp_path)
    checkpoint.save_model(
        tmp_path / "vqvae", "vqvae", tiny_vqvae(), {"config": {"image_size": SIZE}, "recipe": "r"}
    )
    with pytest.raises(UserError, match="codes of another checkpoint"):
        load_model(tmp_path, priors=[tree / "prior-level0", tree / "prior-level1"])


def test_the_priors_are_those_beside_a_linked_vqvae(tree, tmp_path):
    """As where several priors are tried on one VQ-VAE."""
    (tmp_path / "vqvae").symlink_to(tree / "vqvae")
    for path in (tmp_path, tmp_path / "vqvae", tmp_path / "vqvae" / "final"):
        model = load_model(path, device="cpu")
        assert model.prior_paths == [tmp_path / f"prior-level{level}" for level in (0, 1)]
        assert not model.priors


def test_priors_that_know_other_names_are_refused(tree, tmp_path):
    for kind, names in (("attribute_names", ["Smiling", "Hat"]), ("class_names", ["dog", "cat"])):
        prior, about = checkpoint.load_model(tree / "prior-level1"), {}
        about = {**checkpoint.read_about(tree / "prior-level1"), kind: names}
        checkpoint.save_model(tmp_path / kind, "prior", prior, about)
        message = f"know different {kind.replace('_', ' ')}"
        with pytest.raises(UserError, match=message):
            load_model(tree, priors=[tree / "prior-level0", tmp_path / kind])


def test_levels_that_do_not_know_what_is_asked_for_are_told(model):
    model.priors[0] = model.priors[0]._replace(attribute_names=[])
    model.priors[1] = model.priors[1]._replace(class_names=[])
    smiling, cat = ({"attributes": {"Smiling": 1}}, {"label": "cat"})
    for options, levels in (({}, []), (smiling, [0]), (cat, [1]), ({**smiling, **cat}, [0, 1])):
        assert model.deaf_levels(model.asked(Sampling(**options), 1)) == levels
    keep = [torch.ones(GRIDS[0], dtype=torch.bool), torch.zeros(GRIDS[1], dtype=torch.bool)]
    assert model.deaf_levels(model.asked(Sampling(**smiling), 1), keep) == []


def test_bf16_is_of_the_priors_alone(tree):
    model = load_model(tree, device="cpu", precision="bf16")
    assert {p.dtype for i in (0, 1) for p in model.prior(i).model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vqvae.parameters()} == {torch.float32}
    exact = load_model(tree, device="cpu")
    how = Sampling(seed=0, attributes={"Smiling": 1})
    rounded, codes = (m.draw_codes(range(64), how)[0] for m in (model, exact))
    assert (rounded == codes).float().mean() > 0.9  # logits are rounded to 8 bits, no more
