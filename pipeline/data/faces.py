"""Drawn faces: endless cartoon portraits in CelebA's layout, for runs without a data set.

In: a seed and an index. Out: a `Face` (every factor that made the picture), its picture at any
size from 64 px, and its CelebA attributes, each of which is true of the picture. The faces are
aligned as CelebA's are, and hold no noise: what a model gets wrong here, it got wrong.

    write_faces(Path("faces"), num_faces=10_000, size=64, seed=0, workers=4)

leaves `img_align_celeba/000001.png …`, `list_attr_celeba.txt`, `list_eval_partition.txt` and
`list_factors.txt`, so that whatever reads CelebA reads this too.

All shapes are polygons in one frame: the nose near x = 0, the eyes at y = 51, the chin at 77; the
picture shows x from -45 to 45 and y from 7 down to 97.
"""

import io
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw

from pipeline.failpoint import failpoint
from pipeline.stage import end_with_parent

VERSION = 1  # of the drawing: raised whenever the same seed gives other pixels or other labels
VIEW = (-45.0, 7.0, 90.0)  # the picture's left, top and side in the frame of the shapes
SUPERSAMPLING = 4  # a polygon's edge is hard: this many canvas pixels per picture pixel soften it
CHUNK = 64  # images per task of a worker process
CONTENTS = ("img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt")

Color = tuple[int, int, int]
Points = np.ndarray  # (N, 2) float64, in the frame above


def _colors(*codes: str) -> tuple[Color, ...]:
    return tuple(ImageColor.getrgb(code)[:3] for code in codes)


# fmt: off
SKIN_TONES = _colors("#FFE6DA", "#F8CDAE", "#EDB68C", "#D6976B", "#B37852", "#936048", "#6E4536")
HAIR_COLORS = _colors("#2A2633", "#45291E", "#7E4C24", "#F6CB62", "#C6CBD2", "#BA4F2A", "#E57F9F")
BLACK, DARK_BROWN, BROWN, BLOND, GRAY, RED, PINK = range(7)
IRIS_COLORS = _colors("#5B3A29", "#3E7CB1", "#4F8A4C", "#6C757D")
CLOTHING_COLORS = _colors("#E76F51", "#2A9D8F", "#2F4B66", "#F2A65A", "#7B5E92", "#F3EFE6",
                          "#D1495B", "#4A86C5")
HAT_COLORS = _colors("#C8443F", "#2D4A77", "#2E8A78", "#E9AE3C", "#6A4C8C", "#3A3A46")
BACKGROUNDS = tuple(zip(
    _colors("#FFE3C2", "#CFE8FF", "#E2D4F0", "#C9F2E5", "#FFEDB3", "#FFD9E6", "#7EA3D4", "#F5F0E1"),
    _colors("#FFB68F", "#86BDF2", "#A993D6", "#79CFBB", "#FFC857", "#FB96B7", "#3F639C", "#DCCFAE"),
    strict=True))
# fmt: on
BALD, BUZZ, SIDE_PART, QUIFF, AFRO, BOB, LONG, WAVY, BUN, PIGTAILS = range(10)  # hair_style
CREW, V_NECK, SHIRT, HOODIE, TURTLENECK = range(5)  # clothing
NO_HAT, BEANIE, CAP, TOP_HAT, SUN_HAT = range(5)  # hat
NO_GLASSES, ROUND, SQUARE, SUNGLASSES = range(4)  # glasses
NEUTRAL, SMILE, LAUGH, AH = range(4)  # mouth_shape
NO_BEARD, GOATEE, FULL_BEARD = range(3)  # beard
PLAIN, DISC, HILL = range(3)  # backdrop

WHITE, INK, GOLD, LIPSTICK = _colors("#FFFFFF", "#2B2433", "#FFC93C", "#C9184A")
INSIDE, TONGUE = _colors("#6A1B34", "#EC6A78")  # of a mouth


@dataclass(frozen=True, kw_only=True)
class Face:
    """All that a picture depends on. Floats lie in [0, 1]; 0.5 is the straight, average face."""

    male: bool  # CelebA's label; here heavy brows, a strong jaw and neck, and no lashes
    bangs: bool  # drawn only with a hair style that can have them, and no hat
    mustache: bool
    lipstick: bool
    earrings: bool
    rosy_cheeks: bool
    skin_tone: int  # index into SKIN_TONES, light to dark
    hair_style: int  # BALD … PIGTAILS
    hair_color: int  # index into HAIR_COLORS; also of brows, beard and mustache
    eye_color: int  # index into IRIS_COLORS
    mouth_shape: int  # NEUTRAL, SMILE, LAUGH, AH
    beard: int  # NO_BEARD, GOATEE, FULL_BEARD
    glasses: int  # NO_GLASSES, ROUND, SQUARE, SUNGLASSES
    hat: int  # NO_HAT … SUN_HAT
    hat_color: int  # index into HAT_COLORS
    clothing: int  # CREW … TURTLENECK
    clothing_color: int  # index into CLOTHING_COLORS
    background: int  # index into BACKGROUNDS
    backdrop: int  # PLAIN, DISC, HILL
    face_width: float
    jaw: float  # 0 pointed, 1 square
    head_tilt: float  # 0 and 1: 7 degrees to either side
    head_turn: float  # 0 and 1: the features moved to the left and to the right
    gaze: float  # 0 looks left, 1 looks right
    eye_spacing: float
    eye_size: float
    brow_angle: float  # 0 worried, 1 stern
    nose_size: float
    light: float  # 0 from the left, 1 from the right

    @property
    def shows_bangs(self) -> bool:
        return self.bangs and self.hat == NO_HAT and self.hair_style not in (BALD, BUZZ, QUIFF)

    @property
    def shows_hair(self) -> bool:
        return self.hair_style != BALD  # every other style shows at the temples under any hat

    @cached_property
    def half_width(self) -> float:
        return 20.5 + 3 * self.face_width

    @cached_property
    def features_x(self) -> float:
        """Where the middle of the features lies: they move more than the outline in a turn."""
        return 4.4 * (self.head_turn - 0.5)


