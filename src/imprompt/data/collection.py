"""Images among named files, of a folder or an archive, each with its caption: from a file of its own, or from a list among the files."""

import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from imprompt.data.captions import (
    CAPTION_SUFFIXES,
    Caption,
    is_missing,
    parse_json,
    read_caption,
    read_caption_file,
    select_columns,
)
from imprompt.data.lists import make_record, read_subject
from imprompt.data.records import Record
from imprompt.data.tables import LIST_SUFFIXES, Table
from imprompt.errors import UserError, summarize_error
from imprompt.utils.images import IMAGE_SUFFIXES, ImageInput

CAPTION_FOLDERS = {"caption", "captions", "text", "texts", "txt", "prompt", "prompts", "tags", "json"}  # next to images/
Row = tuple[Table, int]


class ImageCollection:
    """The images among named files.

    The caption of an image is the first text in: the files with its name and one of CAPTION_SUFFIXES in any case (`name.png.txt`,
    then `name.txt`), also in a folder captions/ instead of images/; the lists among the files that name it, metadata.* first.
    `read` returns the content of a file, `open_table` opens a list; `resolve` makes an image of a file's name.
    Files that are not used are counted in `skipped`, by kind.
    """

    def __init__(
        self,
        names: Iterable[str],
        read: Callable[[str], bytes],
        open_table: Callable[[str], Table],
        resolve: Callable[[str], ImageInput],
    ):
        self._read, self._resolve = read, resolve
        names = list(names)
        images = [name for name in names if get_suffix(name) in IMAGE_SUFFIXES]
        self.skipped: Counter[str] = Counter()
        self.orphans: list[str] = []  # caption files without an image
        self._caption_files = match_caption_files(images, [name for name in names if get_suffix(name) in CAPTION_SUFFIXES])
        used = {name for files in self._caption_files.values() for name in files}
        others = [name for name in names if get_suffix(name) not in IMAGE_SUFFIXES and name not in used]
        self._rows: dict[str, list[Row]] = defaultdict(list)
        self._auxiliary: set[str] = set()  # images that a list names only as mask or reference
        self._read_lists(images, others, open_table)
        self.images = [name for name in images if name not in self._auxiliary]
        if self._auxiliary:
            self.skipped["masks and references of others"] = len(self._auxiliary)

    def __len__(self) -> int:
        return len(self.images)

    def has_caption(self, name: str) -> bool:
        """Whether a file or a list may hold a caption of an image; nothing is read."""
        return name in self._caption_files or name in self._rows

    def get_caption(self, name: str) -> Caption:
        """The caption of an image. Raises UserError where a file with its name, or the list, is no text in UTF-8 or no JSON."""
        for file in self._caption_files.get(name, ()):
            if text := read_caption_file(self._read(file), file):
                return Caption(text, get_suffix(file))
        captions = (read_caption(table.read_row(i, ("text",)), table.name) for table, i in self._rows.get(name, ()))
        return next((caption for caption in captions if caption.text), Caption())

    def get_subject(self, name: str) -> str | None:
        """The subject of an image by a list, or by a JSON file with its name; None otherwise."""
        rows = (read_subject(table.read_row(i, ("subject",))) for table, i in self._rows.get(name, ()))
        return next(filter(None, rows), None) or read_subject(self._json_of(name))

    def make_record(self, name: str, key: str, target: ImageInput, folder_subject: str | None = None) -> Record:
        """The record of an image. Raises UserError where its caption cannot be read, or a value has the wrong type."""
        table, i = next(iter(self._rows.get(name, ())), (None, 0))
        row: Mapping[str, Any] = table.read_row(i, ("references", "mask")) if table else {}
        folder = posixpath.dirname(table.name) if table else ""
        row = {column: value for role in ("references", "mask") for column, value in select_columns(row, role)}
        subject = self.get_subject(name) or folder_subject
        row |= {"subject": subject} if subject else {}
        return make_record(key, target, row, lambda path: self._resolve(_join(folder, path)), self.get_caption(name))

    def _json_of(self, name: str) -> Mapping[str, Any]:
        file = next((file for file in self._caption_files.get(name, ()) if get_suffix(file) == ".json"), None)
        if file is None:
            return {}
        try:
            content = parse_json(self._read(file), file)
        except UserError:
            self.skipped["damaged .json"] += 1
            return {}
        return content if isinstance(content, Mapping) else {}

    def _read_lists(self, images: Sequence[str], others: Sequence[str], open_table: Callable[[str], Table]) -> None:
        index = NameIndex(images)
        targets, mentioned = set[str](), set[str]()
        for name in sorted(others, key=_list_priority):
            if get_suffix(name) not in (*LIST_SUFFIXES, ".json"):
                if get_suffix(name) in CAPTION_SUFFIXES:
                    self.orphans.append(name)
                else:
                    self.skipped[get_suffix(name) or "without a suffix"] += 1
                continue
            try:
                table = open_table(name)
                named = self._add_table(table, index, targets, mentioned)
            except UserError as error:
                self.skipped[f"{name}: {summarize_error(error)}"] += 1
                continue
            if not named:
                self.skipped[f"{name}: it names no image here"] += 1
        self._auxiliary = mentioned - targets

    def _add_table(self, table: Table, index: "NameIndex", targets: set[str], mentioned: set[str]) -> bool:
        """Note which row belongs to which image; whether any does."""
        folder = posixpath.dirname(table.name)
        named = dict[int, list[str]]()  # by row, the paths of its image
        for i in range(len(table)):
            try:
                row = table.read_row(i, ("target", "mask", "references"))
            except UserError as error:
                self.skipped[summarize_error(error)] += 1
                continue
            named[i] = [path for _, value in select_columns(row, "target") if (path := _to_path(value))]
            mentioned |= {image for path in _paths_of(row) if (image := index.find(_join(folder, path)))}
        found = index.find_all(folder, named)
        for i, image in found.items():
            if any(known is table for known, _ in self._rows[image]):
                self.skipped[f"further captions of the same image in {table.name}"] += 1
            self._rows[image].append((table, i))
        targets |= set(found.values())
        if found and len(found) < len(named):
            self.skipped[f"rows of {table.name} without an image here"] += len(named) - len(found)
        return bool(found)


