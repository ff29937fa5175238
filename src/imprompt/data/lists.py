"""Lists: the rows of a table become records; paths are relative to the folder of the list."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imprompt.data.captions import Caption, is_missing, read_caption, select_columns, to_text
from imprompt.data.records import Record
from imprompt.data.tables import Table, TextTable
from imprompt.errors import UserError
from imprompt.utils.images import IMAGE_SUFFIXES, ImageInput

Resolve = Callable[[str], ImageInput]  # a path of a row → what it names


class ListRecords:
    """A list in a table. Records with an empty target, and values of a wrong type, raise UserError when they are read."""

    def __init__(self, table: Table, folder: Path):
        self.table, self.folder = table, folder
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        key = f"{self.table.name}:{i + 1}"
        row = self.table.read_row(i)
        return make_record(key, select_image(row, "target", key, self._resolve), row, self._resolve)

    def get_subject(self, i: int) -> str | None:
        """The subject of a record; no image is read. Raises UserError for a damaged row of a text file, which is read whole anyway."""
        return self[i].subject if isinstance(self.table, TextTable) else read_subject(self.table.read_row(i, ("subject",)))

    def get_caption(self, i: int) -> Caption:
        """The caption of a record; no image is read. Raises UserError for a text that is not UTF-8."""
        return read_caption(self.table.read_row(i, ("text",)))

    def _resolve(self, path: str) -> Path:
        return resolve_path(self.folder, path)


def resolve_path(folder: Path, path: str) -> Path:
    """The file that a list names: relative to its folder, with slashes of any system, also without the suffix of the image."""
    path = path.removeprefix("file://")
    candidates = [folder / path.strip(), folder / path, folder / path.replace("\\", "/")]
    candidates += [folder / (path + suffix) for suffix in IMAGE_SUFFIXES] if not Path(path).suffix else []
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), candidates[0])


def make_record(key: str, target: ImageInput, row: Mapping[str, Any], resolve: Resolve, caption: Caption | None = None) -> Record:
    """A record of an image, with the other values of its row. Raises UserError where a value has the wrong type."""
    masks = list(select_columns(row, "mask"))
    return Record(
        key, target, (caption or read_caption(row)).text, tuple(_read_references(row, key, resolve)),
        select_image(row, "mask", key, resolve) if masks else None, read_subject(row),
        caption_source=(caption or read_caption(row)).source,
    )  # fmt: skip


def read_subject(row: Mapping[str, Any]) -> str | None:
    """The subject of a row; None where it is missing."""
    return next((to_text(value) for _, value in select_columns(row, "subject")), None)


def select_image(row: Mapping[str, Any], role: str, key: str, resolve: Resolve) -> ImageInput:
    """The image in the columns of a role: of several, the first that exists. Raises UserError where there is none."""
    values = [value for _, value in select_columns(row, role) if not isinstance(value, (int, float))]
    if not values:
        raise UserError(f"{key}: {role} is empty")
    images = [_to_image(value, key, resolve) for value in values]
    return next((image for image in images if not isinstance(image, Path) or os.path.isfile(image)), images[0])


def _to_image(value: object, key: str, resolve: Resolve) -> ImageInput:
    if isinstance(value, dict):  # an image column of the datasets library: {"bytes": …, "path": …}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(f"{key}: expected a path, received {type(value).__name__}")
    if value.startswith(("http://", "https://", "s3://", "gs://", "data:")):
        raise UserError(f"{key}: expected a path, received a URL; download the images first, for example with img2dataset")
    return resolve(value)


def _read_references(row: Mapping[str, Any], key: str, resolve: Resolve) -> list[ImageInput]:
    """The references of a row: a list, a path, several with "|" between them, or a JSON list as text."""
    value = next((value for _, value in select_columns(row, "references")), None)
    if isinstance(value, str):
        value = _split_references(value, key, resolve)
    elif isinstance(value, (bytes, dict)):
        value = [value]
    if not isinstance(value, (list, tuple, type(None))):
        raise UserError(f"{key}: references: expected a list of paths, received {type(value).__name__}")
    return [_to_image(reference, key, resolve) for reference in value or () if not is_missing(reference)]


def _split_references(text: str, key: str, resolve: Resolve) -> list[Any]:
    whole = resolve(text)
    if isinstance(whole, Path) and os.path.isfile(whole):  # its name may hold any of these characters
        return [text]
    if text.startswith("[") and text.rstrip().endswith("]"):
        try:
            return list(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{key}: references are not JSON ({text[:40]})") from error
    return text.split("|")
