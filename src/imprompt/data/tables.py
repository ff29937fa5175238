"""Tables with random access to their rows: JSON lines, CSV, TSV, JSON and Parquet, as different tools write them."""

import csv
import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol

import numpy as np

from imprompt.data.captions import COLUMNS, decode_text, detect_encoding, normalize_column, parse_json
from imprompt.errors import UserError, summarize_error
from imprompt.utils.images import IMAGE_SUFFIXES

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
LIST_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
MAX_ROW_BYTES = 64 * 2**20
MAX_ROW_LINES = 1_000
MAX_GROUP_BYTES = 2**30  # of the row groups of a Parquet file that are kept in memory, and of a single one
_DELIMITERS = (",", ";", "\t", "|")
_DATA_ROLES = tuple(COLUMNS)


class Table(Protocol):
    """Rows by number. Reading one raises UserError where it is damaged."""

    name: str

    def __len__(self) -> int: ...
    def read_row(self, i: int, roles: Sequence[str] = _DATA_ROLES) -> Mapping[str, Any]:
        """The columns of a row; at least those that hold what these keys of COLUMNS name."""
        ...


def open_table(name: str, source: Path | bytes) -> Table:
    """A table by the suffix of its name, from a file or its content. Raises UserError where it cannot be read or has no image column."""
    suffix = Path(name).suffix.lower()
    try:
        if suffix == ".parquet":
            return ParquetTable(name, [source])
        if suffix == ".json":
            return open_json_table(name, source, parse_json_or_lines(name, source))
        return TextTable(name, source, is_json=suffix in (".jsonl", ".ndjson"), delimiter="\t" if suffix == ".tsv" else ",")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or summarize_error(error)})") from error


def has_role(columns: Sequence[object], role: str) -> bool:
    """Whether one of the columns holds what a key of COLUMNS names."""
    return any(normalize_column(column) in COLUMNS[role] for column in columns)


def check_columns(columns: Sequence[object], name: str) -> None:
    """Raise UserError where no column holds images."""
    if not has_role(columns, "target"):
        received = ", ".join(map(str, columns))[:200] or "none"
        is_row = any(str(column).strip().lower().endswith(IMAGE_SUFFIXES) for column in columns)
        hint = ": the first line has to name the columns, such as file_name,text" if is_row else ""
        raise UserError(f"{name} has no image column: expected {' or '.join(COLUMNS['target'])}, received {received}{hint}")


