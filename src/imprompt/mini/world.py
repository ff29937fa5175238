"""The procedural image world that mini is trained on: subjects with an individual appearance, rendered in scenes.

A *subject* belongs to a category and has an individual appearance; a *scene* is everything that changes from one image of a
subject to the next. Both are functions of a seed, so that every parameter of every image is known: the attribute classifier is
trained on them, silhouettes and edge maps exist for structure control, and a training set is a range of integers. This module
needs only Pillow and numpy.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # width and height of every image in pixels
_SUPERSAMPLING = 3  # antialiasing: images are rendered this many times larger and then reduced
_VIEWS_PER_BACKGROUND = 12

CATEGORIES = ("star", "heart", "house", "tree", "fish", "cat", "car", "mushroom", "flower", "boat")
PATTERNS = ("plain", "striped", "dotted", "checked")
ACCESSORIES = ("none", "hat", "crown", "bow")
BACKGROUNDS = ("white", "grey", "night", "snow", "beach", "meadow", "desert", "city")

Color = tuple[int, int, int]
PALETTE: dict[str, Color] = {
    "red": (215, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (250, 222, 50),
    "green": (45, 155, 60),
    "turquoise": (45, 200, 195),
    "blue": (45, 80, 210),
    "purple": (130, 55, 175),
    "pink": (246, 135, 190),
    "brown": (120, 72, 40),
    "white": (245, 245, 245),
    "black": (38, 36, 42),
}
COLORS = tuple(name for name in PALETTE if name not in ("white", "black"))  # main colors; white and black are second colors only

_HELD_OUT_FROM = 1_000_000  # first seed of held-out subjects
HELD_OUT_SCENES = 20_000_000  # first seed of their scenes
_INK, _CREAM, _GLASS = (40, 34, 38), (240, 226, 200), (205, 230, 245)


@dataclass(frozen=True)
class Subject:
    """What all images of one subject have in common."""

    seed: int
    category: str
    color: str
    color_rgb: Color
    second_color: str
    second_color_rgb: Color
    pattern: str
    period: float  # pattern period in object units (the object spans 2)
    upright: bool  # vertical stripes
    outline: bool
    face: bool
    accessory: str
    stretch: float  # width / height


@dataclass(frozen=True)
class Scene:
    """What changes from one image of a subject to the next."""

    seed: int
    background: str
    x: float  # center in pixels of a SIZE × SIZE image
    y: float
    size: float  # height of the object in pixels
    tilt: float  # degrees
    flip: bool
    tint: tuple[float, float, float]  # gain of red, green and blue, including brightness
    cover: str  # occluder in the foreground: "none", "low" or "post"


# ---------------------------------------------------------------------------------------------- subjects and scenes


def make_subject(seed: int) -> Subject:
    """The subject that a seed determines."""
    r = random.Random(f"subject {seed}")
    color = r.choice(COLORS)
    second = r.choice(_contrasting_colors(color))
    return Subject(
        seed=seed,
        category=r.choice(CATEGORIES),
        color=color,
        color_rgb=_sample_shade(color, r),
        second_color=second,
        second_color_rgb=_sample_shade(second, r),
        pattern=r.choice(PATTERNS),
        period=r.uniform(0.56, 0.68),
        upright=r.random() < 0.5,
        outline=r.random() < 0.5,
        face=r.random() < 0.25,
        accessory=r.choice(ACCESSORIES) if r.random() < 0.3 else "none",
        stretch=r.uniform(0.95, 1.05),
    )


def make_scene(seed: int) -> Scene:
    """The scene that a seed determines."""
    r = random.Random(f"scene {seed}")
    size = r.uniform(45, 50)
    light = r.uniform(0.86, 1.05)
    warmth = r.uniform(-0.05, 0.05)
    max_shift = 12 if r.random() < 0.06 else 2.5  # 6 % of the images crop the subject at the border
    return Scene(
        seed=seed,
        background=r.choice(BACKGROUNDS),
        x=SIZE / 2 + r.uniform(-max_shift, max_shift),
        y=SIZE / 2 + 2 + r.uniform(-0.7 * max_shift, 0.7 * max_shift),
        size=size,
        tilt=r.uniform(-6, 6),
        flip=r.random() < 0.5,
        tint=(light * (1 + warmth), light, light * (1 - warmth)),
        cover=r.choice(("low", "post")) if r.random() < 0.08 else "none",
    )


def is_held_out_combination(subject: Subject) -> bool:
    """Whether no training image shows this category in this color with this pattern.

    One color of nine is held out for each category and pattern, so that held-out prompts are balanced.
    """
    category, color, pattern = CATEGORIES.index(subject.category), COLORS.index(subject.color), PATTERNS.index(subject.pattern)
    return color == (category + 2 * pattern) % len(COLORS)


def iterate_subjects(*, held_out: bool = False) -> Iterator[Subject]:
    """Endless subjects of a split. Held-out subjects have seeds and combinations of attributes that training never uses."""
    seed = _HELD_OUT_FROM if held_out else 0
    while True:
        subject = make_subject(seed)
        if is_held_out_combination(subject) == held_out:
            yield subject
        seed += 1


@cache
def _contrasting_colors(color: str) -> tuple[str, ...]:
    """Second colors whose luma differs enough from that of `color` for a pattern to be visible."""
    return tuple(name for name in PALETTE if abs(_compute_luma(PALETTE[name]) - _compute_luma(PALETTE[color])) > 60)


def _compute_luma(c: Color) -> float:
    return 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]


def _sample_shade(name: str, r: random.Random) -> Color:
    gain = r.uniform(0.93, 1.05)
    return _clip_to_uint8(*(gain * v + r.uniform(-13, 13) for v in PALETTE[name]))


def _clip_to_uint8(*values: float) -> Color:
    red, green, blue = (max(0, min(255, round(v))) for v in values)
    return red, green, blue


# ---------------------------------------------------------------------------------------------------------- captions

_PREFIXES = ("", "", "a photo of ", "a picture of ", "a drawing of ", "an image of ")
_PLACES = {
    "white": ("on white", "on a white background", "on a white wall"),
    "grey": ("on grey", "on a grey background", "on a grey wall"),
    "night": ("at night", "in the night", "under the stars"),
    "snow": ("in the snow", "in snow", "on snow"),
    "beach": ("on a beach", "on the beach", "at the beach"),
    "meadow": ("in a meadow", "in the meadow", "on a meadow"),
    "desert": ("in the desert", "in a desert", "in the desert"),
    "city": ("in the city", "in a city", "in the city"),
}
_NOUNS = {"striped": "stripes", "dotted": "dots", "checked": "checks"}


def sample_caption(subject: Subject, scene: Scene, rng: random.Random, keep: float = 0.75) -> str:
    """A descriptive caption: the category and a random subset of the attributes, each with probability `keep`."""
    words = [rng.choice(_PREFIXES) + "a"]
    ending = []
    if rng.random() < keep:
        words.append(subject.color)
    if rng.random() < keep:
        if subject.pattern != "plain" and rng.random() < 0.5:
            ending.append(f"with {subject.second_color} {_NOUNS[subject.pattern]}")
        else:
            words.append(subject.pattern)
    words.append(subject.category)
    if subject.accessory != "none" and rng.random() < keep:
        ending.append(f"with a {subject.accessory}")
    if subject.face and rng.random() < 0.5 * keep:
        ending.append("with a face")
    if rng.random() < keep:
        ending.append(rng.choice(_PLACES[scene.background]))
    return " ".join(words + ending).replace("a orange", "an orange")


def sample_scene_caption(subject: Subject, scene: Scene, rng: random.Random) -> str:
    """A caption of category and background that does not describe the appearance of the subject."""
    return f"{rng.choice(_PREFIXES)}a {subject.category} {rng.choice(_PLACES[scene.background])}"


def format_full_caption(subject: Subject, scene: Scene) -> str:
    """The four classified attributes in a fixed wording, as in evaluation prompts."""
    article = "an" if subject.color[0] in "aeiou" else "a"
    return f"{article} {subject.color} {subject.pattern} {subject.category} {_PLACES[scene.background][0]}"


def build_vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain and some that users type, sorted."""
    phrases = [*_PREFIXES, *(p for places in _PLACES.values() for p in places), *_NOUNS.values()]
    extra = "a an and of with the in on at to by wearing very big small beautiful best high quality bad low face pattern"
    names = [*CATEGORIES, *PALETTE, *PATTERNS, *ACCESSORIES, *BACKGROUNDS]
    return tuple(sorted({word for phrase in [*phrases, *names, extra] for word in phrase.split()}))


