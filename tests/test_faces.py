"""Drawn faces: the pixels are a function of the factors, and every label is true of the picture."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import faces
from pipeline.data.faces import Face, attributes, draw_face, factors, sample_face, write_faces

PEOPLE = [sample_face(3, index) for index in range(60)]
UPRIGHT = [replace(face, head_tilt=0.5, head_turn=0.5) for face in PEOPLE]
BARE = {"hat": 0, "glasses": 0, "beard": 0, "mustache": False, "bangs": False, "earrings": False}
SIZE = 64


def pixels(face: Face, size: int = SIZE) -> np.ndarray:
    return np.asarray(draw_face(face, size)).astype(int)


def changed(before: Face, after: Face) -> np.ndarray:
    """(H, W) bool: where the two pictures differ visibly."""
    return np.abs(pixels(before) - pixels(after)).max(axis=2) > 24


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """A rectangle of the shapes' frame as (H, W) bool."""
    x = faces.VIEW[0] + (np.arange(SIZE) + 0.5) / SIZE * faces.VIEW[2]
    y = faces.VIEW[1] + (np.arange(SIZE) + 0.5) / SIZE * faces.VIEW[2]
    return ((x > left) & (x < right))[None, :] & ((y > top) & (y < bottom))[:, None]


def test_same_index_same_pixels_and_others_differ():
    assert sample_face(1, 7) == sample_face(1, 7)
    pictures = {draw_face(face, SIZE).tobytes() for face in PEOPLE}
    assert len(pictures) == len(PEOPLE)
    assert draw_face(sample_face(3, 0), SIZE).tobytes() in pictures
    assert sample_face(3, 0) != sample_face(4, 0)


@pytest.mark.parametrize("size", [64, 96, 128])
def test_sizes_show_the_same_picture(size):
    large = draw_face(PEOPLE[0], size)
    assert (large.size, large.mode) == ((size, size), "RGB")
    small = np.asarray(large.resize((32, 32), Image.Resampling.BOX)).astype(int)
    reference = np.asarray(draw_face(PEOPLE[0], 256).resize((32, 32), Image.Resampling.BOX))
    assert np.abs(small - reference).mean() < 3


def test_attributes_and_factors_give_back_the_picture():
    for face in PEOPLE[:30]:
        labels = {name.lower(): value for name, value in attributes(face).items()}
        labels |= {"lipstick": labels["wearing_lipstick"], "earrings": labels["wearing_earrings"]}
        flags = {name: labels[name] for name in ("male", "bangs", "mustache", "rosy_cheeks")}
        flags |= {name: labels[name] for name in ("lipstick", "earrings")}
        numbers = {
            name: value if isinstance(getattr(face, name), float) else int(value)
            for name, value in factors(face).items()
        }
        assert (
            draw_face(Face(**flags, **numbers), SIZE).tobytes() == draw_face(face, SIZE).tobytes()
        )


# name: (the label absent, the label present, where the picture may change, least changed pixels)
EDITS = {
    "Bangs": ({"bangs": False}, {"bangs": True}, (-25, 18, 25, 48), 40),
    "Eyeglasses": ({"glasses": 0}, {"glasses": 2}, (-27, 40, 27, 62), 40),
    "Goatee": ({"beard": 0}, {"beard": 1}, (-9, 68, 9, 86), 20),
    "Mustache": ({"mustache": False}, {"mustache": True}, (-14, 57, 14, 68), 15),
    "Mouth_Slightly_Open": ({"mouth_shape": 0}, {"mouth_shape": 3}, (-12, 60, 12, 78), 15),
    "Rosy_Cheeks": ({"rosy_cheeks": False}, {"rosy_cheeks": True}, (-23, 53, 23, 67), 20),
    "Smiling": ({"mouth_shape": 0}, {"mouth_shape": 1}, (-20, 40, 20, 78), 12),
    "Wearing_Earrings": ({"earrings": False}, {"earrings": True}, (-32, 56, 32, 67), 8),
    "Wearing_Lipstick": ({"lipstick": False}, {"lipstick": True}, (-12, 60, 12, 80), 8),
}