FACTOR_NAMES = tuple(field.name for field in fields(Face) if field.type is not bool)
POSE_NAMES = tuple(f.name for f in fields(Face) if f.type is float and f.name != "light")
# Factors that some pictures hide: without a hat, or behind sunglasses.
SOMETIMES_HIDDEN = ("hat_color", "eye_color", "eye_size", "gaze")


def attributes(face: Face) -> dict[str, bool]:
    """CelebA's names for what the picture shows, in CelebA's order."""
    hair_color = face.hair_color if face.shows_hair else None
    return {
        "Bald": face.hair_style == BALD and face.hat == NO_HAT,
        "Bangs": face.shows_bangs,
        "Black_Hair": hair_color == BLACK,
        "Blond_Hair": hair_color == BLOND,
        "Brown_Hair": hair_color in (DARK_BROWN, BROWN),
        "Eyeglasses": face.glasses != NO_GLASSES,
        "Goatee": face.beard == GOATEE,
        "Gray_Hair": hair_color == GRAY,
        "Male": face.male,
        "Mouth_Slightly_Open": face.mouth_shape in (LAUGH, AH),
        "Mustache": face.mustache,
        "No_Beard": face.beard == NO_BEARD,
        "Pale_Skin": face.skin_tone == 0,
        "Rosy_Cheeks": face.rosy_cheeks,
        "Smiling": face.mouth_shape in (SMILE, LAUGH),
        "Wearing_Earrings": face.earrings,
        "Wearing_Hat": face.hat != NO_HAT,
        "Wearing_Lipstick": face.lipstick,
    }


def factors(face: Face) -> dict[str, float]:
    """The other factors, also where hidden. With the attributes they give back every pixel."""
    return {name: float(getattr(face, name)) for name in FACTOR_NAMES}


def sample_face(seed: int, index: int) -> Face:
    """Face number `index` of the endless series `seed`; attributes lean on `male`, none follows."""
    draw = random.Random(f"drawn face {seed} {index}").random  # the same in every Python

    def flip(probability: float) -> bool:
        return draw() < probability

    def pick(*weights: float) -> int:
        """An index, in proportion to the weights."""
        level = draw() * sum(weights)
        return next(i for i in range(len(weights)) if level < sum(weights[: i + 1]))

    def middling() -> float:
        return round((draw() + draw()) / 2, 3)

    male = flip(0.5)
    skin_tone = pick(14, 20, 19, 16, 13, 10, 8)
    hats = (76, 9, 8, 5, 2) if male else (82, 7, 3, 2, 6)
    hair_styles = (
        (22, 16, 22, 18, 9, 2, 4, 3, 3, 0) if male else (2, 3, 7, 5, 11, 20, 20, 14, 11, 7)
    )
    hair_colors = (27, 13, 14, 19, 13, 9, 5) if skin_tone < 4 else (42, 18, 4, 12, 14, 5, 5)
    return Face(
        male=male,
        bangs=flip(0.2 if male else 0.5),
        mustache=male and flip(0.34),
        lipstick=not male and flip(0.58),
        earrings=flip(0.08 if male else 0.42),
        rosy_cheeks=flip(0.12 if male else 0.3),
        skin_tone=skin_tone,
        hair_style=pick(*hair_styles),
        hair_color=pick(*hair_colors),
        eye_color=pick(40, 26, 20, 14),
        mouth_shape=pick(30, 26, 26, 18),
        beard=pick(45, 24, 31) if male else NO_BEARD,
        glasses=pick(76, 10, 9, 5),
        hat=pick(*hats),
        hat_color=pick(*[1] * len(HAT_COLORS)),
        clothing=pick(3, 2, 2, 2, 2),
        clothing_color=pick(*[1] * len(CLOTHING_COLORS)),
        background=pick(*[1] * len(BACKGROUNDS)),
        backdrop=pick(4, 4, 2),
        **{name: middling() for name in POSE_NAMES},
        light=round(draw(), 3),
    )


ATTRIBUTE_NAMES = tuple(attributes(sample_face(0, 0)))


@cache
def _arc(start: float, stop: float) -> Points:
    """Unit directions from `start` to `stop` degrees; 0 is right and 90 is down."""
    angles = np.radians(np.linspace(start, stop, max(8, int(abs(stop - start) / 6))))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360
) -> Points:
    return _arc(start, stop) * (rx, ry) + (x, y)


