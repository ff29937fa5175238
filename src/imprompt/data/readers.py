"""Readers of records: a folder, a list (JSON lines, CSV, Parquet), shards of img2dataset, the world of mini."""

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from imprompt.data.coco import CocoCaptions, is_coco
from imprompt.data.records import Record, Records
from imprompt.errors import UserError, summarize_error
from imprompt.mini import world
from imprompt.utils.images import IMAGE_SUFFIXES, ImageInput

LIST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COLUMNS = ("target", "text", "references", "mask", "subject")
_COLUMN_ALIASES = {  # columns of other tools
    "image": "target", "image_file": "target", "file_name": "target", "path": "target", "image_path": "target",
    "caption": "text", "prompt": "text", "captions": "text", "reference": "references", "identity": "subject",
}  # fmt: skip


_MINI = re.compile(r"mini(?::([1-9]\d*)(?:x([1-9]\d*))?)?")


def open_data(source: str | Path) -> Records:
    """The records of `mini`, a folder, COCO, a list, or shards (`.tar`, a folder of them, `{00..99}.tar`, a URL).

    `mini:4000` is the first 4000 images of mini; `mini:4000x10` has ten images of each subject instead of four, with captions that
    name category and background but do not describe the appearance. COCO is the JSON file of its captions, or the folder with
    annotations/. Raises UserError where there is no data, or none that can be read.
    """
    text = str(source)
    path = Path(text)
    if match := _MINI.fullmatch(text):
        count, images_per_subject = int(match[1] or MiniWorld.SIZE), int(match[2] or MiniWorld.IMAGES_PER_SUBJECT)
        return MiniWorld(count, images_per_subject=images_per_subject, describe_appearance=not match[2])
    if ".tar" in text.rsplit("/", 1)[-1] or "::" in text:
        return WebDatasetShards.expand(text)
    if is_coco(path):
        return CocoCaptions(path)
    if path.is_dir():
        tars = sorted(str(p) for p in path.glob("*.tar"))
        return WebDatasetShards(tars) if tars else ImageFolder(path)
    if path.suffix.lower() in LIST_SUFFIXES:
        if not path.is_file():
            raise UserError(f"no data at {path}")
        return ParquetTable(path) if path.suffix.lower() == ".parquet" else TextList(path)
    if not path.exists():
        raise UserError(f"no data at {source}; expected mini, a folder of images, a list ({', '.join(LIST_SUFFIXES)}), or .tar shards")
    expected = f"a folder of images, a list ({', '.join(LIST_SUFFIXES)}), or .tar shards"
    raise UserError(f"{path.name} is no data that can be read; expected {expected}")


