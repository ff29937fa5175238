"""Mini beside everything else that a picture is drawn with: structure, a picture to draw into or to begin with, regions.

Everything goes through `generate`, picture by picture, as a user would do it; the judges say what came of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imprompt.config import Generate
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.report import Line, plotted
from imprompt.generation.generate import draw
from imprompt.mini import world
from imprompt.mini.judge import Case, Judge, agreement
from imprompt.utils.files import atomic_path
from imprompt.utils.images import sheet

SCALE = 0.8  # of the image where text says the kind: by `mini judge --task image-text` kind and look are both right most often there
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SHOWN = 6  # rows of a sheet
LOOK = {"colour": "colour (image)", "pattern": "pattern (image)"}


@dataclass
class Doors:
    """The tasks, each giving its figures. Sheets, and what `generate` is given as files, go to `folder`."""

    prompts: Sequence[Case]
    folder: Path
    settings: Generate  # steps, scheduler, guidance
    say: Callable[[str, int, int], None]
    judge: Judge

    def edges(self) -> dict[str, float]:
        """A ControlNet says the shape, another subject's picture the look."""
        return self._structure("edges", world.edges)

    def silhouette(self) -> dict[str, float]:
        """The same with a T2I-Adapter."""
        return self._structure("silhouette", world.silhouette)

    def _structure(self, kind: str, shown: Callable[[world.Subject, world.Scene], Image.Image]) -> dict[str, float]:
        structure = [shown(c.subject, c.scene) for c in self.prompts]
        control = [f"{kind}={path}" for path in self._files(kind, structure)]
        looks = [self._other(i) for i in range(len(self.prompts))]
        photos = self._files("look", [look.photo for look in looks])
        texts = [f"a {c.subject.kind}" for c in self.prompts]
        shape = [{"prompt": text, "control": (word,)} for text, word in zip(texts, control, strict=True)]
        look = [{"prompt": text, "image": (photo,), "scale": SCALE} for text, photo in zip(texts, photos, strict=True)]
        alone = self._draw(f"{kind} alone", shape)
        both = self._draw(f"{kind} and image", [a | b for a, b in zip(shape, look, strict=True)])
        free = self._draw(f"{kind}, image alone", look)
        self._sheet(kind, structure, [look.photo for look in looks], alone, both, free)
        truth = [world.silhouette(c.subject, c.scene) for c in self.prompts]
        overlap = {
            "IoU, without image": self._overlap(alone, truth),
            "IoU, with image": self._overlap(both, truth),
            "IoU, image without structure": self._overlap(free, truth),
        }
        overlap["IoU, with ÷ without"] = overlap["IoU, with image"] / overlap["IoU, without image"]
        return overlap | self._read(both, {"kind": "kind (text)"} | LOOK | {"background": "background (image)"}, self.prompts, looks)

    def inpaint(self) -> dict[str, float]:
        """Another subject drawn into a photograph, in place of its own."""
        photos = [c.photo for c in self.prompts]
        masks = [_box(world.silhouette(c.subject, c.scene)) for c in self.prompts]
        looks = [self._other(i) for i in range(len(self.prompts))]
        into, where, look = self._files("photo", photos), self._files("mask", masks), self._files("look", [x.photo for x in looks])
        given = zip(into, where, look, looks, strict=True)
        drawn = self._draw("inpaint", [{"inpaint": p, "mask": m, "image": (x,), "prompt": f"a {c.subject.kind}"} for p, m, x, c in given])
        self._sheet("inpaint", photos, masks, [x.photo for x in looks], drawn)
        changed = [
            float(np.abs(np.asarray(d, float) - np.asarray(p, float))[np.asarray(m) == 0].max(initial=0))
            for d, p, m in zip(drawn, photos, masks, strict=True)
        ]
        return {"outside changed by": max(changed)} | self._read(drawn, {"kind": "kind (image)"} | LOOK, looks, looks)

    def img2img(self) -> dict[str, float]:
        """From a photograph towards another subject's picture, farther and farther."""
        photos, looks = [c.photo for c in self.prompts], [self._other(i).photo for i in range(len(self.prompts))]
        begin, towards = self._files("photo", photos), self._files("look", looks)
        own, other = self.judge.image_embeddings(photos), self.judge.image_embeddings(looks)
        found, columns = dict[str, float](), [photos, looks]
        for strength in STRENGTHS:
            given = [{"init": b, "strength": strength, "image": (t,)} for b, t in zip(begin, towards, strict=True)]
            drawn = self._draw(f"img2img {strength}", given)
            seen = self.judge.image_embeddings(drawn)
            found[f"CLIP-I to the beginning, strength {strength}"] = float((seen * own).sum(1).mean())
            found[f"CLIP-I to the image, strength {strength}"] = float((seen * other).sum(1).mean())
            columns.append(drawn)
        self._sheet("img2img", *columns)
        return found

    def regions(self) -> dict[str, float]:
        """Two references, each in its half of a picture twice as wide; edges say where the subjects are. And without edges: mini has
        only ever seen one subject in a picture.
        """
        pairs = [(case, self._other(i)) for i, case in enumerate(self.prompts)]
        left, right = (self._files(f"reference-{n}", [pair[n].photo for pair in pairs]) for n in range(2))
        halves = [_side_by_side([Image.new("L", (world.SIZE,) * 2, 255 * (m == n)) for m in range(2)]) for n in range(2)]
        edges = [_side_by_side([world.edges(c.subject, c.scene) for c in pair]) for pair in pairs]
        where, control = self._files("half", halves), self._files("edges", edges)
        size = f"{2 * world.SIZE}x{world.SIZE}"
        given: list[dict[str, Any]] = [
            {"image": (a,), "region": where[0], "also": (f"image={b},region={where[1]}",), "size": size}
            for a, b in zip(left, right, strict=True)
        ]
        drawn = self._draw("regions", [each | {"control": (f"edges={path}",)} for each, path in zip(given, control, strict=True)])
        free = self._draw("regions without edges", given)
        self._sheet("regions", *([pair[n].photo for pair in pairs] for n in range(2)), drawn, free)
        everyone = [pair[n] for n in range(2) for pair in pairs]
        names = {name: name for name in ("kind", "colour", "pattern", "background")}
        without = self._read(_crops(free), names, everyone, everyone)
        return self._read(_crops(drawn), names, everyone, everyone) | {f"{name}, without edges": v for name, v in without.items()}

    def _other(self, i: int) -> Case:
        """Another prompt, of another kind."""
        mine = self.prompts[i].subject.kind
        after = (self.prompts[(i + n) % len(self.prompts)] for n in range(1, len(self.prompts)))
        return next((c for c in after if c.subject.kind != mine), self.prompts[i])

    def _files(self, name: str, images: Sequence[Image.Image]) -> list[str]:
        folder = self.folder / "given"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [str(folder / f"{name}-{i}.png") for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        return paths

    def _draw(self, task: str, given: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
        """A picture for each, with a seed of its own."""
        drawn = []
        for i, more in enumerate(given):
            drawn.append(draw(replace(self.settings, seed=i, count=1, **more))[0].image)
            self.say(task, i + 1, len(given))
        return drawn

    def _overlap(self, drawn: Sequence[Image.Image], truth: Sequence[Image.Image]) -> float:
        """Mean intersection over union of the silhouettes."""
        found = self.judge.silhouettes(drawn)
        wanted = np.stack([np.asarray(t) > 127 for t in truth])
        return float(((found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2)).clip(1)).mean())

    def _read(self, drawn: Sequence[Image.Image], names: dict[str, str], kinds: Sequence[Case], looks: Sequence[Case]) -> dict[str, float]:
        """The share of pictures in which each attribute is as it should be: the kind of some prompts, the look of others."""
        seen = [{names[k]: row[k] for k in names} for row in self.judge.read(drawn)]
        wanted = [look.truth | {"kind": kind.subject.kind} for kind, look in zip(kinds, looks, strict=True)]
        return agreement(seen, [{names[k]: row[k] for k in names} for row in wanted], "all")

    def _sheet(self, name: str, *columns: Sequence[Image.Image]) -> None:
        rows = [image for row in list(zip(*columns, strict=True))[:SHOWN] for image in row]
        with atomic_path(self.folder / f"{name}.png") as partial:
            sheet([], rows, len(columns), 128).save(partial)


def shares(curve: Mapping[float, Mapping[str, float]], prompts: int) -> bytes:
    """The curve of λ where text says another kind than the image shows, as a PNG."""

    def line(name: str, spread: bool) -> Line:
        half = {x: 1.96 * math.sqrt(v[name] * (1 - v[name]) / prompts) if spread else 0.0 for x, v in curve.items()}
        return [(x, Interval(v[name], v[name] - half[x], v[name] + half[x])) for x, v in sorted(curve.items())]

    said = ("kind (text)", "look (image)", "background (image)", "all three")
    panels = {"share of pictures": {name: line(name, True) for name in said}}
    panels["cosine"] = {name: line(name, False) for name in ("CLIP-I", "CLIP-T")}
    return plotted(panels, "λ, the weight of the image")


def _box(silhouette: Image.Image, margin: int = 4) -> Image.Image:
    """White in the rectangle around a silhouette."""
    left, top, right, bottom = silhouette.getbbox() or (0, 0, *silhouette.size)
    mask = Image.new("L", silhouette.size)
    mask.paste(255, (max(0, left - margin), max(0, top - margin), right + margin, bottom + margin))
    return mask


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    page = Image.new(images[0].mode, (world.SIZE * len(images), world.SIZE))
    for n, image in enumerate(images):
        page.paste(image, (n * world.SIZE, 0))
    return page


def _crops(pages: Sequence[Image.Image]) -> list[Image.Image]:
    """The left halves, and then the right ones."""
    return [page.crop((n * world.SIZE, 0, (n + 1) * world.SIZE, world.SIZE)) for n in range(2) for page in pages]