def scalloped(x: float, y: float, rx: float, ry: float, bumps: int, depth: float) -> Points:
    """An ellipse with round bumps: curls."""
    angles = np.linspace(0, 2 * np.pi, 12 * bumps, endpoint=False)
    radius = 1 - depth + depth * np.abs(np.sin(angles * bumps / 2))
    return np.stack([x + rx * radius * np.cos(angles), y + ry * radius * np.sin(angles)], axis=1)


@cache
def _spline_weights(num_points: int, steps: int = 7) -> np.ndarray:
    """Catmull-Rom as a matrix (num_points · steps - steps + 1, num_points): ends are repeated."""
    t = np.linspace(0, num_points - 1, (num_points - 1) * steps + 1)
    first = np.minimum(t.astype(int), num_points - 2)
    u = t - first
    basis = np.stack(
        [-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, u**3 - u**2]
    )
    weights = np.zeros((len(t), num_points))
    for offset, values in zip(range(-1, 3), basis / 2, strict=True):
        at = np.clip(first + offset, 0, num_points - 1)
        np.add.at(weights, (np.arange(len(t)), at), values)
    return weights


def curve(*points: tuple[float, float]) -> Points:
    """A smooth line through the points."""
    return _spline_weights(len(points)) @ np.asarray(points, dtype=float)


def symmetric(*right: tuple[float, float]) -> Points:
    """A smooth line through the points and then back through their mirror images, x negated."""
    middle = [] if right[-1][0] else [right[-1]]
    sides = right[: len(right) - len(middle)]
    return curve(*sides, *middle, *[(-x, y) for x, y in reversed(sides)])


def moved(points: Points, x: float, y: float) -> Points:
    return np.add(points, (x, y))


def mirrored(points: Points, side: int) -> Points:
    return points * (side, 1)


def stroke(line: Points, thickness: float) -> Points:
    """The line as a leaf: full thickness in its middle, pointed at its ends."""
    half = np.sin(np.linspace(0.15, np.pi - 0.15, len(line)))[:, None] * (0, thickness / 2)
    return np.concatenate([line - half, (line + half)[::-1]])


def mix(a: Color, b: Color, share: float) -> Color:
    """`a` with `share` of `b` in it."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def shaded(color: Color, depth: float = 1.0) -> Color:
    """The colour in shadow. Multiplied, and warm: a grey shadow makes a skin look dead."""
    red, green, blue = color
    return (
        round(red * (1 - 0.2 * depth)),
        round(green * (1 - 0.33 * depth)),
        round(blue * (1 - 0.25 * depth)),
    )


def head_outline(face: Face, grow: float = 0.0) -> Points:
    """Half an ellipse for the skull, a superellipse for the jaw."""
    rx = face.half_width + grow
    power = 1.02 - 0.3 * face.jaw - 0.1 * face.male  # less is squarer
    x, y = _arc(0, 180).T
    jaw = np.stack([np.sign(x) * np.abs(x) ** power * rx, 47 + y * (30 + grow)], axis=1)
    return np.concatenate([jaw, ellipse(0, 47, rx, 27 + grow, 180, 360)])


@dataclass(frozen=True)
class Canvas:
    """An image to fill polygons into, through a pose: a turn about the neck, in degrees."""

    image: Image.Image  # RGB, supersampled
    shadow: Image.Image  # L, the image's size: how dark the light leaves each place
    tilt: float = 0.0

    @cached_property
    def _pose(self) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = np.cos(np.radians(self.tilt)), np.sin(np.radians(self.tilt))
        left, top, side = VIEW
        scale = self.image.width / side
        pivot = np.array([0.0, 84.0])
        turn = np.array([[cos, sin], [-sin, cos]]) * scale  # of row vectors
        return turn, (pivot - (left, top)) * scale - pivot @ turn

    def region(self, points: Points) -> Image.Image:
        """The polygon as an L mask of the image's size, to draw within."""
        mask = Image.new("L", self.image.size)
        turn, shift = self._pose
        ImageDraw.Draw(mask).polygon((points @ turn + shift).ravel().tolist(), fill=255)
        return mask

    def fill(
        self,
        points: Points,
        color: Color,
        *,
        opacity: float = 1.0,
        within: Image.Image | None = None,
        shade: Color | None = None,
    ) -> None:
        """Fill a polygon, where `within` allows, and let `shade` in where the shadow lies."""
        turn, shift = self._pose
        placed = points @ turn + shift
        width, height = self.image.size
        left, top = np.maximum(np.floor(placed.min(axis=0)).astype(int), 0).tolist()
        right, bottom = (np.ceil(placed.max(axis=0)).astype(int) + 1).tolist()
        box = (left, top, min(right, width), min(bottom, height))
        if box[0] >= box[2] or box[1] >= box[3]:
            return
        mask = Image.new("L", (box[2] - left, box[3] - top))
        ImageDraw.Draw(mask).polygon(
            (placed - (left, top)).ravel().tolist(), fill=round(255 * opacity)
        )
        if within is not None:
            mask = ImageChops.multiply(mask, within.crop(box))
        self.image.paste(color, box, mask)
        if shade is not None:
            self.image.paste(shade, box, ImageChops.multiply(mask, self.shadow.crop(box)))

    def model(self, points: Points, color: Color, within: Image.Image | None = None) -> None:
        """Fill a polygon as a lit, rounded thing of this colour."""
        self.fill(points, color, within=within, shade=shaded(color))