class ImageFolder:
    """All images below a folder, with captions in text files of the same name; subfolders are subjects."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = sorted(
            p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and _is_visible(p, folder)
        )
        if not self.names:
            raise UserError(
                f"no images in {folder}; expected files ending in {', '.join(IMAGE_SUFFIXES)}, with captions in .txt files of the same name"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        path = self.folder / name
        caption_file = path.with_suffix(".txt")
        caption = caption_file.read_text("utf-8", errors="replace").strip() if caption_file.is_file() else ""
        return Record(name, path, caption, subject=self.get_subject(i))

    def get_subject(self, i: int) -> str | None:
        """The subfolder of an image; no file is opened."""
        parent = Path(self.names[i]).parent.as_posix()
        return None if parent == "." else parent


def _is_visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


class TextList:
    """A list in a text file: JSON lines, CSV or TSV. Only the byte offsets of its records are held in memory.

    Paths are relative to the folder of the list.
    """

    def __init__(self, path: Path):
        self.path = path
        self._json = path.suffix.lower() in (".jsonl", ".ndjson")
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._columns: list[str] = []
        self._offsets = np.fromiter(self._json_offsets() if self._json else self._csv_offsets(), dtype=np.int64)
        if not len(self._offsets):
            raise UserError(f"{path.name} holds no records")
        _check_columns(self._read_row(0), path.name)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> Record:
        return _make_record(self._read_row(i), f"{self.path.name}:{i + 1}", self.path.parent)

    def _json_offsets(self) -> Iterator[int]:
        with self.path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    yield offset
                offset += len(line)

    def _csv_offsets(self) -> Iterator[int]:
        """A quoted field may span several lines: the lines that the CSV reader consumes tell where a record ends."""
        offset = 0

        def decode_lines(file: io.BufferedReader) -> Iterator[str]:
            nonlocal offset
            for line in file:
                first, offset = offset == 0, offset + len(line)
                yield line.decode("utf-8-sig" if first else "utf-8", errors="replace")

        with self.path.open("rb") as file:
            reader = csv.reader(decode_lines(file), delimiter=self._delimiter)
            self._columns = next(reader, [])
            start = offset
            for row in reader:
                if any(row):
                    yield start
                start = offset

    def _read_row(self, i: int) -> Mapping[str, object]:
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[i]))
            if self._json:
                try:
                    row = json.loads(file.readline())
                except ValueError as error:
                    raise UserError(f"{self.path.name}, record {i + 1} is not JSON ({summarize_error(error)})") from error
                if not isinstance(row, dict):
                    raise UserError(f'{self.path.name}, record {i + 1}: expected an object such as {{"target": …, "text": …}}')
                return row
            text = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
            return dict(zip(self._columns, next(csv.reader(text, delimiter=self._delimiter)), strict=False))


class ParquetTable:
    """A Parquet file with a column of image paths or image bytes."""

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("Parquet needs pyarrow; install it with: pip install 'imprompt[data]'") from error
        self.path = path
        try:
            self._table = pyarrow.parquet.read_table(path, memory_map=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path.name} is not a readable Parquet file ({summarize_error(error)})") from error
        if not len(self):
            raise UserError(f"{path.name} holds no records")
        _check_columns(dict.fromkeys(self._table.column_names), path.name)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> Record:
        row = {name: self._table.column(name)[i].as_py() for name in self._table.column_names}
        return _make_record(row, f"{self.path.name}:{i + 1}", self.path.parent)


def _check_columns(row: Mapping[str, object], name: str) -> None:
    if "target" not in _resolve_aliases(row):
        aliases = ", ".join(alias for alias, column in _COLUMN_ALIASES.items() if column == "target")
        columns = ", ".join(map(str, row)) or "none"
        raise UserError(f"{name} has no image column: expected target (or {aliases}), received {columns}")


def _resolve_aliases(row: Mapping[str, object]) -> dict[str, Any]:
    return {_COLUMN_ALIASES.get(k, k): v for k, v in row.items()} | {k: v for k, v in row.items() if k in COLUMNS}


def _make_record(row: Mapping[str, object], key: str, folder: Path) -> Record:
    """A record from a row of a list. Raises UserError where the image is missing or a value has the wrong type."""
    row = _resolve_aliases(row)
    if not row.get("target"):
        raise UserError(f"{key}: target is empty")
    references = row.get("references") or ()
    if isinstance(references, str):
        references = _parse_json_list(references, key) if references.startswith("[") else references.split("|")
    elif isinstance(references, (bytes, dict)):
        references = (references,)
    caption = row.get("text") or ""
    if isinstance(caption, (list, tuple)):
        caption = caption[0] if caption else ""
    return Record(
        key,
        _resolve_image(row["target"], folder, key),
        str(caption),
        tuple(_resolve_image(r, folder, key) for r in references),
        _resolve_image(row["mask"], folder, key) if row.get("mask") else None,
        str(row["subject"]) if row.get("subject") not in (None, "") else None,
    )


def _parse_json_list(text: str, key: str) -> list[object]:
    try:
        return list(json.loads(text))
    except ValueError as error:
        raise UserError(f"{key}: references are not JSON ({summarize_error(error)})") from error


def _resolve_image(value: object, folder: Path, key: str) -> ImageInput:
    if isinstance(value, dict):  # an image column of the datasets library: {"bytes": …, "path": …}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(f"{key}: expected a path, received {type(value).__name__}")
    return folder / value


class WebDatasetShards:
    """WebDataset shards as img2dataset writes them: `000.jpg`, `000.txt`, `000.json` in tar files, local or streamed.

    `on_unreadable(key, reason)` is called for every shard and every sample that cannot be read.
    """

    def __init__(self, shards: Sequence[str], on_unreadable: Callable[[str, str], None] = lambda key, reason: None):
        self.shards = list(shards)
        self.on_unreadable = on_unreadable

    @classmethod
    def expand(cls, pattern: str) -> "WebDatasetShards":
        """The shards of a pattern with ranges in braces: `part-{0000..0099}.tar`."""
        from webdataset.shardlists import expand_urls

        shards = [shard for part in pattern.split("::") for shard in expand_urls(part)]
        local = [s for s in shards if "://" not in s and not s.startswith("pipe:")]
        if local and not any(Path(s).is_file() for s in local):
            raise UserError(f"no shards at {pattern}")
        return cls(shards)

    def read_shard(self, shard: str) -> Iterator[Record]:
        """The records of one shard; damaged samples are reported and skipped."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        def report(error: Exception) -> bool:
            self.on_unreadable(shard, summarize_error(error))
            return True

        try:
            stream = gopen(shard)
        except (OSError, ValueError) as error:
            report(error)
            return
        try:
            with closing(stream):
                files = tar_file_expander([{"url": shard, "stream": stream}], handler=report)
                for sample in group_by_keys(files, handler=report):
                    record = self._make_record(sample, Path(shard).name)
                    if record:
                        yield record
        except OSError as error:  # a command or a server fails only at the end of the stream
            report(error)

    def _make_record(self, sample: Mapping[str, Any], shard: str) -> Record | None:
        key = f"{shard}/{sample['__key__']}"
        image = next((sample[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample), None)
        if image is None:
            self.on_unreadable(key, "no image")
            return None
        caption = sample.get("txt", sample.get("text", b"")).decode("utf-8", errors="replace").strip()
        metadata: dict[str, Any] = {}
        if "json" in sample:
            try:
                metadata = json.loads(sample["json"]) or {}
            except ValueError:
                self.on_unreadable(key, "its .json is damaged")
        caption = caption or str(metadata.get("caption") or metadata.get("text") or "")
        subject = metadata.get("subject")
        return Record(key, image, caption, subject=None if subject is None else str(subject))


class MiniWorld:
    """The procedural world of mini: subjects of its training split, or of its test split with `held_out`.

    Captions describe the appearance of 85 % of the images; with `describe_appearance=False`, of none.
    """

    IMAGES_PER_SUBJECT, SIZE = 4, 160_000

    def __init__(
        self,
        count: int = SIZE,
        *,
        held_out: bool = False,
        images_per_subject: int = IMAGES_PER_SUBJECT,
        describe_appearance: bool = True,
    ):
        self.count, self.held_out = count, held_out
        self.images_per_subject, self.describe_appearance = images_per_subject, describe_appearance

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _subject_seeds(self) -> list[int]:
        subjects = world.iterate_subjects(held_out=self.held_out)
        return [subject.seed for subject in islice(subjects, -(-self.count // self.images_per_subject))]

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < self.count:
            raise IndexError(i)
        subject = world.make_subject(self._subject_seeds[i // self.images_per_subject])
        scene = world.make_scene(i + (world.HELD_OUT_SCENES if self.held_out else 0))
        rng = random.Random(f"mini {i}")
        sample_caption = world.sample_caption if rng.random() >= 0.15 and self.describe_appearance else world.sample_scene_caption
        return Record(f"mini:{i}", _render_cached(subject, scene), sample_caption(subject, scene, rng), subject=str(subject.seed))

    def get_subject(self, i: int) -> str:
        """The subject of an image; nothing is rendered."""
        return str(self._subject_seeds[i // self.images_per_subject])


_render_cached = lru_cache(4_096)(world.render)  # by subject, every image is also a reference of several others