class NameIndex:
    """Images by name: as it is written, in another case or Unicode form, or without the suffix where that is unambiguous."""

    def __init__(self, images: Sequence[str]):
        self._exact = set(images)
        self._folded, self._stems = _group(images, _fold), _group(images, lambda name: _fold(_stem(name)))

    def find(self, name: str) -> str | None:
        """The image of this name; None where there is none, or there are several."""
        if name in self._exact:
            return name
        for group, key in ((self._folded, _fold(name)), (self._stems, _fold(name))):
            if len(found := group.get(key, [])) == 1:
                return found[0]
        return None

    def find_all(self, folder: str, paths: Mapping[int, Sequence[str]]) -> dict[int, str]:
        """The image of each row; its paths are relative to the folder, or absolute on the machine where the list was written."""
        absolute = [path.replace("\\", "/") for candidates in paths.values() for path in candidates if _is_absolute(path)]
        prefix = posixpath.commonpath([posixpath.dirname(path) for path in absolute]) if absolute else ""
        while True:
            found = {i: image for i, candidates in paths.items() if (image := self._find_first(folder, prefix, candidates))}
            if found or prefix == posixpath.dirname(prefix):
                return found
            prefix = posixpath.dirname(prefix)

    def _find_first(self, folder: str, prefix: str, paths: Sequence[str]) -> str | None:
        relative = (posixpath.relpath(path.replace("\\", "/"), prefix) if _is_absolute(path) else _join(folder, path) for path in paths)
        return next((image for path in relative if (image := self.find(path))), None)


def match_caption_files(images: Sequence[str], files: Sequence[str]) -> dict[str, list[str]]:
    """The caption files of each image in the order in which they count: `name.png.txt` before `name.txt`, in the order of suffixes."""
    full, stems = _group(images, _fold), _group(images, lambda name: _fold(_stem(name)))
    ranked: dict[str, list[tuple[bool, int, str]]] = defaultdict(list)
    left = []
    for file in files:
        stem = _stem(file)
        by_full = full.get(_fold(stem), [])
        owners = by_full or stems.get(_fold(stem), [])
        exact = [image for image in owners if stem in (image, _stem(image))]
        for image in exact or owners:
            ranked[image].append((not by_full, CAPTION_SUFFIXES.index(get_suffix(file)), file))
        if not owners:
            left.append(file)
    for file, image in _match_caption_folders([image for image in images if image not in ranked], left):
        ranked[image].append((True, CAPTION_SUFFIXES.index(get_suffix(file)), file))
    return {image: [file for *_, file in sorted(found)] for image, found in ranked.items()}


def _match_caption_folders(images: Sequence[str], files: Sequence[str]) -> list[tuple[str, str]]:
    """Caption files in a folder such as captions/, and the only image with the same path but for that folder."""
    by_path: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for image in images if files else ():
        parts = PurePosixPath(_fold(_stem(image))).parts
        by_path[parts].append(image)
        for n in range(len(parts) - 1):
            by_path[(*parts[:n], "*", *parts[n + 1 :])].append(image)
    found = []
    for file in files:
        parts = PurePosixPath(_fold(_stem(file))).parts
        for n in (n for n in range(len(parts) - 1) if parts[n] in CAPTION_FOLDERS):
            owners = by_path.get((*parts[:n], "*", *parts[n + 1 :])) or by_path.get(parts[:n] + parts[n + 1 :], [])
            found += [(file, owners[0])] if len(owners) == 1 else []
    return found


def get_suffix(name: str) -> str:
    """The suffix of a file's name in small letters."""
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return name[: len(name) - len(PurePosixPath(name).suffix)]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _group(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def _list_priority(name: str) -> tuple[bool, bool, str]:
    """metadata.* first, then captions.*, then other lists."""
    stem = PurePosixPath(name).stem.lower()
    return stem != "metadata", stem not in ("caption", "captions"), name


def _join(folder: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(folder, path.strip().replace("\\", "/")))


def _to_path(value: object) -> str | None:
    """The path in the image column of a row."""
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) else None


def _is_absolute(path: str) -> bool:
    return path.startswith(("/", "\\")) or path[1:3] in (":\\", ":/")


def _paths_of(row: Mapping[str, Any]) -> Iterable[str]:
    """The paths of masks and references in a row."""
    for role in ("mask", "references"):
        for _, value in select_columns(row, role):
            for item in value if isinstance(value, (list, tuple)) else str(value).split("|") if isinstance(value, str) else ():
                if isinstance(item, str) and not is_missing(item):
                    yield item
