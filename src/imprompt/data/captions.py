"""Captions: what text files, columns and JSON of many tools hold becomes one text, or none."""

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from imprompt.errors import UserError, summarize_error

CAPTION_SUFFIXES = (".txt", ".caption", ".cap", ".json")  # of files next to an image, the first with a text wins
MAX_CAPTION_BYTES = 4 * 2**20
# The columns of a list and the keys of JSON, by what they hold. Where several have a value, the first of these names wins.
COLUMNS = {
    "target": (
        "target", "image", "image_file", "file_name", "image_file_name", "filename", "file", "path", "image_path", "file_path", "filepath",
    ),
    "text": ("text", "caption", "captions", "prompt", "description", "tags"),
    "references": ("references", "reference"),
    "mask": ("mask", "mask_file_name"),
    "subject": ("subject", "identity"),
}  # fmt: skip
_MISSING_WORDS = {"", "nan", "NaN", "None", "null", "NULL", "<NA>", "NaT", "N/A", "n/a", "#N/A"}  # as pandas and others write nothing
_BLANK = r"[\s\ufeff\u200b\u2060]+"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


class Caption(NamedTuple):
    """A caption and where it was found: the suffix of its file, or the name of a column or list. Both are empty without one."""

    text: str = ""
    source: str = ""


def detect_encoding(data: bytes) -> str:
    """UTF-8, or UTF-16 or 32 by the byte-order mark; without a mark, UTF-16 where every other byte is zero."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return encoding
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(data) > 1 and data[start::2].count(0) > len(data) / 4:
            return encoding
    return "utf-8"


def decode_text(data: bytes, name: str) -> str:
    """The content of a text file. Raises UserError where it is not UTF-8 or UTF-16: a guess would train on wrong letters."""
    try:
        text = data.decode(detect_encoding(data))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise UserError(f"{name} is not text in UTF-8 ({byte}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{name} is not text in UTF-8 (it holds zero bytes); save it as UTF-8")
    return text


def parse_json(data: bytes, name: str) -> object:
    """The content of a JSON file. Raises UserError where it is damaged or nested too deeply."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({summarize_error(error)})") from error


def is_missing(value: object) -> bool:
    """Whether a value stands for none: None, NaN, a blank text, a word such as "nan", an image of the datasets library without content."""
    if isinstance(value, str):
        return strip_blanks(value) in _MISSING_WORDS
    if isinstance(value, Mapping):
        return set(value) <= {"bytes", "path"} and not any(value.values())
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, (bytes, list, tuple)) and not value)


def strip_blanks(text: str) -> str:
    """The text without white space and invisible marks at its ends."""
    return re.sub(f"^{_BLANK}|{_BLANK}$", "", text)


def to_text(value: object) -> str:
    """A caption or a subject as text, "" for a missing one. Raises UserError for a text that is not UTF-8."""
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():  # a column of integers with a gap, as pandas writes it
        value = int(value)
    text = strip_blanks(str(value).replace("\r\n", "\n").replace("\r", "\n"))
    if "\0" in text or (not text.isascii() and re.search("[\ud800-\udfff]", text)):
        raise UserError(f"{text[:20]!r} … is not text in UTF-8; save it as UTF-8")
    return text


def read_caption_file(data: bytes, name: str) -> str:
    """The caption in a text or JSON file; "" for none. Raises UserError for other encodings, damaged JSON and labels of detectors."""
    if name.lower().endswith(".json"):
        return find_caption(parse_json(data, name))
    text = find_caption(decode_text(data, name))
    if re.fullmatch(r"(\d+(\s+-?\d*\.?\d+(e[-+]?\d+)?){4,}\s*)+", text):
        raise UserError(f"{name} holds numbers, as the labels of an object detector (YOLO); expected a caption")
    return text


def find_caption(value: object, depth: int = 3) -> str:
    """The first text in a value: in a list its first element with one, in an object the first of the names in COLUMNS; "" if there is none.

    A list may also be written as text, `["a cat", "a small cat"]`. Raises UserError for a text that is not UTF-8.
    """
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):
        value = _parse_or_keep(value)
    if isinstance(value, bytes):
        value = decode_text(value, "a caption")
    if not isinstance(value, (Mapping, list, tuple)):
        return to_text(value)
    values = [v for _, v in select_columns(value, "text")] if isinstance(value, Mapping) else value
    return next(filter(None, (find_caption(v, depth - 1) for v in values)), "") if depth else ""


def _parse_or_keep(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def normalize_column(name: object) -> str:
    """The name of a column in small letters, without blanks at its ends."""
    return re.sub(r"[\s-]+", "_", strip_blanks(str(name)).casefold())


def select_columns(row: Mapping[str, object], role: str) -> Iterator[tuple[str, object]]:
    """The columns of a row that have a value and hold what a key of COLUMNS names, in the order of that row of COLUMNS."""
    by_name: dict[str, tuple[str, object]] = {}
    for column, value in row.items():
        if not is_missing(value):
            by_name.setdefault(normalize_column(column), (str(column), value))
    return (by_name[name] for name in COLUMNS[role] if name in by_name)


def read_caption(row: Mapping[str, object], source: str = "") -> Caption:
    """The caption of a row of a list, by default with the column as source. Raises UserError for a text that is not UTF-8."""
    for column, value in select_columns(row, "text"):
        if text := find_caption(value):
            return Caption(text, source or f"column {column}")
    return Caption()