# ------------------------------------------------------------------------------------------------------------ shapes

Points = list[tuple[float, float]]


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0, end: float = 360, n: int = 28) -> Points:
    angles = (math.radians(start + (end - start) * i / (n - 1)) for i in range(n))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


@dataclass(frozen=True)
class _Shape:
    """The outline of a category in a square of −1 … 1, y pointing down: parts behind, the patterned body, details on top."""

    body: tuple[Points, ...]
    behind: tuple[tuple[Points, Color], ...] = ()
    details: tuple[tuple[Points, Color], ...] = ()
    top: tuple[float, float] = (0, -0.9)  # position of an accessory
    face: tuple[float, float] = (0, 0)  # position of a face
    includes_face: bool = False  # the shape has a face of its own


@cache
def _build_shape(category: str) -> _Shape:
    match category:
        case "star":
            rays = [(math.radians(36 * i - 90), 1.0 if i % 2 == 0 else 0.5) for i in range(10)]
            return _Shape(([(r * math.cos(a), r * math.sin(a) + 0.05) for a, r in rays],), face=(0, 0.02))
        case "heart":
            turn = [2 * math.pi * i / 40 for i in range(40)]
            curve = [
                (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16) for t in turn
            ]
            return _Shape((curve,), top=(0.0, -0.45), face=(0, -0.15))
        case "house":
            return _Shape(
                (_rectangle(-0.72, -0.2, 0.72, 0.95), [(-1, -0.15), (0, -1), (1, -0.15)]),
                behind=((_rectangle(0.4, -0.95, 0.65, -0.3), (110, 80, 75)),),
                details=(
                    (_rectangle(-0.2, 0.35, 0.2, 0.95), _INK),
                    (_rectangle(0.32, 0.05, 0.6, 0.33), _GLASS),
                    (_rectangle(-0.6, 0.05, -0.32, 0.33), _GLASS),
                ),
                face=(0, -0.45),
            )
        case "tree":
            tiers = (
                [(-0.85, 0.62), (0, -0.3), (0.85, 0.62)],
                [(-0.68, 0.15), (0, -0.7), (0.68, 0.15)],
                [(-0.5, -0.3), (0, -1), (0.5, -0.3)],
            )
            return _Shape(tiers, behind=((_rectangle(-0.16, 0.5, 0.16, 1), (105, 70, 45)),), face=(0, 0.2))
        case "fish":
            return _Shape(
                (_ellipse(-0.15, 0, 0.82, 0.58), [(0.5, 0), (1, -0.5), (0.9, 0), (1, 0.5)], [(-0.3, -0.45), (0.05, -0.85), (0.3, -0.4)]),
                details=((_ellipse(-0.6, -0.12, 0.15, 0.15), (250, 250, 250)), (_ellipse(-0.63, -0.12, 0.08, 0.08), _INK)),
                top=(-0.3, -0.55), includes_face=True,
            )  # fmt: skip
        case "cat":
            eye = [(_ellipse(side * 0.34, -0.02, 0.15, 0.17), (250, 250, 250)) for side in (-1, 1)]
            pupil = [(_ellipse(side * 0.33, 0, 0.08, 0.12), _INK) for side in (-1, 1)]
            whiskers = [
                ([(s * 0.3, y), (s * 0.95, y + d), (s * 0.95, y + d + 0.05), (s * 0.3, y + 0.06)], _INK)
                for s in (-1, 1)
                for y, d in ((0.36, -0.08), (0.5, 0.08))
            ]
            nose = ([(-0.12, 0.27), (0.12, 0.27), (0, 0.43)], (235, 120, 140))
            ears = ([(-0.85, -0.1), (-0.78, -1), (-0.15, -0.5)], [(0.85, -0.1), (0.78, -1), (0.15, -0.5)])
            return _Shape(
                (*ears, _ellipse(0, 0.17, 0.9, 0.75)), details=(*eye, *pupil, nose, *whiskers), top=(0, -0.52), includes_face=True
            )
        case "car":
            wheels = [(_ellipse(x, 0.48, 0.26, 0.26), _INK) for x in (-0.52, 0.52)]
            hubs = [(_ellipse(x, 0.48, 0.11, 0.11), (190, 190, 195)) for x in (-0.52, 0.52)]
            panes = (
                [(-0.42, -0.13), (-0.3, -0.42), (-0.04, -0.42), (-0.04, -0.13)],
                [(0.08, -0.13), (0.08, -0.42), (0.3, -0.42), (0.46, -0.13)],
            )
            cabin = [(-0.62, -0.05), (-0.42, -0.56), (0.42, -0.56), (0.66, -0.05)]
            hull = [(-1, 0.0), (-0.62, -0.1), (0.66, -0.1), (1, 0.08), (1, 0.5), (-1, 0.5)]
            return _Shape((cabin, hull), details=(*wheels, *hubs, *((p, _GLASS) for p in panes)), top=(0, -0.56), face=(0, 0.15))
        case "mushroom":
            stem = [(-0.28, 0), (0.28, 0), (0.36, 0.95), (-0.36, 0.95)]
            return _Shape((_ellipse(0, 0.12, 0.98, 1.02, 180, 360),), behind=((stem, _CREAM),), face=(0, 0.5))
        case "flower":
            petals = tuple(
                _ellipse(0.52 * math.cos(a), -0.3 + 0.52 * math.sin(a), 0.34, 0.34) for a in (2 * math.pi * i / 6 for i in range(6))
            )
            stalk = ((_rectangle(-0.06, 0.2, 0.06, 1), (60, 130, 60)), (_ellipse(0.3, 0.72, 0.28, 0.12), (60, 130, 60)))
            return _Shape(
                (*petals, _ellipse(0, -0.3, 0.5, 0.5)),
                behind=stalk,
                details=((_ellipse(0, -0.3, 0.26, 0.26), (250, 205, 60)),),
                top=(0, -1.0),
                face=(0, -0.3),
            )
        case _:
            hull = [(-0.95, 0.4), (0.95, 0.4), (0.62, 0.92), (-0.62, 0.92)]
            sails = ([(-0.06, -0.95), (-0.06, 0.22), (-0.8, 0.22)], [(0.1, -0.8), (0.1, 0.22), (0.75, 0.22)])
            return _Shape((hull, *sails), behind=((_rectangle(-0.06, -1, 0.1, 0.45), (105, 70, 45)),), top=(0.02, -0.92), face=(0, 0.64))