def _shadow(pixels: int, light: float) -> Image.Image:
    """Dark below and away from the light."""
    along = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels - 0.5
    field = 0.42 + (0.5 - light) * 1.9 * along[None, :] + 0.75 * along[:, None]
    return Image.fromarray((255 * field.clip(0, 1)).astype(np.uint8))


def draw_face(face: Face, size: int) -> Image.Image:
    """The picture, RGB, (size, size)."""
    pixels = size * SUPERSAMPLING
    body = Canvas(Image.new("RGB", (pixels, pixels)), _shadow(pixels, face.light))
    head = replace(body, tilt=14 * (face.head_tilt - 0.5))
    draw_background(body, face)
    # A hat presses the hair down: what would stand above its edge is not drawn.
    hair_room = None
    if face.hat != NO_HAT:
        right = np.array([(face.half_width + 2, 36), (face.half_width + 14, 49), (80, 140)])
        hair_room = head.region(np.concatenate([right, mirrored(right[::-1], -1)]))
    draw_back_hair(head, face, hair_room)
    draw_body(body, head, face)
    draw_skull(head, face)
    draw_beard(head, face)
    draw_nose(head, face)
    draw_mouth(head, face)
    draw_mustache(head, face)
    draw_eyes(head, face)
    draw_front_hair(head, face, hair_room)
    draw_brows(head, face)  # over the fringe, as cartoonists do: brows carry the expression
    draw_earrings(head, face)
    draw_glasses(head, face)
    draw_hat(head, face)
    return body.image.reduce(SUPERSAMPLING)


def draw_background(canvas: Canvas, face: Face) -> None:
    light, deep = BACKGROUNDS[face.background]
    canvas.image.paste(light, (0, 0, *canvas.image.size))
    ramp = Image.linear_gradient("L").resize(canvas.image.size, Image.Resampling.BILINEAR)
    canvas.image.paste(deep, (0, 0), ramp)
    if face.backdrop == DISC:
        canvas.fill(ellipse(0, 50, 42, 42), mix(light, WHITE, 0.6), opacity=0.55)
    elif face.backdrop == HILL:
        canvas.fill(ellipse(18, 118, 80, 62), shaded(deep, 0.5), opacity=0.7)


def draw_body(canvas: Canvas, head: Canvas, face: Face) -> None:
    """Clothes, then the neck in their opening, then the chin's shadow on the neck."""
    color = CLOTHING_COLORS[face.clothing_color]
    lighter, darker = mix(color, WHITE, 0.28), shaded(color, 0.9)
    skin = SKIN_TONES[face.skin_tone]
    neck, broad = (10.5, 5) if face.male else (8, 0)
    if face.clothing == HOODIE:
        canvas.model(ellipse(0, 87, 25, 12), darker)
    chest, arm, shoulder = (44 + broad, 112), (40 + broad, 97), (31 + broad, 90)
    canvas.model(symmetric(chest, arm, shoulder, (17, 86), (8, 84)), color)
    openings = {
        CREW: ellipse(0, 83.5, neck + 3, 7),
        V_NECK: np.array([(neck + 3, 83), (0, 99), (-neck - 3, 83)]),
        SHIRT: np.array([(neck + 2, 83), (0, 95), (-neck - 2, 83)]),
        HOODIE: ellipse(0, 85, neck + 4, 8),
        TURTLENECK: ellipse(0, 82, neck, 4),
    }
    opening = openings[face.clothing]
    if face.clothing == CREW:
        canvas.fill(ellipse(0, 83.5, neck + 5.5, 9.5), darker)
    throat = np.array([(-neck, 60), (neck, 60), (neck, 86), (-neck, 86)])
    canvas.model(opening, skin)
    canvas.model(throat, skin)
    canvas.fill(
        moved(head_outline(face), 0, 6.5),
        shaded(skin, 1.2),
        within=ImageChops.lighter(canvas.region(opening), canvas.region(throat)),
    )
    if face.clothing == SHIRT:
        for side in (-1, 1):
            collar = np.array([(neck - 1, 80), (neck + 5, 84), (10, 97), (0, 93.5)])
            canvas.model(mirrored(collar, side), lighter)
    elif face.clothing == HOODIE:
        for side in (-1, 1):
            canvas.fill(mirrored(ellipse(8, 97, 1.3, 5), side), lighter)
    elif face.clothing == TURTLENECK:
        collar = symmetric((neck + 2.5, 92), (neck + 2.2, 82), (neck, 79.5), (0, 81.5))
        canvas.model(collar, lighter)


