"""The prompts of an evaluation: reference pictures with their captions, in a fixed order."""

import os
import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from imprompt.data.readers import open_data
from imprompt.data.records import Counted, Record
from imprompt.errors import ImageError, UserError
from imprompt.images import Picture, fit, open_image
from imprompt.mini import judging, world

MOST = 5_000  # prompts, unless told otherwise: the paper's number
MINI_MOST = 1_000


class Case(NamedTuple):
    """One prompt."""

    key: str
    text: str
    reference: Image.Image  # square


class Cases(Protocol):
    """Prompts in order. Opening one raises ImageError where its picture cannot be read."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Case: ...
    def other(self, i: int) -> Image.Image:
        """Another real picture of the same subject. Raises ImageError where there is none."""
        ...

    @property
    def texts(self) -> Sequence[str]: ...
    @property
    def fingerprint(self) -> str:
        """Changes when captions or pictures are others."""
        ...

    @property
    def has_others(self) -> bool: ...


class MiniCases:
    """The embedded world: subjects that nothing was trained on, in combinations that nothing was trained on."""

    has_others = True

    def __init__(self, count: int):
        self._cases = judging.cases(count)
        self.texts = [case.text for case in self._cases]
        self.fingerprint = _fingerprint(self.texts)

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, i: int) -> Case:
        return Case(f"mini:{i}", self.texts[i], self._cases[i].photo)

    def other(self, i: int) -> Image.Image:
        case = self._cases[i]
        return world.draw(case.subject, world.scene(case.scene.seed + judging.ELSEWHERE))


class DataCases:
    """Records of any data that can be trained on: the first reference is the prompt."""

    def __init__(self, records: Sequence[Record]):
        self.records = records
        self.texts = [record.text for record in records]
        self.fingerprint = _fingerprint([*self.texts, *(f"{r.key} {_bytes(r.target)}" for r in records)])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Case:
        record = self.records[i]
        picture = record.references[0] if record.references else record.target
        return Case(record.key, record.text, fit(open_image(picture)))

    def other(self, i: int) -> Image.Image:
        record = self.records[i]
        shown = record.references[0] if record.references else record.target
        pictures = [self.records[n].target for n in self._subjects[record.subject]] if record.subject else []
        pictures = [record.target, *pictures]  # where the reference is another one, the target is the nearest real picture
        alike = [p for n, p in enumerate(pictures) if p != shown and p not in pictures[:n]]
        if not alike:
            raise ImageError(f"{record.key} has no other picture of its subject")
        return fit(open_image(alike[0 if record.references else i % len(alike)]))

    @property
    def has_others(self) -> bool:
        return any(len(found) > 1 for found in self._subjects.values()) or any(record.references for record in self.records)

    @cached_property
    def _subjects(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for i, record in enumerate(self.records):
            if record.subject:
                found[record.subject].append(i)
        return found


def _fingerprint(words: Sequence[str]) -> str:
    return f"{zlib.crc32(chr(10).join(words).encode('utf-8', 'surrogatepass')):08x}"


def _bytes(picture: Picture) -> int:
    if isinstance(picture, bytes):
        return len(picture)
    return os.path.getsize(picture) if isinstance(picture, (str, Path)) and os.path.exists(picture) else 0


def open_cases(data: str, limit: int) -> Cases:
    """The first `limit` prompts of the data; 0 for as many as the protocol has. Raises UserError where there are none."""
    if data == "mini":
        return MiniCases(limit or MINI_MOST)
    records, most = open_data(data), limit or MOST
    if isinstance(records, Counted):
        found = [records[i] for i in range(min(most, len(records)))]
    else:
        found = list(islice((r for shard in records.shards for r in records.read(shard)), most))
    if not found:
        raise UserError(f"no pictures in {data} to evaluate on")
    return DataCases(found)