_HATS: dict[str, tuple[Points, ...]] = {
    "hat": (_rectangle(-0.42, -0.08, 0.42, 0.06), _rectangle(-0.26, -0.5, 0.26, -0.05)),
    "crown": ([(-0.36, 0.06), (-0.42, -0.42), (-0.18, -0.16), (0, -0.48), (0.18, -0.16), (0.42, -0.42), (0.36, 0.06)],),
    "bow": ([(0, -0.1), (-0.44, -0.36), (-0.44, 0.16)], [(0, -0.1), (0.44, -0.36), (0.44, 0.16)], _rectangle(-0.11, -0.22, 0.11, 0.02)),
}
_HAT_COLORS: dict[str, Color] = {"hat": (45, 42, 60), "crown": (255, 200, 40), "bow": (225, 50, 110)}


# --------------------------------------------------------------------------------------------------------- rendering


class _ObjectTransform:
    """Maps object coordinates to pixels of the supersampled canvas."""

    def __init__(self, subject: Subject, scene: Scene):
        self.half = scene.size / 2 * _SUPERSAMPLING  # pixels per object unit
        a = math.radians(scene.tilt)
        width = self.half * subject.stretch * (-1 if scene.flip else 1)
        self.m = (width * math.cos(a), -self.half * math.sin(a), width * math.sin(a), self.half * math.cos(a))
        self.x, self.y = scene.x * _SUPERSAMPLING, scene.y * _SUPERSAMPLING

    def __call__(self, points: Points, dx: float = 0, dy: float = 0) -> Points:
        a, b, c, d = self.m
        x, y = self.x + a * dx + b * dy, self.y + c * dx + d * dy
        return [(a * px + b * py + x, c * px + d * py + y) for px, py in points]


