"""What an evaluation generates from: reference images with their prompts, in a fixed order, and the sampling parameters."""

import json
import os
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from imprompt.config.evaluation import EvaluationDataConfig
from imprompt.data.folders import describe_skipped
from imprompt.data.loader import READ_ERRORS
from imprompt.data.readers import MiniWorld, WebDatasetShards, open_data
from imprompt.data.records import MapRecords, Record, Records
from imprompt.data.sampler import iterate_once
from imprompt.data.subjects import SubjectDataset
from imprompt.data.survey import describe_captions, describe_data
from imprompt.errors import ImageError, UserError, summarize_error
from imprompt.mini import world
from imprompt.mini.held_out import make_held_out_samples
from imprompt.utils.images import ImageInput, open_image, resize_to_square

MAX_PROMPTS = 5_000  # by default: as many as in IP-Adapter (Ye et al., 2023, arXiv:2308.06721)
MAX_MINI_PROMPTS = 1_000


class EvalSample(NamedTuple):
    """One prompt of an evaluation."""

    key: str
    prompt: str
    references: tuple[Image.Image, ...]  # square
    target: Image.Image  # generated images are compared with it: the reference itself, or another image of the subject
    subject: str = ""
    class_noun: str = ""  # what the prompt calls the subject


@dataclass(frozen=True)
class SamplingParams:
    """The parameters with which every system generates."""

    num_inference_steps: int
    guidance_scale: float
    size: tuple[int, int]  # width and height in pixels; images of a pipeline with a fixed size are resized to it
    scale: float = 1.0  # λ, for systems that have one


class EvalSet(Protocol):
    """Samples in a fixed order. Loading one raises ImageError where its image cannot be read."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> EvalSample: ...
    def another_image(self, i: int) -> Image.Image:
        """Another real image of the subject of sample i. Raises ImageError where there is none."""
        ...

    @property
    def prompts(self) -> Sequence[str]:
        """The prompt of each sample."""
        ...

    @property
    def fingerprint(self) -> str:
        """A checksum of prompts and images."""
        ...

    @property
    def has_other_images(self) -> bool:
        """Whether `another_image` has one for any sample."""
        ...

    @property
    def description(self) -> str:
        """One line about captions and about what is left out; "" for mini."""
        ...

    @property
    def subjects(self) -> Sequence[str]:
        """The subjects whose identity is measured; empty where samples are independent."""
        ...

    def group_index(self, i: int) -> int:
        """Index of the group of sample i, such as its subject: samples of one group are resampled together."""
        ...


class MiniEvalSet:
    """Mini's held-out images: no part of mini was trained on these subjects, nor on these combinations of attributes."""

    has_other_images = True
    subjects: Sequence[str] = ()
    description = ""

    def __init__(self, num_prompts: int):
        self._samples = make_held_out_samples(num_prompts)
        self.prompts = [sample.caption for sample in self._samples]
        self.fingerprint = _checksum(self.prompts)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> EvalSample:
        image = self._samples[i].image
        return EvalSample(f"mini:{i}", self.prompts[i], (image,), image)

    def group_index(self, i: int) -> int:
        """Every sample is a group of its own."""
        return i

    def another_image(self, i: int) -> Image.Image:
        """The same subject in another scene."""
        return self._samples[i].other_image


class RecordEvalSet:
    """Records of any training data. The first reference of each, or the image itself, is both image prompt and target."""

    subjects: Sequence[str] = ()

    def __init__(self, records: Sequence[Record], description: str = ""):
        self.records, self.description = records, description
        self.prompts = [record.caption for record in records]
        self.fingerprint = _checksum([*self.prompts, *(f"{r.key} {_num_bytes(r.target)}" for r in records)])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> EvalSample:
        record = self.records[i]
        image = resize_to_square(open_image(record.references[0] if record.references else record.target))
        return EvalSample(record.key, record.caption, (image,), image)

    def group_index(self, i: int) -> int:
        """Every sample is a group of its own."""
        return i

    def another_image(self, i: int) -> Image.Image:
        """Another image of the record's subject. Raises ImageError where there is none."""
        record = self.records[i]
        reference = record.references[0] if record.references else record.target
        same_subject = [self.records[n].target for n in self._by_subject[record.subject]] if record.subject else []
        images = [record.target, *same_subject]  # with a separate reference, the record's own target is the closest real image
        others = [image for n, image in enumerate(images) if image != reference and image not in images[:n]]
        if not others:
            raise ImageError(f"{record.key} has no other image of its subject")
        return resize_to_square(open_image(others[0 if record.references else i % len(others)]))

    @property
    def has_other_images(self) -> bool:
        """Whether a record has a reference, or a subject with several images."""
        return any(len(indices) > 1 for indices in self._by_subject.values()) or any(record.references for record in self.records)

    @cached_property
    def _by_subject(self) -> dict[str, list[int]]:
        indices: dict[str, list[int]] = defaultdict(list)
        for i, record in enumerate(self.records):
            if record.subject:
                indices[record.subject].append(i)
        return indices


