"""Readers of records: what a source names, as a folder, a list, COCO, shards, or the world of mini."""

import glob
import os
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

from imprompt.data.coco import CocoCaptions, is_coco, is_coco_content
from imprompt.data.collection import get_suffix
from imprompt.data.folders import FolderFiles, ImageFolder
from imprompt.data.lists import ListRecords
from imprompt.data.records import Record, Records
from imprompt.data.shards import WebDatasetShards, is_remote, is_shard
from imprompt.data.tables import LIST_SUFFIXES, ParquetTable, open_json_table, open_table, parse_json_or_lines
from imprompt.errors import UserError, redact_secrets, summarize_error
from imprompt.mini import world
from imprompt.utils.images import IMAGE_SUFFIXES

__all__ = ["ImageFolder", "MiniWorld", "WebDatasetShards", "open_data"]

_EXPECTED = f"a folder of images, a list ({', '.join((*LIST_SUFFIXES, '.json'))}), or .tar shards"
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_MINI = re.compile(r"mini(?::([1-9]\d*)(?:x([1-9]\d*))?)?")


def open_data(source: str | Path) -> Records:
    """The records of `mini`, a folder, COCO, a list, or shards (`.tar`, a folder of them, `{00..99}.tar`, a URL).

    `mini:4000` is the first 4000 images of mini; `mini:4000x10` has ten images of each subject instead of four, with captions that
    name category and background but do not describe the appearance. COCO is the JSON file of its captions, or the folder with
    annotations/. A folder of the hub has data/train-*.parquet. Raises UserError where there is no data, or none that can be read.
    """
    text = str(source)
    if match := _MINI.fullmatch(text):
        count, images_per_subject = int(match[1] or MiniWorld.SIZE), int(match[2] or MiniWorld.IMAGES_PER_SUBJECT)
        return MiniWorld(count, images_per_subject=images_per_subject, describe_appearance=not match[2])
    try:
        return _open_path(Path(text).expanduser(), text)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or summarize_error(error)
        raise UserError(f"{redact_secrets(text)[:200]} cannot be read ({reason})") from error


def _open_path(path: Path, text: str) -> Records:
    if os.path.isdir(path):
        return CocoCaptions(path) if is_coco(path) else _open_folder(path)
    if is_remote(text) or is_shard(text) or "::" in text:
        return WebDatasetShards.expand(text)
    if not os.path.exists(path):
        if files := [Path(file) for file in sorted(glob.glob(str(path))) if file.lower().endswith(".parquet")]:
            return ListRecords(ParquetTable(path.name, files), path.parent)
        raise UserError(f"no data at {text[:200]}; expected mini, {_EXPECTED}")
    if not os.path.isfile(path) or path.suffix.lower() not in (*LIST_SUFFIXES, ".json"):
        raise UserError(f"{path.name} is no data that can be read; expected {_EXPECTED}")
    return _open_list(path)


def _open_list(path: Path) -> Records:
    if path.suffix.lower() != ".json":
        return ListRecords(open_table(path.name, path), path.parent)
    content = parse_json_or_lines(path.name, path)
    if is_coco_content(content):
        return CocoCaptions(path, content)
    return ListRecords(open_json_table(path.name, path, content), path.parent)


def _open_folder(folder: Path) -> Records:
    """Images, shards or Parquet files with images. Raises UserError, which asks, where a folder holds more than one of these."""
    if folder.resolve().parent == folder.resolve():
        raise UserError(f"data: expected {_EXPECTED}; received {folder}, which is all files of this computer")
    files = FolderFiles(folder)
    images = [name for name in files.names if get_suffix(name) in IMAGE_SUFFIXES]
    shards = [name for name in files.names if is_shard(name)]
    tables = [name for name in files.names if get_suffix(name) == ".parquet"]
    if images and shards:
        raise UserError(
            f"{folder} holds {len(images)} images and {len(shards)} archives ({shards[0]} …); name one: {folder}/*.tar as a pattern "
            f"such as {folder}/{shards[0]}, or a folder with the images alone"
        )
    if shards:
        return WebDatasetShards([str(folder / name) for name in shards])
    if tables and not images:
        chosen = _select_split(folder, tables)
        return ListRecords(ParquetTable(folder.name, [folder / name for name in chosen]), folder)
    return ImageFolder(folder, files)


def _select_split(folder: Path, tables: Sequence[str]) -> list[str]:
    """The only split of a folder of Parquet files, as the hub names them. Raises UserError, which asks, where there are several."""
    by_split = defaultdict[str, list[str]](list)
    for name in tables:
        found = _SPLIT.match(PurePosixPath(name).name) or _SPLIT.match(PurePosixPath(name).parent.name)
        by_split[found[1].lower() if found else ""].append(name)
    if len(by_split) > 1:
        patterns = ", ".join(str(folder / _to_pattern(names[0], split)) for split, names in by_split.items())
        raise UserError(f"{folder} holds several splits; name one: {patterns}")
    return list(tables)


def _to_pattern(name: str, split: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{split}*.parquet")) if path.name.lower().startswith(split) else f"{path.parent}/*.parquet"


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
        caption = sample_caption(subject, scene, rng)
        return Record(f"mini:{i}", _render_cached(subject, scene), caption, subject=str(subject.seed), caption_source="mini")

    def get_subject(self, i: int) -> str:
        """The subject of an image; nothing is rendered."""
        return str(self._subject_seeds[i // self.images_per_subject])


_render_cached = lru_cache(4_096)(world.render)  # by subject, every image is also a reference of several others