def draw_skull(canvas: Canvas, face: Face) -> None:
    """Ears, head, cheeks."""
    skin = SKIN_TONES[face.skin_tone]
    for side in (-1, 1):
        ear_x = side * (face.half_width + 0.8) - 0.5 * face.features_x
        canvas.model(ellipse(ear_x, 53, 4.2, 6), skin)
        canvas.fill(ellipse(ear_x + side * 0.4, 53, 2.2, 3.6), mix(skin, (160, 40, 50), 0.3))
    canvas.model(head_outline(face), skin)
    if face.hair_style == BALD:
        shine_x = 18 * (face.light - 0.5)
        canvas.fill(ellipse(shine_x, 26.5, 7, 2.6), mix(skin, WHITE, 0.6), opacity=0.7)
    if face.rosy_cheeks:
        inside = canvas.region(head_outline(face))
        for side in (-1, 1):
            for radius in (5.6, 4.2):  # two steps stand for a soft edge
                cheek = ellipse(face.features_x + side * 14.5, 59.6, radius, radius * 0.75)
                canvas.fill(cheek, (240, 62, 92), opacity=0.3, within=inside)


def draw_nose(canvas: Canvas, face: Face) -> None:
    skin = SKIN_TONES[face.skin_tone]
    size = 0.85 + 0.4 * face.nose_size
    x = 1.25 * face.features_x
    canvas.fill(ellipse(x, 59, 3.5 * size, 2.7 * size), mix(skin, (150, 40, 50), 0.34))
    canvas.fill(ellipse(x, 57.6, 3.3 * size, 2.9 * size), mix(skin, WHITE, 0.12))


def draw_mouth(canvas: Canvas, face: Face) -> None:
    """Lips around a line, a grin with teeth, or an opening."""
    skin = SKIN_TONES[face.skin_tone]
    lips = LIPSTICK if face.lipstick else mix(skin, (168, 44, 62), 0.42)
    centre = np.array([face.features_x, 67.0])
    if face.mouth_shape == LAUGH:
        rim = 1.9 if face.lipstick else 1.0
        upper = curve((-8, -2), (0, -0.6), (8, -2))
        opening = np.concatenate([upper, ellipse(0, -2, 8, 7, 0, 180)])
        canvas.fill(opening * (1 + rim / 8, 1 + rim / 3.5) + centre, lips)
        canvas.fill(opening + centre, INSIDE)
        within = canvas.region(opening + centre)
        canvas.fill(ellipse(0, 5.2, 4.6, 3.2) + centre, TONGUE, within=within)
        canvas.fill(ellipse(0, -2.6, 8, 3.5) + centre, WHITE, within=within)
    elif face.mouth_shape == AH:
        rim = 1.9 if face.lipstick else 1.1
        canvas.fill(ellipse(0, 0.4, 4 + rim, 3.3 + rim) + centre, lips)
        canvas.fill(ellipse(0, 0.4, 4, 3.3) + centre, INSIDE)
        canvas.fill(ellipse(0, 2.6, 2.8, 1.3) + centre, TONGUE)
    else:
        bend = 3.6 if face.mouth_shape == SMILE else 0.5
        half = 8.0 if face.mouth_shape == SMILE else 6.0
        line = curve((-half, -bend * 0.7), (0, bend * 0.55), (half, -bend * 0.7)) + centre
        if face.lipstick:
            canvas.fill(stroke(line, 5.4), lips)
            canvas.fill(stroke(line, 1.4), mix(lips, INK, 0.6))
        else:
            canvas.fill(stroke(moved(line, 0, 0.9), 3.4), lips)
            canvas.fill(stroke(line, 2.0), mix(skin, (92, 18, 38), 0.75))


def hair_tint(face: Face) -> Color:
    return HAIR_COLORS[face.hair_color]


def draw_beard(canvas: Canvas, face: Face) -> None:
    if face.beard == NO_BEARD:
        return
    if face.beard == GOATEE:
        shape = symmetric((5.6, 71.5), (7.2, 75), (5, 80.5), (0, 82.5))
        shape = moved(shape, face.features_x, 0)
    else:  # from the ears down, leaving the mouth and what is above it free
        low = head_outline(face, grow=2.2)[: len(_arc(0, 180))]
        edge = face.half_width
        top = symmetric((edge - 1, 50), (edge - 4, 58), (12, 62.5), (9, 69), (0, 72.5))[::-1]
        shape = np.concatenate([low, moved(top, 0.5 * face.features_x, 0)])
    # An edge of shadow: blond on tan or brown on brown would melt into the skin.
    skin = SKIN_TONES[face.skin_tone]
    canvas.fill(moved(shape, 0, -1.2), shaded(skin, 1.2), within=canvas.region(head_outline(face)))
    canvas.model(shape, hair_tint(face))


def draw_mustache(canvas: Canvas, face: Face) -> None:
    if face.mustache:
        half = curve((0, 60.2), (5, 60), (9, 62.4), (11.5, 63))
        lower = curve((11.5, 63), (8, 65), (4, 64.6), (0, 63.4))
        shape = np.concatenate([half, lower, mirrored(lower[::-1], -1), mirrored(half[::-1], -1)])
        shape = moved(shape, face.features_x, 0)
        canvas.fill(moved(shape, 0, -0.9), shaded(SKIN_TONES[face.skin_tone], 0.8))
        canvas.model(shape, shaded(hair_tint(face), 0.25))


