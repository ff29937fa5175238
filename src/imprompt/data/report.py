"""A report on a dataset from a single pass: counts, unreadable records, sizes, captions, duplicates, samples."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from imprompt.data.folders import describe_skipped
from imprompt.data.loader import READ_ERRORS, get_record_key, prefetch
from imprompt.data.readers import WebDatasetShards, open_data
from imprompt.data.records import MapRecords
from imprompt.data.sampler import RecordReader, iterate_once
from imprompt.errors import summarize_error
from imprompt.utils.files import atomic_path, write_file
from imprompt.utils.html import render_html, write_page
from imprompt.utils.images import make_contact_sheet, open_image, open_mask

Entry = TypeVar("Entry")
MAX_LISTED_RECORDS = 1000  # records with the same problem that the report lists
NUM_SAMPLES = 24
MAX_CAPTION_WORDS = 60  # about the 77 tokens of CLIP's text encoders
_SIZE_BINS = (256, 384, 512, 768, 1024, 1536, 2048)

_BODY = """\
{{ key_value_table(summary) }}
{% if sheet %}
<h2>Samples</h2>
{{ inline_image(sheet) }}
<ol>
{% for caption in captions %}
<li>{% if caption %}{{ caption }}{% else %}<i>no caption</i>{% endif %}

{% endfor %}
</ol>
{% endif %}
{% for name, counts in histograms.items() %}
<h2>{{ name | capitalize }}</h2>
{{ key_value_table(counts) }}
{% endfor %}
{% for name, records in lists.items() if records %}
<details><summary>{{ name }}: {{ records | length }} listed</summary>{{ key_value_table(records) }}</details>
{% endfor %}
"""


class RecordStats(NamedTuple):
    """What the report needs of one record."""

    key: str
    size: tuple[int, int]  # width and height of the target in pixels
    caption: str
    subject: str | None
    num_references: int
    has_mask: bool
    content_hash: bytes  # of the pixels: equal for exact duplicates
    dhash: int  # difference hash: usually equal for near duplicates
    thumbnail: Image.Image
    caption_source: str = ""


@dataclass
class DatasetReport:
    """Statistics of a dataset, updated record by record."""

    records: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)  # key and reason of the first MAX_LISTED_RECORDS
    num_unreadable: int = 0
    too_small: list[str] = field(default_factory=list)  # the first MAX_LISTED_RECORDS
    num_too_small: int = 0
    without_caption: int = 0
    long_caption: int = 0
    with_references: int = 0
    with_mask: int = 0
    shorter_sides: Counter[str] = field(default_factory=Counter)
    aspect_ratios: Counter[str] = field(default_factory=Counter)
    subjects: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)  # records with a caption, by source
    skipped: Counter[str] = field(default_factory=Counter)  # what is no record, by kind
    exact_duplicates: list[tuple[str, str]] = field(default_factory=list)  # the first MAX_LISTED_RECORDS
    num_exact_duplicates: int = 0
    num_near_duplicates: int = 0
    samples: list[tuple[Image.Image, str]] = field(default_factory=list)  # thumbnails and captions
    _content_hashes: dict[bytes, str] = field(default_factory=dict)
    _dhashes: set[int] = field(default_factory=set)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def update(self, record: RecordStats, min_image_size: int) -> None:
        """Count a record."""
        self.records += 1
        shorter_side = min(record.size)
        if shorter_side < min_image_size:
            self.num_too_small += 1
            _append_limited(self.too_small, f"{record.key}: {record.size[0]} × {record.size[1]}")
        self.without_caption += not record.caption
        if record.caption:
            self.captions[record.caption_source] += 1
        self.long_caption += len(record.caption.split()) > MAX_CAPTION_WORDS
        self.with_references += record.num_references > 0
        self.with_mask += record.has_mask
        self.shorter_sides[_size_bin(shorter_side)] += 1
        self.aspect_ratios[_aspect_ratio_bin(record.size)] += 1
        if record.subject is not None:
            self.subjects[record.subject] += 1
        self._find_duplicates(record)
        self._sample(record)

    def add_unreadable(self, key: str, reason: str) -> None:
        """Count a record that cannot be used."""
        self.num_unreadable += 1
        if len(self.unreadable) < MAX_LISTED_RECORDS:
            self.unreadable[key] = reason

    def _find_duplicates(self, record: RecordStats) -> None:
        if record.content_hash in self._content_hashes:
            self.num_exact_duplicates += 1
            _append_limited(self.exact_duplicates, (record.key, self._content_hashes[record.content_hash]))
        elif record.dhash in self._dhashes:
            self.num_near_duplicates += 1
        self._content_hashes.setdefault(record.content_hash, record.key)
        self._dhashes.add(record.dhash)

    def _sample(self, record: RecordStats) -> None:
        """Reservoir sampling: every record is among the samples with the same probability."""
        if len(self.samples) < NUM_SAMPLES:
            self.samples.append((record.thumbnail, record.caption))
        elif (i := self._rng.randrange(self.records)) < NUM_SAMPLES:
            self.samples[i] = (record.thumbnail, record.caption)

    def summary(self) -> dict[str, int | str]:
        """The counts, by their label."""
        sizes = list(self.subjects.values())
        return {
            "records": self.records, "unreadable": self.num_unreadable, "too small": self.num_too_small,
            "with caption": self.records - self.without_caption, "without caption": self.without_caption,
            "captions from": describe_skipped(self.captions) or "–", f"caption over {MAX_CAPTION_WORDS} words": self.long_caption,
            "exact duplicates": self.num_exact_duplicates, "near duplicates": self.num_near_duplicates,
            "with references": self.with_references, "with mask": self.with_mask, "subjects": len(sizes),
            "images per subject": f"{min(sizes)} … {max(sizes)}, median {median(sizes):g}" if sizes else "–",
            "not used": describe_skipped(self.skipped) or "–",
        }  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """The counts, the histograms, and the keys of the records with a problem."""
        sides = sorted(self.shorter_sides.items(), key=lambda item: _bin_order(item[0]))
        return self.summary() | {
            "shorter side": dict(sides), "aspect ratio": dict(self.aspect_ratios.most_common()), "unreadable records": self.unreadable,
            "skipped files": dict(self.skipped), "captions by source": dict(self.captions),
            "too small records": self.too_small, "duplicate records": self.exact_duplicates,
        }  # fmt: skip

    def write(self, folder: Path, title: str) -> Path:
        """Write `report.json`, `samples.png` and `index.html`; return the path of the page."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_file(folder / "report.json", text.encode("utf-8", "backslashreplace"))
        page = make_contact_sheet([], [thumbnail for thumbnail, _ in self.samples], columns=8, cell_size=128) if self.samples else None
        if page:
            with atomic_path(folder / "samples.png") as partial:
                page.save(partial)
        histograms = {name: self.to_dict()[name] for name in ("shorter side", "aspect ratio")}
        lists = {
            "Unreadable": self.unreadable,
            "Too small": dict.fromkeys(self.too_small, ""),
            "Exact duplicates": dict(self.exact_duplicates),
        }
        captions = [caption for _, caption in self.samples]
        body = render_html(_BODY, summary=self.summary(), sheet=page, captions=captions, histograms=histograms, lists=lists)
        write_page(folder / "index.html", f"Data: {title}", body)
        return folder / "index.html"


