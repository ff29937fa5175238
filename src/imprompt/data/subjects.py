"""Leave-one-out training: images by subject, each conditioned on other images of its subject.

As in Kazistova, Stepanov, Filatov, *Создание персонализированных генераций изображений*, MIPT, section 3.5.
"""

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from imprompt.data.loader import READ_ERRORS
from imprompt.data.records import MapRecords, Record
from imprompt.errors import UserError, summarize_error


class SubjectDataset:
    """The images of all subjects that have at least `min_images`; the references of an image are the others of its subject.

    `subjects` restricts the dataset to these. Images without a subject and unreadable records are skipped; `unreadable` names the
    latter. Files are opened only where the records cannot tell a subject otherwise. Raises UserError where no subject has enough
    images.
    """

    def __init__(self, records: MapRecords, min_images: int = 2, subjects: Collection[str] | None = None):
        if min_images < 2:
            raise UserError(f"expected at least 2 images per subject, one as target and one as reference; received {min_images}")
        indices: dict[str, list[int]] = defaultdict(list)
        self.unreadable: dict[str, str] = {}
        get_subject = getattr(records, "get_subject", None) or (lambda i: records[i].subject)
        for i in range(len(records)):
            try:
                name = get_subject(i)
            except READ_ERRORS as error:
                self.unreadable[f"record {i + 1}"] = summarize_error(error)
                continue
            if name is not None and (subjects is None or name in subjects):
                indices[name].append(i)
        self.records, self.min_images = records, min_images
        self.subjects = {name: own for name, own in sorted(indices.items()) if len(own) >= min_images}
        if not self.subjects:
            largest = max(map(len, indices.values()), default=0)
            raise UserError(
                f"no subject has {min_images} images: the data has {len(indices)} subjects, the largest with {largest}; subjects are "
                "folders (Name/Name_0001.jpg) or a subject column: expected more images per subject, or a lower minimum"
            )
        self._items = [(index, name) for name, own in self.subjects.items() for index in own]

    @property
    def names(self) -> list[str]:
        """A name of each image, from which changed data is recognized."""
        return [f"{name} {index}" for index, name in self._items]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Record:
        target, references = self.leave_one_out(i)
        return replace(self.records[target], references=tuple(self.records[n].target for n in references))

    def subset(self, subjects: Collection[str]) -> "SubjectDataset":
        """The dataset of these subjects only."""
        return type(self)(self.records, self.min_images, subjects)

    def leave_one_out(self, i: int) -> tuple[int, list[int]]:
        """Indices of image i and of the other images of its subject among the records."""
        target, name = self._items[i]
        return target, [n for n in self.subjects[name] if n != target]

    def get_subject(self, i: int) -> str:
        """The subject of an image."""
        return self._items[i][1]


def split_subjects(subjects: Sequence[str], test_fraction: float = 1 / 3, seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and test subjects, 2 : 1 by default. Raises UserError for fewer than two subjects."""
    if len(subjects) < 2:
        raise UserError(f"expected at least 2 subjects to split, received {len(subjects)}")
    shuffled = sorted(subjects)
    random.Random(f"split {seed}").shuffle(shuffled)
    count = min(len(shuffled) - 1, max(1, round(test_fraction * len(shuffled))))
    return sorted(shuffled[count:]), sorted(shuffled[:count])