def eye_centres(face: Face) -> Iterator[tuple[int, float, float]]:
    """(side, x, y) of the two eyes."""
    for side in (-1, 1):
        yield side, face.features_x + side * (9.4 + 2 * face.eye_spacing), 51.0


def draw_eyes(canvas: Canvas, face: Face) -> None:
    skin, iris = SKIN_TONES[face.skin_tone], IRIS_COLORS[face.eye_color]
    size = 0.92 + 0.2 * face.eye_size
    rx, ry = 5.1 * size, (4.1 if face.mouth_shape in (SMILE, LAUGH) else 4.5) * size
    for side, x, y in eye_centres(face):
        canvas.fill(ellipse(x, y - 0.8, rx + 1.1, ry + 1.2), shaded(skin, 0.5))
        white = ellipse(x, y, rx, ry)
        within = canvas.region(white)
        canvas.fill(white, (253, 251, 250))
        look = x + 3.0 * (face.gaze - 0.5) * size
        canvas.fill(ellipse(look, y, 3.7 * size, 3.8 * size), iris, within=within)
        canvas.fill(ellipse(look, y, 2.2 * size, 2.3 * size), INK, within=within)
        canvas.fill(ellipse(look - 1.3, y - 1.5, 1.35, 1.35), WHITE)
        lid = ellipse(x, y + 0.4, rx + 0.5, ry + 0.5, 195, 345)
        canvas.fill(stroke(lid, 1.8 if face.male else 2.6), INK)
        if not face.male:
            lash = curve((4.0, -2.4), (6.2, -2.9), (7.6, -4.6), (6.6, -1.6), (4.6, -0.6))
            canvas.fill(moved(mirrored(lash * size, side), x, y), INK)


def draw_brows(canvas: Canvas, face: Face) -> None:
    thickness = 3.4 if face.male else 2.3
    lean = 2.4 * (face.brow_angle - 0.5)
    brow = stroke(curve((-5.2, 42.8 + lean), (0.5, 40.8), (6.4, 43 - lean)), thickness)
    for side, x, _ in eye_centres(face):
        canvas.fill(moved(mirrored(brow, side), x, 0), shaded(hair_tint(face), 0.9))


def draw_earrings(canvas: Canvas, face: Face) -> None:
    if face.earrings:
        for side in (-1, 1):
            x = side * (face.half_width + 1.6) - 0.5 * face.features_x
            canvas.fill(ellipse(x, 61.4, 2.7, 2.7), mix(GOLD, (150, 80, 0), 0.35))
            canvas.fill(ellipse(x - 0.3, 61, 2.1, 2.1), GOLD)


def draw_glasses(canvas: Canvas, face: Face) -> None:
    if face.glasses == NO_GLASSES:
        return
    frame = mix(INK, (120, 40, 30), 0.35) if face.glasses == ROUND else INK
    bridge = moved(curve((-4, 50.5), (0, 48.6), (4, 50.5)), face.features_x, 0)
    canvas.fill(np.concatenate([bridge, moved(bridge[::-1], 0, 1.9)]), frame)
    for side, x, y in eye_centres(face):
        hinge = np.array([(x + side * 7, y - 2.4), (side * (face.half_width + 1), y - 1.2)])
        canvas.fill(np.concatenate([hinge, moved(hinge[::-1], 0, 2)]), frame)
        lens = moved(lens_outline(face.glasses), x, y + 0.3)
        glass = canvas.region(lens)
        rim = moved(lens_outline(face.glasses, grow=1.7), x, y + 0.3)
        canvas.fill(rim, frame, within=ImageChops.invert(glass))
        if face.glasses == SUNGLASSES:
            canvas.fill(lens, (52, 44, 66), shade=(116, 84, 132))
        glare = np.array([(x - 4, y + 5), (x + 1, y - 6), (x + 3.4, y - 6), (x - 1.6, y + 5)])
        canvas.fill(glare, WHITE, opacity=0.3, within=glass)


def lens_outline(glasses: int, grow: float = 0.0) -> Points:
    if glasses == ROUND:
        return ellipse(0, 0, 7 + grow, 7 + grow)
    x, y = _arc(0, 360).T  # a superellipse: a rectangle with round corners
    rx, ry = 7.4 + grow, 5.7 + grow
    return np.stack([rx * np.sign(x) * abs(x) ** 0.45, ry * np.sign(y) * abs(y) ** 0.45], axis=1)


def draw_back_hair(canvas: Canvas, face: Face, room: Image.Image | None) -> None:
    """What of the hair lies behind head, neck and shoulders."""
    edge = face.half_width
    tail = curve(*((edge + x, y) for x, y in ((-2, 48), (9, 46), (14, 58), (9, 72), (4, 62))))
    waves = [(edge + x, y) for x, y in ((-4, 94), (7, 93), (12, 84), (7, 75), (11, 65))]
    shapes = {
        AFRO: [scalloped(0, 43, edge + 11, 32, 15, 0.09)],
        BOB: [symmetric((edge - 6, 78), (edge + 5, 76), (edge + 7, 58), (edge + 4, 30), (0, 14))],
        LONG: [symmetric((edge - 2, 102), (edge + 8, 98), (edge + 7, 62), (edge + 4, 30), (0, 14))],
        WAVY: [symmetric(*waves, (edge + 6, 56), (edge + 9, 46), (edge + 4, 28), (0, 13))],
        BUN: [ellipse(0, 16, 9.5, 8)],
        PIGTAILS: [tail, mirrored(tail, -1)],
    }
    for shape in shapes.get(face.hair_style, []):
        canvas.model(shape, shaded(hair_tint(face), 0.7), within=room)