def analyze_dataset(data: str, min_image_size: int, workers: int, on_progress: Callable[[int, int | None], None]) -> DatasetReport:
    """Read every record once. `on_progress(done, total)` has no total for shards. Raises UserError where there is no data."""
    records = open_data(data)
    report = DatasetReport()
    if isinstance(records, WebDatasetShards):
        records.on_unreadable = report.add_unreadable
    total = len(records) if isinstance(records, MapRecords) else None
    tasks: Iterator[tuple[RecordReader, Callable[[], RecordStats]]] = (
        (read, partial(inspect_record, read)) for read in iterate_once(records)
    )
    for read, future in prefetch(tasks, workers, 8 * workers):
        try:
            report.update(future.result(), min_image_size)
        except READ_ERRORS as error:
            report.add_unreadable(get_record_key(read, error), summarize_error(error))
        on_progress(report.records + report.num_unreadable, total)
    report.skipped += getattr(records, "skipped", None) or Counter()
    return report


def inspect_record(read: RecordReader) -> RecordStats:
    """Open the images of a record. Raises UserError for an unreadable one."""
    record = read()
    image = open_image(record.target)
    for reference in record.references:
        open_image(reference)
    if record.mask is not None:
        open_mask(record.mask, "a mask")
    content_hash = hashlib.blake2b(image.tobytes() + str(image.size).encode(), digest_size=12).digest()
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    mean_color = np.asarray(image.resize((1, 1), Image.Resampling.BOX)) // 16
    dhash = int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes() + mean_color.tobytes())
    return RecordStats(
        record.key, image.size, record.caption.strip(), record.subject, len(record.references), record.mask is not None, content_hash,
        dhash, ImageOps.contain(image, (128, 128)), record.caption_source,
    )  # fmt: skip


def _append_limited(items: list[Entry], item: Entry) -> None:
    if len(items) < MAX_LISTED_RECORDS:
        items.append(item)


def _size_bin(side: int) -> str:
    upper = next((edge for edge in _SIZE_BINS if side < edge), None)
    return f"under {upper}" if upper else f"{_SIZE_BINS[-1]} and more"


def _bin_order(name: str) -> int:
    return int(name.split()[-1]) if name.startswith("under") else 10**9


def _aspect_ratio_bin(size: tuple[int, int]) -> str:
    ratio = size[0] / size[1]
    if 0.95 <= ratio <= 1.05:
        return "square"
    if ratio > 1:
        return "wide (over 2:1)" if ratio > 2 else "landscape"
    return "portrait" if ratio >= 0.5 else "tall (over 1:2)"
