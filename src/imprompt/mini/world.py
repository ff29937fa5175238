"""The world that mini is trained on: subjects with a personal look, photographed in scenes.

A *subject* is a kind with a personal look; a *scene* is everything that changes from one photograph to the next.
Both follow from a seed alone, so every parameter of every picture is known: the judge learns them, silhouettes and
edges exist for structure control, and a training set is a range of integers. Pillow and numpy only.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels, width and height of every picture
_FINE = 3  # pictures are drawn this many times larger and reduced: antialiasing
_VIEWS = 12  # of each background

KINDS = ("star", "heart", "house", "tree", "fish", "cat", "car", "mushroom", "flower", "boat")
PATTERNS = ("plain", "striped", "dotted", "checked")
ACCESSORIES = ("none", "hat", "crown", "bow")
BACKGROUNDS = ("white", "grey", "night", "snow", "beach", "meadow", "desert", "city")

Colour = tuple[int, int, int]
PALETTE: dict[str, Colour] = {
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
COLOURS = tuple(name for name in PALETTE if name not in ("white", "black"))  # main colours; the two serve as second

_HELD_OUT_FROM = 1_000_000  # seeds of held-out subjects start here
HELD_OUT_SCENES = 20_000_000  # and those of the scenes that they are shown in
_INK, _CREAM, _GLASS = (40, 34, 38), (240, 226, 200), (205, 230, 245)


@dataclass(frozen=True)
class Subject:
    """What stays the same in every photograph of one subject."""

    seed: int
    kind: str
    colour: str
    main: Colour  # the exact shade of `colour`
    second_colour: str
    second: Colour
    pattern: str
    period: float  # of the pattern, in object units (the object spans 2)
    upright: bool  # direction of stripes
    outline: bool
    face: bool
    accessory: str
    stretch: float  # width / height


@dataclass(frozen=True)
class Scene:
    """What changes from one photograph to the next."""

    seed: int
    background: str
    x: float  # centre, in pixels of a SIZE × SIZE picture
    y: float
    size: float  # height of the object in pixels
    tilt: float  # degrees
    flip: bool
    tint: tuple[float, float, float]  # gain of red, green, blue, brightness included
    cover: str  # what stands in front: "none", "low" or "post"


# ---------------------------------------------------------------------------------------------- subjects and scenes


def subject(seed: int) -> Subject:
    """The subject of this seed."""
    r = random.Random(f"subject {seed}")
    colour = r.choice(COLOURS)
    second = r.choice(_contrasting(colour))
    return Subject(
        seed=seed,
        kind=r.choice(KINDS),
        colour=colour,
        main=_shade(colour, r),
        second_colour=second,
        second=_shade(second, r),
        pattern=r.choice(PATTERNS),
        period=r.uniform(0.56, 0.68),
        upright=r.random() < 0.5,
        outline=r.random() < 0.5,
        face=r.random() < 0.25,
        accessory=r.choice(ACCESSORIES) if r.random() < 0.3 else "none",
        stretch=r.uniform(0.95, 1.05),
    )


def scene(seed: int) -> Scene:
    """The scene of this seed."""
    r = random.Random(f"scene {seed}")
    size = r.uniform(45, 50)
    light = r.uniform(0.86, 1.05)
    warmth = r.uniform(-0.05, 0.05)
    off = 12 if r.random() < 0.06 else 2.5  # now and then the frame crops the subject
    return Scene(
        seed=seed,
        background=r.choice(BACKGROUNDS),
        x=SIZE / 2 + r.uniform(-off, off),
        y=SIZE / 2 + 2 + r.uniform(-0.7 * off, 0.7 * off),
        size=size,
        tilt=r.uniform(-6, 6),
        flip=r.random() < 0.5,
        tint=(light * (1 + warmth), light, light * (1 - warmth)),
        cover=r.choice(("low", "post")) if r.random() < 0.08 else "none",
    )


def combination_held_out(s: Subject) -> bool:
    """Whether no training picture shows this kind in this colour with this pattern.

    One colour in nine for every kind and pattern, so that prompts taken from what is held out are balanced.
    """
    kind, colour, pattern = KINDS.index(s.kind), COLOURS.index(s.colour), PATTERNS.index(s.pattern)
    return colour == (kind + 2 * pattern) % len(COLOURS)


def subjects(held_out: bool = False) -> Iterator[Subject]:
    """The subjects of a split, without end. Held-out ones are new themselves and in a combination never trained on."""
    seed = _HELD_OUT_FROM if held_out else 0
    while True:
        found = subject(seed)
        if combination_held_out(found) == held_out:
            yield found
        seed += 1


@cache
def _contrasting(colour: str) -> tuple[str, ...]:
    """Second colours that stand out on `colour`: far enough in brightness for a pattern to show."""
    return tuple(name for name in PALETTE if abs(_luma(PALETTE[name]) - _luma(PALETTE[colour])) > 60)


def _luma(c: Colour) -> float:
    return 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]


def _shade(name: str, r: random.Random) -> Colour:
    gain = r.uniform(0.93, 1.05)
    return _clip(*(gain * v + r.uniform(-13, 13) for v in PALETTE[name]))


def _clip(*values: float) -> Colour:
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


def caption(s: Subject, where: Scene, rng: random.Random, keep: float = 0.75) -> str:
    """A descriptive caption: the kind and a random subset of the attributes, each kept with probability `keep`."""
    words = [rng.choice(_PREFIXES) + "a"]
    ending = []
    if rng.random() < keep:
        words.append(s.colour)
    if rng.random() < keep:
        if s.pattern != "plain" and rng.random() < 0.5:
            ending.append(f"with {s.second_colour} {_NOUNS[s.pattern]}")
        else:
            words.append(s.pattern)
    words.append(s.kind)
    if s.accessory != "none" and rng.random() < keep:
        ending.append(f"with a {s.accessory}")
    if s.face and rng.random() < 0.5 * keep:
        ending.append("with a face")
    if rng.random() < keep:
        ending.append(rng.choice(_PLACES[where.background]))
    return " ".join(words + ending).replace("a orange", "an orange")


def photo_caption(s: Subject, where: Scene, rng: random.Random) -> str:
    """A photographic caption: the kind and the scene, nothing of the look."""
    return f"{rng.choice(_PREFIXES)}a {s.kind} {rng.choice(_PLACES[where.background])}"


def full_caption(s: Subject, where: Scene) -> str:
    """The four judged attributes, in one fixed wording: the prompts of the evaluation."""
    article = "an" if s.colour[0] in "aeiou" else "a"
    return f"{article} {s.colour} {s.pattern} {s.kind} {_PLACES[where.background][0]}"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain, sorted; a few more that users type."""
    phrases = [*_PREFIXES, *(p for places in _PLACES.values() for p in places), *_NOUNS.values()]
    extra = "a an and of with the in on at to by wearing very big small beautiful best high quality bad low face pattern"
    names = [*KINDS, *PALETTE, *PATTERNS, *ACCESSORIES, *BACKGROUNDS]
    return tuple(sorted({word for phrase in [*phrases, *names, extra] for word in phrase.split()}))