@pytest.mark.parametrize("name", EDITS)
def test_attribute_shows_where_it_should_and_nowhere_else(name):
    without, having, region, least = EDITS[name]
    for face in UPRIGHT:
        face = replace(face, **BARE)
        if name == "Bangs" and face.hair_style in (faces.BALD, faces.BUZZ, faces.QUIFF):
            continue
        before, after = replace(face, **without), replace(face, **having)
        assert (attributes(before)[name], attributes(after)[name]) == (False, True)
        difference = changed(before, after)
        assert difference.sum() >= least, face
        assert not (difference & ~box(*region)).any(), face


def test_hat_covers_the_crown_and_leaves_the_face():
    for face in UPRIGHT[:30]:
        for hat in (faces.BEANIE, faces.CAP, faces.TOP_HAT, faces.SUN_HAT):
            difference = changed(replace(face, **BARE), replace(face, **BARE | {"hat": hat}))
            assert (difference & box(-22, 12, 22, 36)).mean() > 0.03
            assert not (difference & box(-17, 46, 17, 95)).any()


def test_full_beard_is_no_mustache_and_no_goatee():
    for face in UPRIGHT[:20]:
        shaved = replace(face, **BARE)
        bearded = replace(shaved, beard=faces.FULL_BEARD)
        labels = attributes(bearded)
        assert not (labels["No_Beard"] or labels["Goatee"] or labels["Mustache"])
        assert (changed(shaved, bearded) & box(-24, 70, 24, 84)).sum() > 60


def test_rosy_cheeks_show_above_a_full_beard_and_lips_below_a_mustache():
    for face in UPRIGHT[:20]:
        covered = replace(face, **BARE | {"beard": faces.FULL_BEARD, "mustache": True})
        pale, rosy = replace(covered, rosy_cheeks=False), replace(covered, rosy_cheeks=True)
        assert changed(pale, rosy).sum() >= 8
        sad, glad = replace(covered, mouth_shape=0), replace(covered, mouth_shape=1)
        assert changed(sad, glad).sum() >= 8


def test_hair_color_shows_at_the_temples_under_a_hat():
    temples = box(-40, 38, -18.5, 60) | box(18.5, 38, 40, 60)
    for face in UPRIGHT[:30]:
        for hat in range(5):
            black = replace(face, **BARE | {"hat": hat, "hair_color": faces.BLACK})
            blond = replace(black, hair_color=faces.BLOND)
            assert attributes(black)["Black_Hair"] == (face.hair_style != faces.BALD)
            if face.hair_style != faces.BALD:
                assert (changed(black, blond) & temples).sum() >= 8, (hat, face)


def test_a_label_is_not_given_for_what_is_hidden():
    bald = replace(PEOPLE[0], hair_style=faces.BALD, hair_color=faces.BLACK, bangs=True, hat=0)
    assert attributes(bald)["Bald"]
    assert not attributes(bald)["Black_Hair"] and not attributes(bald)["Bangs"]
    assert not attributes(replace(bald, hat=faces.CAP))["Bald"]
    covered = replace(PEOPLE[0], hair_style=faces.LONG, bangs=True, hat=faces.BEANIE)
    assert not attributes(covered)["Bangs"]
    assert (
        draw_face(covered, SIZE).tobytes()
        == draw_face(replace(covered, bangs=False), SIZE).tobytes()
    )


def test_what_is_hidden_in_some_pictures_is_listed():
    hats = (faces.NO_HAT, faces.NO_HAT, faces.CAP, faces.SUN_HAT)
    glasses = (faces.ROUND, faces.SUNGLASSES, faces.NO_GLASSES, faces.SQUARE)
    dressed = [
        replace(face, hat=hat, glasses=pair)
        for face, hat, pair in zip(PEOPLE, hats, glasses, strict=False)
    ]
    pictures = [pixels(face) for face in dressed]
    for name in faces.FACTOR_NAMES:
        shown = []
        for face, picture in zip(dressed, pictures, strict=True):
            value = getattr(face, name)
            other = float(value < 0.5) if isinstance(value, float) else (value + 1) % 3
            shown.append((pixels(replace(face, **{name: other})) != picture).any())
        assert all(shown) == (name not in faces.SOMETIMES_HIDDEN), name