def hairline(face: Face) -> Points:
    """From the right temple over the forehead to the left one."""
    edge = face.half_width
    if face.hair_style in (SIDE_PART, BOB):
        return curve(
            *((edge - 1.5, 53), (edge - 3, 43), (edge - 8, 35), (7, 28.5), (-3, 33)),
            *((-12, 36.5), (3 - edge, 43), (1.5 - edge, 53)),
        )
    if face.hair_style in (LONG, WAVY):  # a middle parting
        return symmetric((edge - 1, 54), (edge - 2.5, 44), (edge - 8, 35), (4, 28), (0, 24.5))
    return symmetric((edge - 1.5, 53), (edge - 3, 43), (edge - 7, 35.5), (8, 32), (0, 31.5))


def hair_top(face: Face) -> Points:
    """The hair's outer outline, from the left temple over the crown to the right one."""
    edge = face.half_width
    if face.hair_style == QUIFF:
        return curve(
            *((-edge - 0.8, 53), (-edge - 1.5, 40), (-edge - 0.5, 27), (-15, 16), (-2, 11)),
            *((13, 9.5), (22, 14), (edge + 1, 27), (edge + 1.5, 40), (edge + 0.8, 53)),
        )
    if face.hair_style == AFRO:
        return scalloped(0, 42, edge + 9, 30, 16, 0.08)[97:-1]  # its upper half
    volume = {BUZZ: 0.8, SIDE_PART: 5, BOB: 6.5, LONG: 6, WAVY: 7, BUN: 4, PIGTAILS: 4.5}
    top = volume[face.hair_style]
    return ellipse(0, 47, edge + 0.7 + top / 4, 27 + top, 167, 373)


def fringe(face: Face) -> Points:
    """Bangs: three soft waves above the brows."""
    edge = face.half_width
    low = [(edge - 2, 44), (13.5, 41.6), (9, 39.2), (4, 41.4), (-2, 38.8), (-8, 41.4), (-12, 39)]
    top = curve((1 - edge, 36), (-13, 25), (0, 21), (13, 25), (edge - 1, 36))
    return np.concatenate([top, curve(*low, (2 - edge, 44))])


def curtains(face: Face) -> Iterator[Points]:
    """The hair that falls in front of the ears and, when long, over the shoulders."""
    edge = face.half_width
    ends = {BOB: 74.0, LONG: 93.0, WAVY: 88.0}
    if face.hair_style in ends:
        end = ends[face.hair_style]
        for side in (-1, 1):
            inner = curve((edge - 8, 33), (edge - 2.6, 43), (edge - 1, 58), (edge - 0.5, end - 4))
            outer = curve((edge + 4, end), (edge + 7.5, end - 14), (edge + 6, 48), (edge - 2, 30))
            yield mirrored(np.concatenate([inner, outer]), side)


def draw_front_hair(canvas: Canvas, face: Face, room: Image.Image | None) -> None:
    """The cap of hair, its shadow on the forehead, its shine, and the fringe."""
    if not face.shows_hair:
        return
    color, skin = hair_tint(face), SKIN_TONES[face.skin_tone]
    cap = np.concatenate([hair_top(face), hairline(face)])
    forehead = canvas.region(head_outline(face))
    for above in [cap, fringe(face)] if face.shows_bangs else [cap]:
        canvas.fill(moved(above, 0, 1.9), shaded(skin), opacity=0.5, within=forehead)
    for lock in curtains(face):
        canvas.model(lock, color, within=room)
    canvas.model(cap, color, within=room)
    if face.shows_bangs:
        canvas.model(fringe(face), mix(color, WHITE, 0.07))
    elif face.hat == NO_HAT and face.hair_style not in (BUZZ, AFRO):
        start = 225 + 45 * face.light  # degrees: the shine lies on the lit side of the crown
        shine = stroke(ellipse(0, 47, face.half_width - 3.5, 25.2, start, start + 45), 3.2)
        canvas.fill(shine, mix(color, WHITE, 0.35), opacity=0.55, within=canvas.region(cap))