# ------------------------------------------------------------------------------------------------------------ shapes

Points = list[tuple[float, float]]


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0, end: float = 360, n: int = 28) -> Points:
    angles = (math.radians(start + (end - start) * i / (n - 1)) for i in range(n))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


@dataclass(frozen=True)
class _Shape:
    """A kind, in a square of −1 … 1 with y downwards: what is behind, the patterned body, what is painted on it."""

    body: tuple[Points, ...]
    behind: tuple[tuple[Points, Colour], ...] = ()
    details: tuple[tuple[Points, Colour], ...] = ()
    top: tuple[float, float] = (0, -0.9)  # where an accessory sits
    face: tuple[float, float] = (0, 0)
    own_eyes: bool = False  # the kind always has eyes


@cache
def _shape(kind: str) -> _Shape:
    match kind:
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
                (_box(-0.72, -0.2, 0.72, 0.95), [(-1, -0.15), (0, -1), (1, -0.15)]),
                behind=((_box(0.4, -0.95, 0.65, -0.3), (110, 80, 75)),),
                details=(
                    (_box(-0.2, 0.35, 0.2, 0.95), _INK),
                    (_box(0.32, 0.05, 0.6, 0.33), _GLASS),
                    (_box(-0.6, 0.05, -0.32, 0.33), _GLASS),
                ),
                face=(0, -0.45),
            )
        case "tree":
            tiers = (
                [(-0.85, 0.62), (0, -0.3), (0.85, 0.62)],
                [(-0.68, 0.15), (0, -0.7), (0.68, 0.15)],
                [(-0.5, -0.3), (0, -1), (0.5, -0.3)],
            )
            return _Shape(tiers, behind=((_box(-0.16, 0.5, 0.16, 1), (105, 70, 45)),), face=(0, 0.2))
        case "fish":
            return _Shape(
                (_ellipse(-0.15, 0, 0.82, 0.58), [(0.5, 0), (1, -0.5), (0.9, 0), (1, 0.5)], [(-0.3, -0.45), (0.05, -0.85), (0.3, -0.4)]),
                details=((_ellipse(-0.6, -0.12, 0.15, 0.15), (250, 250, 250)), (_ellipse(-0.63, -0.12, 0.08, 0.08), _INK)),
                top=(-0.3, -0.55), own_eyes=True,
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
            return _Shape((*ears, _ellipse(0, 0.17, 0.9, 0.75)), details=(*eye, *pupil, nose, *whiskers), top=(0, -0.52), own_eyes=True)
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
            stalk = ((_box(-0.06, 0.2, 0.06, 1), (60, 130, 60)), (_ellipse(0.3, 0.72, 0.28, 0.12), (60, 130, 60)))
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
            return _Shape((hull, *sails), behind=((_box(-0.06, -1, 0.1, 0.45), (105, 70, 45)),), top=(0.02, -0.92), face=(0, 0.64))


_HATS: dict[str, tuple[Points, ...]] = {
    "hat": (_box(-0.42, -0.08, 0.42, 0.06), _box(-0.26, -0.5, 0.26, -0.05)),
    "crown": ([(-0.36, 0.06), (-0.42, -0.42), (-0.18, -0.16), (0, -0.48), (0.18, -0.16), (0.42, -0.42), (0.36, 0.06)],),
    "bow": ([(0, -0.1), (-0.44, -0.36), (-0.44, 0.16)], [(0, -0.1), (0.44, -0.36), (0.44, 0.16)], _box(-0.11, -0.22, 0.11, 0.02)),
}
_HAT_COLOURS: dict[str, Colour] = {"hat": (45, 42, 60), "crown": (255, 200, 40), "bow": (225, 50, 110)}


# ----------------------------------------------------------------------------------------------------------- drawing


class _Frame:
    """Maps object coordinates to pixels of the fine canvas."""

    def __init__(self, s: Subject, where: Scene):
        self.half = where.size / 2 * _FINE  # pixels in one object unit
        a = math.radians(where.tilt)
        width = self.half * s.stretch * (-1 if where.flip else 1)
        self.m = (width * math.cos(a), -self.half * math.sin(a), width * math.sin(a), self.half * math.cos(a))
        self.x, self.y = where.x * _FINE, where.y * _FINE

    def __call__(self, points: Points, dx: float = 0, dy: float = 0) -> Points:
        a, b, c, d = self.m
        x, y = self.x + a * dx + b * dy, self.y + c * dx + d * dy
        return [(a * px + b * py + x, c * px + d * py + y) for px, py in points]


def draw(s: Subject, where: Scene) -> Image.Image:
    """The photograph of a subject in a scene: RGB, SIZE × SIZE."""
    side = SIZE * _FINE
    canvas = _background(where.background, where.seed % _VIEWS).copy()
    pen = ImageDraw.Draw(canvas)
    frame, shape = _Frame(s, where), _shape(s.kind)
    for points, colour in shape.behind:
        pen.polygon(frame(points), fill=colour)
    mask = Image.new("1", (side, side))
    stencil = ImageDraw.Draw(mask)
    for points in shape.body:
        stencil.polygon(frame(points), fill=1)
    if s.outline:
        for points in shape.body:
            placed = frame(points)
            joint = "curve" if len(points) < 14 else None  # slow, and a finely divided curve does not need it
            pen.line([*placed, placed[0], placed[1]], fill=_INK, width=4 * _FINE, joint=joint)
    canvas.paste(s.main if s.pattern == "plain" else _texture(s, frame), (0, 0, side, side), mask)
    for points, colour in shape.details:
        pen.polygon(frame(points), fill=colour)
    if s.face and not shape.own_eyes:
        _draw_face(pen, frame, shape.face)
    if s.accessory != "none":
        for points in _HATS[s.accessory]:
            pen.polygon(frame(points, *shape.top), fill=_HAT_COLOURS[s.accessory])
    for points, colour in _cover(where):
        pen.polygon(points, fill=colour)
    light = np.asarray(canvas.reduce(_FINE), dtype=np.float32) * np.asarray(where.tint, dtype=np.float32)
    return Image.fromarray(np.minimum(light, 255).astype(np.uint8))


def silhouette(s: Subject, where: Scene) -> Image.Image:
    """Where the subject is visible: L, SIZE × SIZE, 255 inside. What covers it is left out."""
    mask = Image.new("L", (SIZE * _FINE,) * 2)
    pen = ImageDraw.Draw(mask)
    frame, shape = _Frame(s, where), _shape(s.kind)
    parts = [*shape.body, *(p for p, _ in shape.behind), *(p for p, _ in shape.details)]
    for points in parts:
        pen.polygon(frame(points), fill=255)
    if s.accessory != "none":
        for points in _HATS[s.accessory]:
            pen.polygon(frame(points, *shape.top), fill=255)
    for points, _ in _cover(where):
        pen.polygon(points, fill=0)
    return mask.reduce(_FINE)


def edges(s: Subject, where: Scene) -> Image.Image:
    """The contour of the silhouette: L, SIZE × SIZE, 255 on the line."""
    return silhouette(s, where).filter(ImageFilter.FIND_EDGES).point([255 * (v > 60) for v in range(256)])


def _texture(s: Subject, frame: _Frame) -> Image.Image:
    """The main colour with the pattern in the second one, fixed to the object. The second covers less than half."""
    layer = Image.new("RGB", (SIZE * _FINE,) * 2, s.main)
    pen = ImageDraw.Draw(layer)
    n = math.ceil(1.1 / s.period)
    lines = [i * s.period for i in range(-n, n + 1)]
    if s.pattern == "striped":
        half = 0.19 * s.period
        for at in lines:
            strip = _box(at - half, -1.2, at + half, 1.2) if s.upright else _box(-1.2, at - half, 1.2, at + half)
            pen.polygon(frame(strip), fill=s.second)
    elif s.pattern == "checked":  # a window-pane check: crossing lines
        half = 0.12 * s.period
        for at in lines:
            pen.polygon(frame(_box(at - half, -1.2, at + half, 1.2)), fill=s.second)
            pen.polygon(frame(_box(-1.2, at - half, 1.2, at + half)), fill=s.second)
    elif s.pattern == "dotted":
        radius = 0.31 * s.period * frame.half
        for j, row in enumerate(lines):
            for x, y in frame([(at + 0.5 * s.period * (j % 2), row) for at in lines]):
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=s.second)
    return layer