def render(subject: Subject, scene: Scene) -> Image.Image:
    """The image of a subject in a scene: RGB, SIZE × SIZE."""
    side = SIZE * _SUPERSAMPLING
    canvas = _render_background(scene.background, scene.seed % _VIEWS_PER_BACKGROUND).copy()
    pen = ImageDraw.Draw(canvas)
    transform, shape = _ObjectTransform(subject, scene), _build_shape(subject.category)
    for points, color in shape.behind:
        pen.polygon(transform(points), fill=color)
    mask = Image.new("1", (side, side))
    stencil = ImageDraw.Draw(mask)
    for points in shape.body:
        stencil.polygon(transform(points), fill=1)
    if subject.outline:
        for points in shape.body:
            outline = transform(points)
            joint = "curve" if len(points) < 14 else None  # slow, and not visible on a finely divided curve
            pen.line([*outline, outline[0], outline[1]], fill=_INK, width=4 * _SUPERSAMPLING, joint=joint)
    canvas.paste(subject.color_rgb if subject.pattern == "plain" else _render_pattern(subject, transform), (0, 0, side, side), mask)
    for points, color in shape.details:
        pen.polygon(transform(points), fill=color)
    if subject.face and not shape.includes_face:
        _draw_face(pen, transform, shape.face)
    if subject.accessory != "none":
        for points in _HATS[subject.accessory]:
            pen.polygon(transform(points, *shape.top), fill=_HAT_COLORS[subject.accessory])
    for points, color in _occluder_polygons(scene):
        pen.polygon(points, fill=color)
    light = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) * np.asarray(scene.tint, dtype=np.float32)
    return Image.fromarray(np.minimum(light, 255).astype(np.uint8))