class SubjectEvalSet:
    """Images by subject: some images of each subject are references, others are the targets that are to be generated.

    Of every subject the last `targets_per_subject` images, in an order that depends on its name alone, are the targets; the first
    `num_references` of the rest are the references, repeated from the first where there are too few. References that cannot be
    opened are skipped.
    """

    has_other_images = True

    def __init__(self, identities: SubjectDataset, dataset: EvaluationDataConfig):
        self._records, self._num_references = identities.records, dataset.num_references
        self.subjects = list(identities.subjects)
        self._class_nouns = [dataset.class_noun or _default_class_noun(identities.records, name) for name in self.subjects]
        self._galleries: list[list[int]] = []  # for each subject, the records that are no targets
        self._targets: list[tuple[int, int]] = []  # for each sample, its subject and record
        for subject, name in enumerate(self.subjects):
            indices = identities.subjects[name]
            order = random.Random(_seed_bytes(f"photographs of {name}")).sample(indices, len(indices))
            num_targets = min(dataset.targets_per_subject, len(order) - 1)
            self._galleries.append(order[: len(order) - num_targets])
            self._targets += [(subject, index) for index in order[len(order) - num_targets :]]
        self._targets = self._targets[: dataset.num_prompts or MAX_MINI_PROMPTS]
        self.subjects = self.subjects[: self._targets[-1][0] + 1]
        self.description = "" if isinstance(self._records, MiniWorld) else f"data: {describe_data(self._records)}"
        captions = [self._read(index).caption or dataset.default_caption for _, index in self._targets]
        self.prompts = [text or f"a photo of a {self._class_nouns[n]}" for text, (n, _) in zip(captions, self._targets, strict=True)]
        used = [n for gallery in self._galleries[: len(self.subjects)] for n in gallery] + [index for _, index in self._targets]
        self.fingerprint = _checksum([*self.prompts, *(f"{self._read(n).key} {_num_bytes(self._read(n).target)}" for n in used)])

    def _read(self, i: int) -> Record:
        """A record, or an empty one where it cannot be read; its sample is skipped later."""
        try:
            return self._records[i]
        except READ_ERRORS:
            return Record(f"record {i + 1}", b"")

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, i: int) -> EvalSample:
        subject, index = self._targets[i]
        record, images = self._records[index], self.gallery_images(subject, self._num_references)
        references = tuple(images[n % len(images)] for n in range(self._num_references))
        target = resize_to_square(open_image(record.target))
        return EvalSample(record.key, self.prompts[i], references, target, self.subjects[subject], self._class_nouns[subject])

    def another_image(self, i: int) -> Image.Image:
        """The subject's next target, which is not in the gallery either; where there is only one, an image of the gallery,
        one that is no reference if there are enough."""
        subject, index = self._targets[i]
        targets = [n for owner, n in self._targets if owner == subject]
        if len(targets) == 1:
            return self.gallery_images(subject, self._num_references + 1)[-1]
        return resize_to_square(open_image(self._records[targets[(targets.index(index) + 1) % len(targets)]].target))

    def group_index(self, i: int) -> int:
        """Index of the subject."""
        return self._targets[i][0]

    def class_noun(self, i: int) -> str:
        """What the prompt of sample i calls the subject."""
        return self._class_nouns[self._targets[i][0]]

    def gallery_images(self, subject: int, max_images: int) -> list[Image.Image]:
        """Up to `max_images` images of a subject that are no targets and can be opened. Raises ImageError where none can."""
        images: list[Image.Image] = []
        for index in self._galleries[subject]:
            with suppress(*READ_ERRORS):
                images.append(resize_to_square(open_image(self._records[index].target)))
            if len(images) == max_images:
                break
        if not images:
            raise ImageError(f"no image of {self.subjects[subject]} can be opened")
        return images