def draw_hat(canvas: Canvas, face: Face) -> None:
    color, edge = HAT_COLORS[face.hat_color], face.half_width
    darker, lighter = shaded(color), mix(color, WHITE, 0.25)
    if face.hat == BEANIE:
        canvas.model(ellipse(0, 13, 5, 5), lighter)
        canvas.model(ellipse(0, 38, edge + 3, 24, 180, 360), color)
        cuff = symmetric((edge + 2.5, 40.5), (edge + 4, 36), (edge + 2.5, 31.5), (0, 30))
        canvas.model(cuff, lighter)
    elif face.hat == CAP:
        canvas.model(ellipse(0, 37, edge + 2.2, 25, 180, 360), color)
        canvas.fill(ellipse(0, 12.5, 2.6, 1.6), lighter)
        upper, lower = ellipse(0, 38, edge + 4, 8, 180, 360), ellipse(0, 38, edge + 4, 4, 0, 180)
        canvas.model(moved(np.concatenate([upper, lower]), face.features_x, 0), darker)
    elif face.hat == TOP_HAT:
        crown = np.array([(-18.5, 35), (-20.5, 10.5), (20.5, 10.5), (18.5, 35)])
        canvas.model(crown, color)
        canvas.fill(np.array([(-19.2, 27), (19.2, 27), (18.5, 34), (-18.5, 34)]), lighter)
        canvas.model(ellipse(0, 35, edge + 9, 4.6), darker)
    elif face.hat == SUN_HAT:
        canvas.model(ellipse(0, 34, edge + 16, 7.5), color)
        canvas.model(ellipse(0, 33, edge - 1, 23, 180, 360), color)
        canvas.fill(symmetric((edge - 1, 33), (edge - 1.5, 27), (0, 24)), darker)


def write_faces(
    root: Path,
    *,
    num_faces: int,
    size: int,
    seed: int,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `num_faces` pictures and their tables to `root` in CelebA's layout.

    The bytes depend on num_faces, size and seed alone. A second call goes on where the first was
    stopped; `progress` gets the number of newly drawn pictures, a few at a time. The tables come
    last, so a root that has them is complete. With `workers` <= 1 no process is started; more are
    spawned, so the calling script needs its `if __name__ == "__main__"`.
    Raises ValueError if `root` already holds other pictures.
    """
    if not 1 <= num_faces <= 999_999:
        raise ValueError(f"num_faces is {num_faces}; six-digit names allow 1 to 999999")
    if size < 16:
        raise ValueError(f"size is {size}; a face needs at least 16 pixels, and 64 to look right")
    folder = root / "img_align_celeba"
    _claim(root, {"seed": seed, "size": size, "num_faces": num_faces, "version": VERSION})
    folder.mkdir(exist_ok=True)
    chunks = [range(at, min(at + CHUNK, num_faces)) for at in range(0, num_faces, CHUNK)]
    for num_new in _draw_chunks([(folder, chunk, size, seed) for chunk in chunks], workers):
        if progress is not None and num_new:
            progress(num_new)
    faces = [sample_face(seed, index) for index in range(num_faces)]
    signs = [[1 if true else -1 for true in attributes(face).values()] for face in faces]
    numbers = [[repr(value) for value in factors(face).values()] for face in faces]
    splits = "".join(f"{_name(i)} {_partition(i, num_faces)}\n" for i in range(num_faces))
    _write(root / "list_attr_celeba.txt", _table(ATTRIBUTE_NAMES, signs))
    _write(root / "list_factors.txt", _table(FACTOR_NAMES, numbers))
    _write(root / "list_eval_partition.txt", splits.encode())


def _claim(root: Path, settings: dict[str, int]) -> None:
    """Mark `root` as holding these pictures, or refuse it."""
    marker = root / "faces.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != settings:
            raise ValueError(
                f"{marker} says {found}, but {settings} was asked for: "
                "choose another directory or delete this one"
            )
    elif strangers := [name for name in CONTENTS if (root / name).exists()]:
        raise ValueError(
            f"{root} holds {strangers[0]} but no faces.json, so these are not drawn faces: "
            "choose another directory"
        )
    else:
        root.mkdir(parents=True, exist_ok=True)
        _write(marker, json.dumps(settings).encode())


def _draw_chunks(tasks: list[tuple[Path, range, int, int]], workers: int) -> Iterator[int]:
    """The number of new pictures of each task, as the tasks end."""
    if workers <= 1:
        yield from map(_draw_chunk, tasks)
        return
    spawn = multiprocessing.get_context("spawn")  # fork would copy the caller's threads half-way
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
        yield from pool.map(_draw_chunk, tasks)


def _draw_chunk(task: tuple[Path, range, int, int]) -> int:
    folder, indices, size, seed = task
    missing = [index for index in indices if not (folder / _name(index)).exists()]
    for index in missing:
        encoded = io.BytesIO()
        draw_face(sample_face(seed, index), size).save(encoded, format="PNG")
        _write(folder / _name(index), encoded.getvalue())
    return len(missing)


def _name(index: int) -> str:
    return f"{index + 1:06d}.png"


def _partition(index: int, num_faces: int) -> int:
    """0 train, 1 valid, 2 test: 80, 10 and 10 percent, in this order as in CelebA."""
    return (index * 10 >= num_faces * 8) + (index * 10 >= num_faces * 9)


def _table(names: Iterable[str], rows: list[list]) -> bytes:
    """CelebA's attribute file: the count, the names, then one row per picture."""
    lines = [str(len(rows)), " ".join(names)]
    lines += [" ".join([_name(i), *map(str, row)]) for i, row in enumerate(rows)]
    return ("\n".join(lines) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """The whole file or none of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(content)
    failpoint("commit")
    os.replace(partial, path)