def render_silhouette(subject: Subject, scene: Scene) -> Image.Image:
    """The visible part of the subject: L, SIZE × SIZE, 255 inside, without occluded parts."""
    mask = Image.new("L", (SIZE * _SUPERSAMPLING,) * 2)
    pen = ImageDraw.Draw(mask)
    transform, shape = _ObjectTransform(subject, scene), _build_shape(subject.category)
    parts = [*shape.body, *(p for p, _ in shape.behind), *(p for p, _ in shape.details)]
    for points in parts:
        pen.polygon(transform(points), fill=255)
    if subject.accessory != "none":
        for points in _HATS[subject.accessory]:
            pen.polygon(transform(points, *shape.top), fill=255)
    for points, _ in _occluder_polygons(scene):
        pen.polygon(points, fill=0)
    return mask.reduce(_SUPERSAMPLING)


def render_edges(subject: Subject, scene: Scene) -> Image.Image:
    """The contour of the silhouette: L, SIZE × SIZE, 255 on the contour."""
    return render_silhouette(subject, scene).filter(ImageFilter.FIND_EDGES).point([255 * (v > 60) for v in range(256)])


def _render_pattern(subject: Subject, transform: _ObjectTransform) -> Image.Image:
    """The pattern in object coordinates: the second color on the main color, covering less than half of it."""
    layer = Image.new("RGB", (SIZE * _SUPERSAMPLING,) * 2, subject.color_rgb)
    pen = ImageDraw.Draw(layer)
    n = math.ceil(1.1 / subject.period)
    lines = [i * subject.period for i in range(-n, n + 1)]
    if subject.pattern == "striped":
        half = 0.19 * subject.period
        for at in lines:
            strip = _rectangle(at - half, -1.2, at + half, 1.2) if subject.upright else _rectangle(-1.2, at - half, 1.2, at + half)
            pen.polygon(transform(strip), fill=subject.second_color_rgb)
    elif subject.pattern == "checked":  # a window-pane check: crossing lines
        half = 0.12 * subject.period
        for at in lines:
            pen.polygon(transform(_rectangle(at - half, -1.2, at + half, 1.2)), fill=subject.second_color_rgb)
            pen.polygon(transform(_rectangle(-1.2, at - half, 1.2, at + half)), fill=subject.second_color_rgb)
    elif subject.pattern == "dotted":
        radius = 0.31 * subject.period * transform.half
        for j, row in enumerate(lines):
            for x, y in transform([(at + 0.5 * subject.period * (j % 2), row) for at in lines]):
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=subject.second_color_rgb)
    return layer


