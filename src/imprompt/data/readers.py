"""Readers: a folder, a list (JSON lines, CSV, Parquet), shards of img2dataset, the mini world."""

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

from imprompt.data.coco import Coco, is_coco
from imprompt.data.records import Record, Records
from imprompt.errors import UserError, brief
from imprompt.mini import world
from imprompt.utils.images import Picture

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LISTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
FIELDS = ("target", "text", "references", "mask", "subject")
_OTHER_NAMES = {  # columns of other tools → ours
    "image": "target", "image_file": "target", "file_name": "target", "path": "target", "image_path": "target",
    "caption": "text", "prompt": "text", "captions": "text", "reference": "references", "identity": "subject",
}  # fmt: skip


def is_mini(source: str) -> bool:
    """Whether data are the embedded world, or its first pictures."""
    return _MINI.fullmatch(source) is not None


_MINI = re.compile(r"mini(?::([1-9]\d*)(?:x([1-9]\d*))?)?")


def open_data(source: str | Path) -> Records:
    """The records at a place: `mini`, a folder, COCO, a list, or shards (`.tar`, a folder of them, `{00..99}.tar`, a URL).

    `mini:4000` is the first 4000 pictures of mini; `mini:4000x10` has ten photographs of each subject instead of four, with
    captions that say kind and place and nothing of the look. COCO is its captions' JSON file, or the folder that holds annotations/.
    Raises UserError where there is nothing, or nothing that is understood.
    """
    text = str(source)
    path = Path(text)
    if of_mini := _MINI.fullmatch(text):
        return Mini(int(of_mini[1] or Mini.ALL), photos=int(of_mini[2] or Mini.PHOTOS), look=not of_mini[2])
    if ".tar" in text.rsplit("/", 1)[-1] or "::" in text:
        return Shards.expand(text)
    if is_coco(path):
        return Coco(path)
    if path.is_dir():
        tars = sorted(str(p) for p in path.glob("*.tar"))
        return Shards(tars) if tars else Folder(path)
    if path.suffix.lower() in LISTS:
        if not path.is_file():
            raise UserError(f"no data at {path}")
        return Table(path) if path.suffix.lower() == ".parquet" else Lines(path)
    if not path.exists():
        raise UserError(f"no data at {source}; expected mini, a folder of pictures, a list ({', '.join(LISTS)}), or .tar shards")
    raise UserError(f"{path.name} is no data that can be read; expected a folder of pictures, a list ({', '.join(LISTS)}), or .tar shards")


class Folder:
    """Every picture below a folder; its caption is the text file of the same name. Subfolders name subjects."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = sorted(
            p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in IMAGES and _visible(p, folder)
        )
        if not self.names:
            raise UserError(
                f"no pictures in {folder}; expected files ending in {', '.join(IMAGES)}, with captions in .txt files beside them"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        path = self.folder / name
        caption = path.with_suffix(".txt")
        text = caption.read_text("utf-8", errors="replace").strip() if caption.is_file() else ""
        return Record(name, path, text, subject=self.subject_of(i))

    def subject_of(self, i: int) -> str | None:
        """The subfolder, without opening anything."""
        parent = Path(self.names[i]).parent.as_posix()
        return None if parent == "." else parent


def _visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


class Lines:
    """A list in a text file: JSON lines, CSV or TSV. Only the lines' positions are kept in memory.

    Paths are relative to the list's own folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._json = path.suffix.lower() in (".jsonl", ".ndjson")
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._columns: list[str] = []
        positions = self._json_positions() if self._json else self._csv_positions()
        self._at = np.fromiter(positions, dtype=np.int64)
        if not len(self._at):
            raise UserError(f"{path.name} holds no records")
        _check_columns(self._row(0), path.name)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, i: int) -> Record:
        return _record(self._row(i), f"{self.path.name}:{i + 1}", self.path.parent)

    def _json_positions(self) -> Iterator[int]:
        with self.path.open("rb") as file:
            at = 0
            for line in file:
                if line.strip():
                    yield at
                at += len(line)

    def _csv_positions(self) -> Iterator[int]:
        """A quoted field may run over several lines, so the reader itself says where a record ends."""
        at = 0

        def lines(file: io.BufferedReader) -> Iterator[str]:
            nonlocal at
            for line in file:
                first, at = at == 0, at + len(line)
                yield line.decode("utf-8-sig" if first else "utf-8", errors="replace")

        with self.path.open("rb") as file:
            reader = csv.reader(lines(file), delimiter=self._delimiter)
            self._columns = next(reader, [])
            start = at
            for row in reader:
                if any(row):
                    yield start
                start = at

    def _row(self, i: int) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self._at[i]))
            if self._json:
                try:
                    row = json.loads(file.readline())
                except ValueError as error:
                    raise UserError(f"{self.path.name}, record {i + 1} is not JSON ({brief(error)})") from error
                if not isinstance(row, dict):
                    raise UserError(f'{self.path.name}, record {i + 1}: expected an object such as {{"target": …, "text": …}}')
                return row
            text = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
            return dict(zip(self._columns, next(csv.reader(text, delimiter=self._delimiter)), strict=False))


class Table:
    """A Parquet file with a column of paths (or of the pictures' bytes)."""

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("Parquet needs pyarrow; install it with: pip install 'imprompt[data]'") from error
        self.path = path
        try:
            self._table = pyarrow.parquet.read_table(path, memory_map=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path.name} is not a readable Parquet file ({brief(error)})") from error
        if not len(self):
            raise UserError(f"{path.name} holds no records")
        _check_columns(dict.fromkeys(self._table.column_names), path.name)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> Record:
        row = {name: self._table.column(name)[i].as_py() for name in self._table.column_names}
        return _record(row, f"{self.path.name}:{i + 1}", self.path.parent)


