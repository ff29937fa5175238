"""The prompts of an evaluation: reference pictures with their captions, in a fixed order."""

import json
import os
import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

from PIL import Image

from imprompt.config import Evaluate
from imprompt.data.loader import UNREADABLE
from imprompt.data.readers import Mini, open_data
from imprompt.data.records import Counted, Record
from imprompt.data.subjects import Identities
from imprompt.errors import ImageError, UserError, brief
from imprompt.evaluation.system import Case
from imprompt.mini import judge as judging
from imprompt.mini import world
from imprompt.utils.images import Picture, fit, open_image

MOST = 5_000  # prompts, unless told otherwise: the paper's number
MINI_MOST = 1_000


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
    @property
    def subjects(self) -> Sequence[str]:
        """Whose identity is measured; none where each prompt stands for itself."""
        ...

    def group(self, i: int) -> int:
        """Which prompts belong together, as those of one subject do: by number."""
        ...


class MiniCases:
    """The embedded world: subjects that nothing was trained on, in combinations that nothing was trained on."""

    has_others = True
    subjects: Sequence[str] = ()

    def __init__(self, count: int):
        self._cases = judging.cases(count)
        self.texts = [case.text for case in self._cases]
        self.fingerprint = _fingerprint(self.texts)

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, i: int) -> Case:
        photo = self._cases[i].photo
        return Case(f"mini:{i}", self.texts[i], (photo,), photo)

    def group(self, i: int) -> int:
        return i

    def other(self, i: int) -> Image.Image:
        case = self._cases[i]
        return world.draw(case.subject, world.scene(case.scene.seed + judging.ELSEWHERE))


class DataCases:
    """Records of any data that can be trained on: the first reference is the prompt."""

    subjects: Sequence[str] = ()

    def __init__(self, records: Sequence[Record]):
        self.records = records
        self.texts = [record.text for record in records]
        self.fingerprint = _fingerprint([*self.texts, *(f"{r.key} {_bytes(r.target)}" for r in records)])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Case:
        record = self.records[i]
        picture = fit(open_image(record.references[0] if record.references else record.target))
        return Case(record.key, record.text, (picture,), picture)

    def group(self, i: int) -> int:
        return i

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


class SubjectCases:
    """Pictures by subject: after some photographs of each, others of the same are drawn.

    Of every subject the last `targets` of its photographs, in an order that follows from its name, are what is to be drawn;
    of the others the first `references` are the references, again from the first where there are too few. Photographs that
    cannot be opened are passed over among the references.
    """

    has_others = True

    def __init__(self, identities: Identities, references: int, targets: int, limit: int = 0, noun: str = "", caption: str = ""):
        self._records, self._references = identities.records, references
        self.subjects = list(identities.subjects)
        self._nouns = [noun or _kind(identities.records, name) for name in self.subjects]
        self._galleries: list[list[int]] = []
        self._prompts: list[tuple[int, int]] = []  # subject, place of the target
        for number, name in enumerate(self.subjects):
            places = random.Random(_seed(f"photographs of {name}")).sample(identities.subjects[name], len(identities.subjects[name]))
            count = min(targets, len(places) - 1)
            self._galleries.append(places[: len(places) - count])
            self._prompts += [(number, place) for place in places[len(places) - count :]]
        self._prompts = self._prompts[: limit or None]
        self.subjects = self.subjects[: self._prompts[-1][0] + 1]
        told = [self._records[place].text or caption for _, place in self._prompts]
        self.texts = [text or f"a photo of a {self._nouns[n]}" for text, (n, _) in zip(told, self._prompts, strict=True)]
        shown = [n for gallery in self._galleries[: len(self.subjects)] for n in gallery] + [place for _, place in self._prompts]
        self.fingerprint = _fingerprint([*self.texts, *(f"{self._records[n].key} {_bytes(self._records[n].target)}" for n in shown)])

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, i: int) -> Case:
        number, place = self._prompts[i]
        record, found = self._records[place], self.gallery(number, self._references)
        references = tuple(found[n % len(found)] for n in range(self._references))
        return Case(record.key, self.texts[i], references, fit(open_image(record.target)), self.subjects[number], self._nouns[number])

    def other(self, i: int) -> Image.Image:
        """The subject's next target, which is not in the gallery either; where there is only one, a photograph of the gallery,
        one that is no reference if there are enough."""
        number, place = self._prompts[i]
        mine = [at for whose, at in self._prompts if whose == number]
        if len(mine) == 1:
            return self.gallery(number, self._references + 1)[-1]
        return fit(open_image(self._records[mine[(mine.index(place) + 1) % len(mine)]].target))

    def group(self, i: int) -> int:
        return self._prompts[i][0]

    def noun(self, i: int) -> str:
        """What the subject is, as its text calls it."""
        return self._nouns[self._prompts[i][0]]

    def gallery(self, number: int, most: int) -> list[Image.Image]:
        """A subject's photographs that are not targets, those that can be opened. Raises ImageError where none can."""
        found: list[Image.Image] = []
        for place in self._galleries[number]:
            with suppress(*UNREADABLE):
                found.append(fit(open_image(self._records[place].target)))
            if len(found) == most:
                break
        if not found:
            raise ImageError(f"no photograph of {self.subjects[number]} can be opened")
        return found


def _seed(text: str) -> bytes:
    """For `random`, which takes no name of a folder that is not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _kind(records: Counted, subject: str) -> str:
    """What a subject of mini is; of others nothing is known."""
    return world.subject(int(subject)).kind if isinstance(records, Mini) else "subject"


def _fingerprint(words: Sequence[str]) -> str:
    return f"{zlib.crc32(chr(10).join(words).encode('utf-8', 'surrogatepass')):08x}"


def _bytes(picture: Picture) -> int:
    if isinstance(picture, bytes):
        return len(picture)
    return os.path.getsize(picture) if isinstance(picture, (str, Path)) and os.path.exists(picture) else 0


def open_cases(choice: Evaluate) -> Cases:
    """The first `limit` prompts of the data; 0 for as many as the protocol has. Raises UserError where there are none."""
    data, limit = choice.data, choice.limit
    if choice.subjects:
        return _by_subject(choice)
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


def _by_subject(choice: Evaluate) -> SubjectCases:
    limit = choice.limit or MINI_MOST
    if choice.data == "mini":
        photos = max(choice.subjects, choice.references + choice.targets)
        count = -(-limit // choice.targets) * photos
        records: Counted = Mini(count, held_out=True, photos=photos, look=False)
    else:
        opened = open_data(choice.data)
        if not isinstance(opened, Counted):
            raise UserError("subjects: in shards, read as a stream, a subject's pictures are far apart; expected a folder or a list")
        records = opened
    chosen = None if choice.split is None else tested(choice.split)
    return SubjectCases(Identities(records, choice.subjects, chosen), choice.references, choice.targets, limit, choice.noun, choice.caption)


def tested(path: str) -> list[str]:
    """The subjects that a training left for testing. Raises UserError where the file does not tell."""
    try:
        return list(json.loads(Path(path).read_text("utf-8"))["test"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"split: expected the subjects.json of a training, received {path} ({brief(error)})") from error