class TextTable:
    """A list in a text file: JSON lines, or CSV with any delimiter. Only the byte offsets of its rows are held in memory.

    UTF-16 is converted in memory. A row whose quotes do not match raises UserError when it is read, and ends with its line.
    """

    def __init__(self, name: str, source: Path | bytes, *, is_json: bool, delimiter: str = ","):
        self.name, self._source, self._is_json = name, _to_utf8(name, source), is_json
        self._header: list[str] = []
        self._dialect: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
        csv.field_size_limit(MAX_ROW_BYTES)
        with self._open() as file:
            if not is_json:
                self._dialect["delimiter"] = self._detect_delimiter(delimiter)
            self._offsets = np.fromiter(self._json_offsets(file) if is_json else self._csv_offsets(file), dtype=np.int64)
        if not is_json and self._header:
            check_columns(self._header, name)
        if not len(self._offsets):
            raise UserError(f"{name} holds no records")
        if is_json:
            check_columns(list(self.read_row(0)), name)

    def __len__(self) -> int:
        return len(self._offsets)

    def read_row(self, i: int, roles: Sequence[str] = _DATA_ROLES) -> Mapping[str, Any]:
        """All columns of a row. Raises UserError where it is damaged, or has more cells than the table has columns."""
        with self._open() as file:
            file.seek(int(self._offsets[i]))
            if self._is_json:
                return _check_object(parse_json(self._read_line(file), f"{self.name}, record {i + 1}"), f"{self.name}, record {i + 1}")
            return self._to_row(self._parse_row(file, _LineState(), f"{self.name}, record {i + 1}"), i)

    def _parse_row(self, file: BinaryIO, state: "_LineState", name: str) -> list[str]:
        """The cells of the next row. Raises UserError where its quotes do not match."""
        try:
            cells = next(csv.reader(self._decode_lines(file, state), **self._dialect), [])
            self._check_swallowed_rows(cells)
            return cells
        except csv.Error as error:
            raise UserError(f"{name}: {_describe_csv_error(error)}") from error

    def _to_row(self, cells: list[str], i: int) -> dict[str, str]:
        if any(cell.strip() for cell in cells[len(self._header) :]):
            raise UserError(
                f"{self.name}, record {i + 1} has {len(cells)} cells, and the table {len(self._header)} columns; put text that holds "
                f"{self._dialect['delimiter']!r} in double quotes"
            )
        row: dict[str, str] = {}
        for column, cell in zip(self._header, cells, strict=False):
            row[column] = row.get(column, "") or cell  # of a column that occurs twice, the first value
        return row

    def _open(self) -> BinaryIO:
        return io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source.open("rb")

    def _lines(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Offsets and lines, ended as on any system: LF, CR LF or CR."""
        offset = file.tell()
        while line := file.readline(MAX_ROW_BYTES):
            if len(line) == MAX_ROW_BYTES:
                raise UserError(f"{self.name} has a line over {MAX_ROW_BYTES // 2**20} MiB; expected one record per line")
            for part in line.splitlines(keepends=True):
                yield offset, part
                offset += len(part)

    def _read_line(self, file: BinaryIO) -> bytes:
        return next(line for _, line in self._lines(file))

    def _decode_lines(self, file: BinaryIO, state: "_LineState") -> Iterator[str]:
        """Lines for the CSV reader, up to MAX_ROW_LINES for a row."""
        for offset, line in self._lines(file):
            state.end, state.lines = offset + len(line), state.lines + 1
            if state.lines > MAX_ROW_LINES:
                return
            text = line.decode("utf-8", "surrogateescape")  # to_text refuses what is not UTF-8
            yield text.removeprefix("\ufeff") if offset == 0 else text

    def _json_offsets(self, file: BinaryIO) -> Iterator[int]:
        return (offset for offset, line in self._lines(file) if line.strip())

    def _detect_delimiter(self, default: str) -> str:
        """The delimiter with which the first line names an image column."""
        with self._open() as file:
            first = next(self._decode_lines(file, _LineState()), "")
        for delimiter in (default, *_DELIMITERS):
            if has_role(first.replace('"', "").split(delimiter), "target"):
                return delimiter
        return default

    def _csv_offsets(self, file: BinaryIO) -> Iterator[int]:
        """A quoted cell may span several lines: the lines that the CSV reader consumes tell where a row ends."""
        state = _LineState()
        self._header = [column.strip() for column in self._parse_row(file, state, f"{self.name}, line 1")]
        start: int | None = state.end
        while start is not None:
            start = yield from self._scan_rows(file, start)

    def _scan_rows(self, file: BinaryIO, start: int) -> Generator[int, None, int | None]:
        """The offsets of rows up to one whose quotes do not match, and that of the line after it; None at the end of the file."""
        file.seek(start)
        state = _LineState()
        try:
            for row in csv.reader(self._decode_lines(file, state), **self._dialect):
                self._check_swallowed_rows(row)
                if any(row):
                    yield start
                start, state.lines = state.end, 0
            return None
        except csv.Error:
            yield start  # reading it explains what is wrong
        file.seek(start)
        return start + len(self._read_line(file))

    def _check_swallowed_rows(self, row: list[str]) -> None:
        """Raise csv.Error where a cell holds lines that are rows themselves: a quote was opened by mistake."""
        width, delimiter = len(self._header), self._dialect["delimiter"]
        lines = (line.split(delimiter) for cell in row if "\n" in cell or "\r" in cell for line in cell.splitlines()[1:])
        if any(len(cells) >= width > 1 and any(c.strip().lower().endswith(IMAGE_SUFFIXES) for c in cells) for cells in lines):
            raise csv.Error("unexpected end of data")


@dataclass
class _LineState:
    """Where the CSV reader is in a file."""

    end: int = 0  # of the last line that it consumed
    lines: int = 0  # that it consumed for the current row


def _describe_csv_error(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return 'a double quote is opened and not closed; close it, or write ""'
    if "field larger" in str(error):
        return f"a cell has over {MAX_ROW_BYTES // 2**20} MiB; is a double quote opened and never closed?"
    return f'its double quotes do not match ({summarize_error(error)}); inside of a quoted cell, write ""'


def _to_utf8(name: str, source: Path | bytes) -> Path | bytes:
    """The content as UTF-8 where it is UTF-16 or 32, otherwise the source itself."""
    if isinstance(source, bytes):
        start = source[:4096]
    else:
        with source.open("rb") as file:
            start = file.read(4096)
    if detect_encoding(start) in ("utf-8", "utf-8-sig"):
        return source
    return decode_text(source if isinstance(source, bytes) else source.read_bytes(), name).encode()


def _check_object(row: object, name: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{name}: expected an object such as {{"target": …, "text": …}}, received {type(row).__name__}')
    return row


class JsonTable:
    """Rows that are in memory."""

    def __init__(self, name: str, rows: Sequence[object]):
        self.name, self._rows = name, rows
        if not rows:
            raise UserError(f"{name} holds no records")
        check_columns(list(self.read_row(0)), name)

    def __len__(self) -> int:
        return len(self._rows)

    def read_row(self, i: int, roles: Sequence[str] = _DATA_ROLES) -> Mapping[str, Any]:
        """All columns of a row. Raises UserError where it is no object."""
        return _check_object(self._rows[i], f"{self.name}, record {i + 1}")


def parse_json_or_lines(name: str, source: Path | bytes) -> object:
    """The content of a JSON file; None where it holds an object in each line instead. Raises UserError where it is neither."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        return parse_json(data, name)
    except UserError as error:
        if "Extra data" in str(error):
            return None
        raise


def open_json_table(name: str, source: Path | bytes, content: object) -> Table:
    """The list in a JSON file: an array of objects (the original IP-Adapter's data.json), an object of objects or captions by file name
    (kohya's metadata), or an object in each line. Raises UserError where it is none of these."""
    if content is None:
        return TextTable(name, source, is_json=True)
    if isinstance(content, list):
        return JsonTable(name, content)
    if isinstance(content, dict) and content and all(isinstance(entry, (dict, str, list)) for entry in content.values()):
        return JsonTable(name, [{**(e if isinstance(e, dict) else {"text": e}), "target": key} for key, e in content.items()])
    raise UserError(
        f'{name} holds no list that can be read; expected COCO captions, an array of objects such as {{"image_file": …, "text": …}}, or '
        "an object of captions by file name"
    )


class ParquetTable:
    """Parquet files, read by row group; the last ones that were read stay in memory."""

    def __init__(self, name: str, sources: Sequence[Path | bytes]):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError("Parquet needs pyarrow; install it with: pip install 'imprompt[data]'") from error
        self.name, self._lock = name, Lock()
        self._files = [_read_parquet(partial(_open_parquet, source), _name_of(source, name)) for source in sources]
        self._names = [_name_of(source, name) for source in sources]
        self._columns = _read_parquet(lambda: list(self._files[0].schema_arrow.names), name)
        check_columns(self._columns, name)
        self._groups = [(file, group) for file in range(len(self._files)) for group in range(self._files[file].num_row_groups)]
        self._ends = list(accumulate(self._files[file].metadata.row_group(group).num_rows for file, group in self._groups))
        self._cache: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        if not len(self):
            raise UserError(f"{name} holds no records")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read_row(self, i: int, roles: Sequence[str] = _DATA_ROLES) -> Mapping[str, Any]:
        """The columns of a row that have one of these roles. Raises UserError where its row group is damaged."""
        group = bisect_right(self._ends, i)
        names = {name for role in roles for name in COLUMNS[role]}
        columns = tuple(column for column in self._columns if normalize_column(column) in names)
        table = self._read_group(group, columns)
        row = i - (self._ends[group - 1] if group else 0)
        return _read_parquet(lambda: {name: table.column(name)[row].as_py() for name in columns}, f"{self.name}, record {i + 1}")

    def _read_group(self, number: int, columns: tuple[str, ...]) -> Any:
        with self._lock:
            key = (number, columns)
            if key not in self._cache:
                self._check_size(number)
                file, group = self._groups[number]
                self._cache[key] = _read_parquet(lambda: self._files[file].read_row_group(group, list(columns)), self._names[file])
                while sum(table.nbytes for table in self._cache.values()) > MAX_GROUP_BYTES and len(self._cache) > 1:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            return self._cache[key]

    def _check_size(self, number: int) -> None:
        file, group = self._groups[number]
        size = self._files[file].metadata.row_group(group).total_byte_size
        if size > MAX_GROUP_BYTES:
            raise UserError(
                f"{self._names[file]} has a row group of {size / 2**30:.1f} GiB; expected at most {MAX_GROUP_BYTES / 2**30:g}: "
                "write it with a smaller row_group_size"
            )


def _name_of(source: Path | bytes, name: str) -> str:
    return source.name if isinstance(source, Path) else name


def _open_parquet(source: Path | bytes) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(pyarrow.BufferReader(source) if isinstance(source, bytes) else pyarrow.memory_map(str(source)))


def _read_parquet(read: Callable[[], Any], name: str) -> Any:
    import pyarrow

    try:
        return read()
    except (OSError, ValueError, KeyError, IndexError, MemoryError, pyarrow.ArrowException) as error:  # ValueError: no UTF-8
        raise UserError(f"{name} is not a readable Parquet file ({summarize_error(error)})") from error