def _seed_bytes(text: str) -> bytes:
    """A seed for `random`, which accepts no text with the name of a folder that is not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _default_class_noun(records: MapRecords, subject: str) -> str:
    """The category of a subject of mini; "subject" for other data, of which nothing is known."""
    return world.make_subject(int(subject)).category if isinstance(records, MiniWorld) else "subject"


def _checksum(texts: Sequence[str]) -> str:
    return f"{zlib.crc32(chr(10).join(texts).encode('utf-8', 'surrogatepass')):08x}"


def _num_bytes(image: ImageInput) -> int:
    if isinstance(image, bytes):
        return len(image)
    return os.path.getsize(image) if isinstance(image, (str, Path)) and os.path.exists(image) else 0


def load_eval_set(dataset: EvaluationDataConfig) -> EvalSet:
    """The first `num_prompts` samples of the data. Raises UserError where there are none."""
    if dataset.min_images_per_subject:
        return _load_subjects(dataset)
    if dataset.data == "mini":
        return MiniEvalSet(dataset.num_prompts or MAX_MINI_PROMPTS)
    records, unreadable = open_data(dataset.data), list[str]()
    selected = list(islice(_read_records(records, unreadable), dataset.num_prompts or MAX_PROMPTS))
    if not selected:
        raise UserError(f"no images in {dataset.data} to evaluate on" + (f" ({unreadable[0]})" if unreadable else ""))
    return RecordEvalSet(selected, describe_selection(selected, records, unreadable))


def _read_records(records: Records, unreadable: list[str]) -> Iterator[Record]:
    """The records that can be read; the reasons why others cannot are collected."""
    if isinstance(records, WebDatasetShards):
        records.on_unreadable = lambda key, reason: unreadable.append(f"{key}: {reason}")
    for read in iterate_once(records):
        try:
            yield read()
        except READ_ERRORS as error:
            unreadable.append(summarize_error(error))


def describe_selection(selected: Sequence[Record], records: Records, unreadable: Sequence[str]) -> str:
    """One line about captions and about what is left out of an evaluation."""
    line = describe_captions(record.caption_source for record in selected)
    without = sum(not record.caption for record in selected)
    parts = [f"data: {line}"] + (["CLIP-T is not computed for the others"] if without else [])
    parts += [f"{len(unreadable):,} cannot be read ({unreadable[0]})"] if unreadable else []
    skipped = describe_skipped(getattr(records, "skipped", None) or Counter())
    return "; ".join(parts + ([f"not used: {skipped}"] if skipped else []))


def _load_subjects(dataset: EvaluationDataConfig) -> SubjectEvalSet:
    assert dataset.min_images_per_subject is not None
    if dataset.data == "mini":
        images_per_subject = max(dataset.min_images_per_subject, dataset.num_references + dataset.targets_per_subject)
        num_subjects = -(-(dataset.num_prompts or MAX_MINI_PROMPTS) // dataset.targets_per_subject)
        records: MapRecords = MiniWorld(
            num_subjects * images_per_subject, held_out=True, images_per_subject=images_per_subject, describe_appearance=False
        )
    else:
        opened = open_data(dataset.data)
        if not isinstance(opened, MapRecords):
            raise UserError(
                "min_images_per_subject: shards are read as a stream, in which the images of a subject are far apart; "
                "expected a folder or a list"
            )
        records = opened
    subjects = None if dataset.subject_split is None else load_test_subjects(dataset.subject_split)
    return SubjectEvalSet(SubjectDataset(records, dataset.min_images_per_subject, subjects), dataset)


def load_test_subjects(path: str) -> list[str]:
    """The subjects that a training run held out. Raises UserError where the file does not name them."""
    try:
        return list(json.loads(Path(path).read_text("utf-8"))["test"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"subject_split: expected the subjects.json of a training run, received {path} ({summarize_error(error)})"
        ) from error