def _draw_face(pen: ImageDraw.ImageDraw, frame: _Frame, at: tuple[float, float]) -> None:
    for side in (-1, 1):
        pen.polygon(frame(_ellipse(side * 0.19, -0.05, 0.13, 0.15, n=16), *at), fill=(252, 252, 252))
        pen.polygon(frame(_ellipse(side * 0.19, -0.03, 0.07, 0.09, n=12), *at), fill=_INK)
    smile = _ellipse(0, 0.14, 0.2, 0.14, 0, 180, n=10)
    pen.polygon(frame(smile, *at), fill=_INK)


def _cover(where: Scene) -> list[tuple[Points, Colour]]:
    side = SIZE * _FINE
    r = random.Random(where.seed)
    if where.cover == "low":
        top = [(side * i / 8, side * (0.88 + r.uniform(-0.03, 0.03))) for i in range(9)]
        return [([*top, (side, side), (0, side)], (60, 95, 55))]
    if where.cover == "post":
        x = side * (r.uniform(0.08, 0.2) if r.random() < 0.5 else r.uniform(0.8, 0.92))
        return [(_box(x - 0.045 * side, 0, x + 0.045 * side, side), (96, 84, 78))]
    return []


@cache
def _background(name: str, variant: int) -> Image.Image:
    """One of the views of a place, on the fine canvas."""
    side = SIZE * _FINE
    r = random.Random(f"{name} {variant}")
    plain = {"white": (247, 246, 244), "grey": (158, 160, 163)}
    sky = {"night": (22, 26, 66), "snow": (178, 200, 226), "beach": (150, 208, 240), "meadow": (165, 215, 245)}
    sky |= {"desert": (250, 190, 120), "city": (196, 188, 205)}
    image = Image.new("RGB", (side, side), {**plain, **sky}[name])
    pen = ImageDraw.Draw(image)
    horizon = side * r.uniform(0.6, 0.72)

    def spots(n: int, low: float, high: float, radius: float, colour: Colour) -> None:
        for _ in range(n):
            x, y, q = r.uniform(0, side), r.uniform(low, high) * side, radius * r.uniform(0.8, 1.3) * _FINE
            pen.ellipse((x - q, y - q, x + q, y + q), fill=colour)

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