def _check_columns(row: Mapping[str, Any], name: str) -> None:
    if "target" not in _renamed(row):
        raise UserError(
            f"{name} has no column for the picture: expected target (or {', '.join(k for k, v in _OTHER_NAMES.items() if v == 'target')}), "
            f"received {', '.join(map(str, row)) or 'none'}"
        )


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {_OTHER_NAMES.get(k, k): v for k, v in row.items()} | {k: v for k, v in row.items() if k in FIELDS}


def _record(row: Mapping[str, Any], key: str, folder: Path) -> Record:
    """A record from a row of a list. Raises UserError where the picture is missing or a field has the wrong type."""
    row = _renamed(row)
    if not row.get("target"):
        raise UserError(f"{key}: target is empty")
    references = row.get("references") or ()
    if isinstance(references, str):
        references = _listed(references, key) if references.startswith("[") else references.split("|")
    elif isinstance(references, (bytes, dict)):
        references = (references,)
    text = row.get("text") or ""
    if isinstance(text, (list, tuple)):
        text = text[0] if text else ""
    return Record(
        key,
        _place(row["target"], folder, key),
        str(text),
        tuple(_place(r, folder, key) for r in references),
        _place(row["mask"], folder, key) if row.get("mask") else None,
        str(row["subject"]) if row.get("subject") not in (None, "") else None,
    )


def _listed(text: str, key: str) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{key}: references are not JSON ({brief(error)})") from error
    return list(found)


def _place(value: Any, folder: Path, key: str) -> Picture:
    if isinstance(value, dict):  # a picture column of the datasets library: {"bytes": …, "path": …}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(f"{key}: expected a path, received {type(value).__name__}")
    return folder / value


class Shards:
    """WebDataset shards as img2dataset writes them: `000.jpg`, `000.txt`, `000.json` in tar files, local or streamed."""

    def __init__(self, shards: Sequence[str], lost: Callable[[str, str], None] | None = None):
        self.shards = list(shards)
        self.lost = lost or (lambda where, why: None)  # told of every shard and member that could not be read

    @classmethod
    def expand(cls, pattern: str) -> "Shards":
        """From a name with ranges in braces: `part-{0000..0099}.tar`."""
        from webdataset.shardlists import expand_urls

        shards = [shard for part in pattern.split("::") for shard in expand_urls(part)]
        local = [s for s in shards if "://" not in s and not s.startswith("pipe:")]
        if local and not any(Path(s).is_file() for s in local):
            raise UserError(f"no shards at {pattern}")
        return cls(shards)

    def read(self, shard: str) -> Iterator[Record]:
        """The records of one shard; what is damaged is reported to `lost` and left out."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        def note(error: Exception) -> bool:
            self.lost(shard, brief(error))
            return True

        try:
            stream = gopen(shard)
        except (OSError, ValueError) as error:
            note(error)
            return
        try:
            with closing(stream):
                for sample in group_by_keys(tar_file_expander([{"url": shard, "stream": stream}], handler=note), handler=note):
                    record = self._sample(sample, Path(shard).name)
                    if record:
                        yield record
        except OSError as error:  # a command or a server tells only at the end that it failed
            note(error)

    def _sample(self, sample: Mapping[str, Any], shard: str) -> Record | None:
        key = f"{shard}/{sample['__key__']}"
        picture = next((sample[s[1:]] for s in IMAGES if s[1:] in sample), None)
        if picture is None:
            self.lost(key, "no picture")
            return None
        text = sample.get("txt", sample.get("text", b"")).decode("utf-8", errors="replace").strip()
        about: dict[str, Any] = {}
        if "json" in sample:
            try:
                about = json.loads(sample["json"]) or {}
            except ValueError:
                self.lost(key, "its .json is damaged")
        text = text or str(about.get("caption") or about.get("text") or "")
        subject = about.get("subject")
        return Record(key, picture, text, subject=None if subject is None else str(subject))


class Mini:
    """The embedded world: subjects that mini was trained on, four photographs of each.

    Without `look`, captions say kind and place alone: what a subject looks like is for its photographs to tell.
    """

    PHOTOS, ALL = 4, 160_000

    def __init__(self, count: int = ALL, held_out: bool = False, photos: int = PHOTOS, look: bool = True):
        self.count, self.held_out, self.photos, self.look = count, held_out, photos, look

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _seeds(self) -> list[int]:
        return [s.seed for s in islice(world.subjects(self.held_out), -(-self.count // self.photos))]

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < self.count:
            raise IndexError(i)
        subject = world.subject(self._seeds[i // self.photos])
        where = world.scene(i + (world.HELD_OUT_SCENES if self.held_out else 0))
        rng = random.Random(f"mini {i}")
        look = rng.random() >= 0.15 and self.look
        text = world.caption(subject, where, rng) if look else world.photo_caption(subject, where, rng)
        return Record(f"mini:{i}", _photograph(subject, where), text, subject=str(subject.seed))

    def subject_of(self, i: int) -> str:
        """Whose photograph it is, without drawing it."""
        return str(self._seeds[i // self.photos])


_photograph = lru_cache(4_096)(world.draw)  # of several photographs of a subject each is drawn after the others