def test_no_base_rate_is_degenerate():
    table = [attributes(sample_face(0, index)) for index in range(500)]
    for name in faces.ATTRIBUTE_NAMES:
        rate = np.mean([row[name] for row in table])
        assert 0.06 < rate < 0.8, (name, rate)
    for name in faces.FACTOR_NAMES:
        values = [factors(sample_face(0, index))[name] for index in range(500)]
        assert np.std(values) > 0.1, name


def test_eyes_lie_where_celeba_has_them():
    """Aligned: the eyes of all faces overlap around one place on either side."""
    for face in PEOPLE:
        for side, x, y in faces.eye_centres(face):
            assert 7 <= side * x <= 14 and 50 <= y <= 52


def read_table(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    count, names, *rows = path.read_text().splitlines()
    assert int(count) == len(rows)
    return names.split(), {row.split()[0]: row.split()[1:] for row in rows}


def test_layout_is_celebas_and_workers_change_no_byte(tmp_path):
    settings = {"num_faces": 130, "size": 64, "seed": 5}
    done = []
    write_faces(tmp_path / "one", **settings, workers=1, progress=done.append)
    write_faces(tmp_path / "two", **settings, workers=2)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 130 + 4 and sum(done) == 130
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.*"))
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    names, signs = read_table(tmp_path / "one" / "list_attr_celeba.txt")
    assert tuple(names) == faces.ATTRIBUTE_NAMES
    factor_names, numbers = read_table(tmp_path / "one" / "list_factors.txt")
    assert tuple(factor_names) == faces.FACTOR_NAMES
    for index, name in enumerate(signs):
        face = sample_face(5, index)
        assert name == f"{index + 1:06d}.png"
        assert signs[name] == ["1" if value else "-1" for value in attributes(face).values()]
        assert [float(value) for value in numbers[name]] == list(factors(face).values())
    last = Image.open(tmp_path / "one" / "img_align_celeba" / "000130.png")
    assert last.tobytes() == draw_face(sample_face(5, 129), 64).tobytes()

    rows = (tmp_path / "one" / "list_eval_partition.txt").read_text().splitlines()
    assert [row.split()[0] for row in rows] == list(signs)
    assert [row.split()[1] for row in rows] == ["0"] * 104 + ["1"] * 13 + ["2"] * 13


def test_restart_draws_only_what_is_missing(tmp_path):
    settings = {"num_faces": 10, "size": 64, "seed": 0, "workers": 1}
    write_faces(tmp_path, **settings)
    kept, lost = (tmp_path / "img_align_celeba" / name for name in ("000001.png", "000002.png"))
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    done = []
    write_faces(tmp_path, **settings, progress=done.append)
    assert done == [1]
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content


def test_other_pictures_are_refused_and_left_alone(tmp_path):
    write_faces(tmp_path / "faces", num_faces=2, size=64, seed=0, workers=1)
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 1"):
        write_faces(tmp_path / "faces", num_faces=2, size=64, seed=1, workers=1)
    assert json.loads((tmp_path / "faces" / "faces.json").read_text())["seed"] == 0

    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no faces\.json"):
        write_faces(tmp_path / "celeba", num_faces=2, size=64, seed=0, workers=1)
    assert not (tmp_path / "celeba" / "faces.json").exists()


@pytest.mark.parametrize("wrong", [{"num_faces": 0}, {"num_faces": 10**6}, {"size": 8}])
def test_impossible_settings_name_the_value(tmp_path, wrong):
    settings = {"num_faces": 2, "size": 64, "seed": 0, "workers": 1} | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        write_faces(tmp_path, **settings)
    assert not list(tmp_path.iterdir())
