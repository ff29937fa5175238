"""Pictures by subject: each is drawn after the others of its subject (the second paper, "P2", section 3.5: leave one out)."""

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from imprompt.data.loader import UNREADABLE
from imprompt.data.records import Counted, Record
from imprompt.errors import UserError, brief


class Identities:
    """Every picture of the subjects that have at least `least`; its references are that subject's other pictures.

    `subjects` keeps these alone. Pictures without a subject are left out, and so are records that cannot be read: `lost`
    says why. Nothing is opened where the records can name a subject without it. Raises UserError where no subject has enough.
    """

    def __init__(self, records: Counted, least: int = 2, subjects: Collection[str] | None = None):
        if least < 2:
            raise UserError(f"expected at least 2 pictures of a subject, one to draw and one to draw after; received {least}")
        found: dict[str, list[int]] = defaultdict(list)
        self.lost: dict[str, str] = {}
        subject_of = getattr(records, "subject_of", None) or (lambda i: records[i].subject)
        for i in range(len(records)):
            try:
                name = subject_of(i)
            except UNREADABLE as error:
                self.lost[f"record {i + 1}"] = brief(error)
                continue
            if name is not None and (subjects is None or name in subjects):
                found[name].append(i)
        self.records, self.least = records, least
        self.subjects = {name: places for name, places in sorted(found.items()) if len(places) >= least}
        if not self.subjects:
            most = max(map(len, found.values()), default=0)
            raise UserError(
                f"no subject has {least} pictures: the data name {len(found)}, the richest with {most}; subjects are folders "
                "(Name/Name_0001.jpg) or a subject column, and fewer pictures may do"
            )
        self._places = [(i, name) for name, places in self.subjects.items() for i in places]

    @property
    def names(self) -> list[str]:
        """One for each picture: they tell whether the data are still the same."""
        return [f"{name} {i}" for i, name in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Record:
        at, others = self.place(i)
        return replace(self.records[at], references=tuple(self.records[n].target for n in others))

    def of(self, subjects: Collection[str]) -> "Identities":
        """These subjects alone."""
        return type(self)(self.records, self.least, subjects)

    def place(self, i: int) -> tuple[int, list[int]]:
        """Where picture i and its subject's other pictures stand among the records."""
        at, name = self._places[i]
        return at, [n for n in self.subjects[name] if n != at]

    def subject_of(self, i: int) -> str:
        """Whose picture it is."""
        return self._places[i][1]


def split(subjects: Sequence[str], held_out: float = 1 / 3, seed: int = 0) -> tuple[list[str], list[str]]:
    """Subjects to train on and subjects to test on, 2 : 1 as in P2; people are split, not photographs. Raises UserError for too few."""
    if len(subjects) < 2:
        raise UserError(f"expected at least 2 subjects to split, received {len(subjects)}")
    order = sorted(subjects)
    random.Random(f"split {seed}").shuffle(order)
    count = min(len(order) - 1, max(1, round(held_out * len(order))))
    return sorted(order[count:]), sorted(order[:count])