def _draw_face(pen: ImageDraw.ImageDraw, transform: _ObjectTransform, center: tuple[float, float]) -> None:
    for side in (-1, 1):
        pen.polygon(transform(_ellipse(side * 0.19, -0.05, 0.13, 0.15, n=16), *center), fill=(252, 252, 252))
        pen.polygon(transform(_ellipse(side * 0.19, -0.03, 0.07, 0.09, n=12), *center), fill=_INK)
    smile = _ellipse(0, 0.14, 0.2, 0.14, 0, 180, n=10)
    pen.polygon(transform(smile, *center), fill=_INK)


def _occluder_polygons(scene: Scene) -> list[tuple[Points, Color]]:
    side = SIZE * _SUPERSAMPLING
    r = random.Random(scene.seed)
    if scene.cover == "low":
        top = [(side * i / 8, side * (0.88 + r.uniform(-0.03, 0.03))) for i in range(9)]
        return [([*top, (side, side), (0, side)], (60, 95, 55))]
    if scene.cover == "post":
        x = side * (r.uniform(0.08, 0.2) if r.random() < 0.5 else r.uniform(0.8, 0.92))
        return [(_rectangle(x - 0.045 * side, 0, x + 0.045 * side, side), (96, 84, 78))]
    return []


@cache
def _render_background(name: str, variant: int) -> Image.Image:
    """One view of a background on the supersampled canvas."""
    side = SIZE * _SUPERSAMPLING
    r = random.Random(f"{name} {variant}")
    plain = {"white": (247, 246, 244), "grey": (158, 160, 163)}
    sky = {"night": (22, 26, 66), "snow": (178, 200, 226), "beach": (150, 208, 240), "meadow": (165, 215, 245)}
    sky |= {"desert": (250, 190, 120), "city": (196, 188, 205)}
    image = Image.new("RGB", (side, side), {**plain, **sky}[name])
    pen = ImageDraw.Draw(image)
    horizon = side * r.uniform(0.6, 0.72)

    def spots(n: int, low: float, high: float, radius: float, color: Color) -> None:
        for _ in range(n):
            x, y, q = r.uniform(0, side), r.uniform(low, high) * side, radius * r.uniform(0.8, 1.3) * _SUPERSAMPLING
            pen.ellipse((x - q, y - q, x + q, y + q), fill=color)

    if name == "night":
        spots(26, 0, 1, 0.8, (240, 240, 215))
        spots(1, 0.1, 0.2, 4.5, (244, 238, 190))
    elif name == "snow":
        pen.rectangle((0, horizon, side, side), fill=(240, 244, 250))
        spots(40, 0, 1, 0.9, (255, 255, 255))
    elif name == "beach":
        pen.rectangle((0, horizon - 0.16 * side, side, side), fill=(40, 130, 190))
        pen.rectangle((0, horizon, side, side), fill=(238, 214, 160))
    elif name == "meadow":
        pen.rectangle((0, horizon, side, side), fill=(126, 190, 84))
        spots(16, horizon / side + 0.05, 1, 0.9, (250, 245, 170))
        spots(3, 0.08, 0.25, 4, (250, 252, 255))
    elif name == "desert":
        spots(1, 0.1, 0.25, 6, (255, 236, 170))
        hill = [(side * i / 12, horizon + 0.05 * side * math.sin(i * 0.9 + variant)) for i in range(13)]
        pen.polygon([*hill, (side, side), (0, side)], fill=(206, 128, 78))
    elif name == "city":
        x = 0.0
        while x < side:
            width, top = side * r.uniform(0.1, 0.18), side * r.uniform(0.12, 0.5)
            pen.rectangle((x, top, x + width, side), fill=(104 + round(r.uniform(-10, 10)), 108, 128))
            for wy in range(int(top) + 9, int(horizon), 18):
                pen.rectangle((x + 0.3 * width, wy, x + 0.6 * width, wy + 7), fill=(246, 228, 150))
            x += width + 0.02 * side
        pen.rectangle((0, horizon + 0.08 * side, side, side), fill=(74, 74, 82))
    return image
