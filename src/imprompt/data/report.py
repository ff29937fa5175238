"""What is in the data, found in one pass: counts, what cannot be read, sizes, captions, duplicates, samples."""

import hashlib
import html
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from imprompt.data.loader import UNREADABLE, ahead, name_of
from imprompt.data.readers import Shards, open_data
from imprompt.data.records import Counted, Record
from imprompt.data.sampler import once
from imprompt.errors import brief
from imprompt.utils.html import inline, table, write_page
from imprompt.utils.images import open_image, sheet

NAMED = 1000  # records of each fault that are named in the report
SAMPLES = 24
LONG = 60  # words; about the 77 tokens that CLIP's text encoders read
_STEPS = (256, 384, 512, 768, 1024, 1536, 2048)


class Seen(NamedTuple):
    """One record, opened."""

    key: str
    size: tuple[int, int]
    text: str
    subject: str | None
    references: int
    mask: bool
    print: bytes  # of the pixels: equal for copies
    likeness: int  # of a very small version: equal for pictures that look alike
    small: Image.Image


@dataclass
class Census:
    """What was found so far."""

    records: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    lost: int = 0  # as `unreadable`, all of them
    small: list[str] = field(default_factory=list)
    too_small: int = 0
    without_text: int = 0
    long_text: int = 0
    with_references: int = 0
    with_mask: int = 0
    sides: Counter[str] = field(default_factory=Counter)
    aspects: Counter[str] = field(default_factory=Counter)
    subjects: Counter[str] = field(default_factory=Counter)
    copies: list[tuple[str, str]] = field(default_factory=list)
    copied: int = 0
    alike: int = 0
    samples: list[tuple[Image.Image, str]] = field(default_factory=list)
    _prints: dict[bytes, str] = field(default_factory=dict)
    _likenesses: set[int] = field(default_factory=set)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def take(self, seen: Seen, least: int) -> None:
        """Count a record."""
        self.records += 1
        short = min(seen.size)
        if short < least:
            self.too_small += 1
            _name(self.small, f"{seen.key}: {seen.size[0]} × {seen.size[1]}")
        self.without_text += not seen.text
        self.long_text += len(seen.text.split()) > LONG
        self.with_references += seen.references > 0
        self.with_mask += seen.mask
        self.sides[_bin(short)] += 1
        self.aspects[_aspect(seen.size)] += 1
        if seen.subject is not None:
            self.subjects[seen.subject] += 1
        if seen.print in self._prints:
            self.copied += 1
            _name(self.copies, (seen.key, self._prints[seen.print]))
        elif seen.likeness in self._likenesses:
            self.alike += 1
        self._prints.setdefault(seen.print, seen.key)
        self._likenesses.add(seen.likeness)
        self._sample(seen)

    def fail(self, key: str, why: str) -> None:
        """Count a record that cannot be used."""
        self.lost += 1
        if len(self.unreadable) < NAMED:
            self.unreadable[key] = why

    def _sample(self, seen: Seen) -> None:
        """Every record is kept with the same chance (reservoir sampling)."""
        if len(self.samples) < SAMPLES:
            self.samples.append((seen.small, seen.text))
        elif (at := self._rng.randrange(self.records)) < SAMPLES:
            self.samples[at] = (seen.small, seen.text)

    def figures(self) -> dict[str, Any]:
        """The counts, for people and programs."""
        many = list(self.subjects.values())
        return {
            "records": self.records, "unreadable": self.lost, "too small": self.too_small, "without caption": self.without_text,
            f"caption over {LONG} words": self.long_text, "copies": self.copied, "look alike": self.alike,
            "with references": self.with_references, "with mask": self.with_mask, "subjects": len(many),
            "pictures of a subject": f"{min(many)} … {max(many)}, median {median(many):g}" if many else "–",
        }  # fmt: skip

    def report(self) -> dict[str, Any]:
        """Everything, with names."""
        return self.figures() | {
            "shorter side": dict(sorted(self.sides.items(), key=lambda item: _number(item[0]))), "aspect": dict(self.aspects.most_common()),
            "unreadable records": self.unreadable, "small records": self.small, "copied records": self.copies,
        }  # fmt: skip

    def write(self, folder: Path, title: str) -> Path:
        """`report.json`, `samples.png` and `index.html`; the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.report(), indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
        body = table(self.figures())
        if self.samples:
            page = sheet([], [small for small, _ in self.samples], columns=8, cell=128)
            page.save(folder / "samples.png")
            captions = "".join(f"<li>{html.escape(text) or '<i>no caption</i>'}" for _, text in self.samples)
            body += f"<h2>Samples</h2>{inline(page)}<ol>{captions}</ol>"
        for name in ("shorter side", "aspect"):
            body += f"<h2>{name.capitalize()}</h2>{table(self.report()[name])}"
        for name, rows in (("Unreadable", self.unreadable), ("Too small", dict.fromkeys(self.small, "")), ("Copies", dict(self.copies))):
            if rows:
                body += f"<details><summary>{name}: {len(rows)} named</summary>{table(rows)}</details>"
        write_page(folder / "index.html", f"Data: {title}", body)
        return folder / "index.html"


def census(data: str, least: int, workers: int, told: Callable[[int, int | None], None]) -> Census:
    """Look at every record once. `told(done, total)`; the total of shards is not known. Raises UserError where there is nothing."""
    records = open_data(data)
    found = Census()
    if isinstance(records, Shards):
        records.lost = found.fail
    total = len(records) if isinstance(records, Counted) else None
    work: Iterator[tuple[Callable[[], Record], Callable[[], Seen]]] = ((read, partial(look, read)) for read in once(records))
    for read, future in ahead(work, workers, 8 * workers):
        try:
            found.take(future.result(), least)
        except UNREADABLE as error:
            found.fail(name_of(read, error), brief(error))
        told(found.records + found.lost, total)
    return found


def look(read: Callable[[], Record]) -> Seen:
    """Open a record, its references and its mask. Raises UserError for what cannot be read."""
    record = read()
    image = open_image(record.target)
    for other in (*record.references, *([record.mask] if record.mask is not None else [])):
        open_image(other)
    pixels = hashlib.blake2b(image.tobytes() + str(image.size).encode(), digest_size=12).digest()
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes() + (np.asarray(image.resize((1, 1), Image.Resampling.BOX)) // 16).tobytes()
    small = ImageOps.contain(image, (128, 128))
    return Seen(
        record.key, image.size, record.text.strip(), record.subject, len(record.references), record.mask is not None, pixels,
        int.from_bytes(bits), small,
    )  # fmt: skip


def _name(names: list[Any], what: Any) -> None:
    if len(names) < NAMED:
        names.append(what)


def _bin(side: int) -> str:
    below = next((step for step in _STEPS if side < step), None)
    return f"under {below}" if below else f"{_STEPS[-1]} and more"


def _number(name: str) -> int:
    return int(name.split()[-1]) if name.startswith("under") else 10**9


def _aspect(size: tuple[int, int]) -> str:
    ratio = size[0] / size[1]
    return (
        "square"
        if 0.95 <= ratio <= 1.05
        else "wide (over 2:1)"
        if ratio > 2
        else "landscape"
        if ratio > 1
        else "portrait"
        if ratio >= 0.5
        else "tall (over 1:2)"
    )
