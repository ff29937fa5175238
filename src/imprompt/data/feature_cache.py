"""The feature cache: what the frozen parts say of every record, on disk in shards of safetensors.

    cache.json              what was encoded, with what; how many chunks there are
    probe.safetensors       what the encoders said to a small fixed input: whoever trains from it must have the same ones
    00012.json              chunk 12 is complete: its files, their records and subjects, what was lost
    00012-0.safetensors     its records, all of one shape: mean, std, image, sizes, weight; states and pooled of the
                            distinct captions, and for each record which one; names and captions as UTF-8

A chunk is made whole or not at all, so any number of processes can encode, and a build that was killed goes on. Records
are read one by one and never mapped: memory stays flat.
"""

import json
import random
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprompt.data.records import Counted
from imprompt.data.subjects import Identities
from imprompt.data.transforms import spread
from imprompt.errors import UserError, brief
from imprompt.utils.files import atomic_path, write_file

VERSION = 1
_TEXT = ("utf-8", "surrogatepass")  # names of files may be anything
ABOUT, PROBE = "cache.json", "probe.safetensors"


class Row(NamedTuple):
    """One record as the denoiser is trained on it."""

    mean: Tensor  # (channels, height, width): the VAE's posterior, scaled
    std: Tensor
    states: Tensor  # (tokens, cross): of the text
    pooled: Tensor | None  # (width,): SDXL
    image: Tensor  # (references, patches, features)
    sizes: Tensor  # (6,): original height and width, top, left, height, width
    weight: Tensor | None  # (1, height, width): the mask
    text: str
    key: str
    seed: int = 0
    subject: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)


class Stored(NamedTuple):
    """A row before it is read: what a loader needs to name it."""

    key: str
    at: int
    others: tuple[int, ...] = ()  # rows of the same subject: its references


class Cache:
    """A finished cache: rows by number, in no order that matters."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = about(self.folder)
        self._files: list[Path] = []
        counts = []
        for chunk in range(self.about["chunks"]):
            for name, count in _sidecar(self.folder, chunk)["files"].items():
                self._files.append(self.folder / name)
                counts.append(count)
        self._ends = list(accumulate(counts))
        if not self._ends:
            raise UserError(f"the cache in {self.folder} holds no records")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Stored:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return Stored(f"{self.folder.name}:{i}", i)

    def row(self, i: int, seed: int = 0) -> Row:
        """Read one row. Raises UserError where its file is missing or damaged."""
        path, k = self._place(i)
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())

                def one(name: str, at: int = k) -> Any:
                    return file.get_slice(name)[at] if name in names else None

                caption, begin, middle, end = one("words").tolist()
                letters = bytes(file.get_slice("letters")[begin:end].tolist())
                key, text = (part.decode(*_TEXT) for part in (letters[: middle - begin], letters[middle - begin :]))
                return Row(
                    one("mean"), one("std"), one("states", caption), one("pooled", caption), one("image"), one("sizes"), one("weight"),
                    text, key, seed,
                )  # fmt: skip
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path.name} of the cache cannot be read ({brief(error)})") from error

    def image(self, i: int) -> Tensor:
        """The image features of one row alone, (references, patches, features)."""
        path, k = self._place(i)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice("image")[k]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path.name} of the cache cannot be read ({brief(error)})") from error

    def after(self, stored: Stored, seed: int, references: int, fewest: int) -> Row:
        """A row whose references are others of its subject, chosen as from pictures. All chance follows from `seed`."""
        rng = random.Random(seed)
        count, order = spread(len(stored.others), references, fewest, rng)
        found = [self.image(stored.others[i]) for i in order[:count]]
        found += [rng.choice(found) for _ in range(references - count)]
        return self.row(stored.at, seed)._replace(image=torch.cat(found))

    def subject_of(self, i: int) -> str | None:
        """Whose picture a row is, without reading it."""
        return self._subjects[i]

    @cached_property
    def _subjects(self) -> list[str | None]:
        found: list[str | None] = []
        for chunk in range(self.about["chunks"]):
            sidecar = _sidecar(self.folder, chunk)
            for name, count in sidecar["files"].items():
                found += sidecar.get("subjects", {}).get(name) or [None] * count
        return found

    def _place(self, i: int) -> tuple[Path, int]:
        number = bisect_right(self._ends, i)
        return self._files[number], i - (self._ends[number - 1] if number else 0)

    def probe(self) -> dict[str, Tensor]:
        """What the encoders of the cache said to a fixed input."""
        try:
            return load_file(self.folder / PROBE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / PROBE} cannot be read ({brief(error)}); encode anew into another folder") from error


class Siblings(Identities):
    """Rows of a cache by subject: each is drawn after the others of its subject."""

    def __init__(self, cache: Cache, least: int = 2, subjects: Collection[str] | None = None):
        super().__init__(cast(Counted, cache), least, subjects)

    def __getitem__(self, i: int) -> Stored:  # type: ignore[override]
        at, others = self.place(i)
        return Stored(f"{self.subject_of(i)}:{at}", at, tuple(others))


def about(folder: Path) -> dict[str, Any]:
    """What a cache says of itself. Raises UserError for a folder that is none."""
    try:
        found = json.loads((folder / ABOUT).read_text("utf-8"))
        if found["version"] != VERSION:
            raise UserError(f"the cache in {folder} is of version {found['version']}; expected {VERSION}: encode it anew")
        return dict(found)
    except FileNotFoundError as error:
        raise UserError(f"no feature cache in {folder}; make one with: imprompt encode DATA {folder}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ABOUT} is damaged ({brief(error)}); encode it anew into another folder") from error


def complete(folder: Path) -> bool:
    """Whether a folder holds a cache with all its chunks."""
    if not (folder / ABOUT).is_file():
        return False
    return not missing(folder, about(folder)["chunks"])


def contents(folder: Path) -> dict[str, Any]:
    """What is in a cache: records, chunks, bytes on disk, and what was lost with the reasons."""
    facts = about(folder)
    records, size = 0, 0
    lost: dict[str, str] = {}
    for chunk in set(range(facts["chunks"])) - set(missing(folder, facts["chunks"])):
        sidecar = _sidecar(folder, chunk)
        records += sum(sidecar["files"].values())
        size += sum((folder / name).stat().st_size for name in sidecar["files"])
        lost |= sidecar["lost"]
    return {"out": str(folder), "records": records, "chunks": facts["chunks"], "bytes": size, "lost": lost}


def missing(folder: Path, chunks: int) -> list[int]:
    """The chunks that are still to be encoded."""
    return [i for i in range(chunks) if not (folder / f"{i:05}.json").is_file()]


def to_encode(folder: Path, chunks: int) -> list[int]:
    """The chunks that are missing, and those whose shard could not be read to its end."""
    absent = set(missing(folder, chunks))
    return [i for i in range(chunks) if i in absent or _sidecar(folder, i).get("broken")]


def _sidecar(folder: Path, chunk: int) -> dict[str, Any]:
    path = folder / f"{chunk:05}.json"
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        left = len(missing(folder, about(folder)["chunks"]))
        raise UserError(f"the cache in {folder} is not finished, {left} chunks are missing; continue with imprompt encode") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({brief(error)}); delete it and continue with imprompt encode") from error


def begin(folder: Path, facts: Mapping[str, Any], probe: Mapping[str, Tensor]) -> None:
    """Start a cache, or find that the one in the folder was begun alike. Raises UserError where it was not."""
    facts = dict(facts) | {"version": VERSION}
    if (folder / ABOUT).is_file():
        before = about(folder)
        for name, value in facts.items():
            if before.get(name) != value:
                raise UserError(
                    f"the cache in {folder} was begun with {name} {before.get(name)!r}, not {value!r}; "
                    "use the same settings or another folder"
                )
        return
    with atomic_path(folder / PROBE) as partial:
        save_file({name: tensor.contiguous().cpu() for name, tensor in probe.items()}, partial)
    write_file(folder / ABOUT, json.dumps(facts, indent=2) + "\n")


class Chunk:
    """A chunk being written: rows come in any shape, files hold one shape each."""

    def __init__(self, folder: Path, number: int, rows: int):
        self.folder, self.number, self.rows = folder, number, rows
        self._open: dict[Any, list[Row]] = {}
        self._files: dict[str, int] = {}
        self._subjects: dict[str, list[str | None]] = {}
        self.lost: dict[str, str] = {}
        self.broken = ""  # why its shard could not be read to the end: another encoding tries again

    def add(self, row: Row) -> None:
        """Take a row; a file is written when there are enough."""
        kind = (row.shape, row.weight is not None)
        waiting = self._open.setdefault(kind, [])
        waiting.append(row)
        if len(waiting) == self.rows:
            self._write(self._open.pop(kind))

    def close(self) -> None:
        """Write what is left, and only then that the chunk is complete."""
        for waiting in self._open.values():
            self._write(waiting)
        self._open = {}
        with atomic_path(self.folder / f"{self.number:05}.json") as partial:
            facts = {"files": self._files, "lost": self.lost, "broken": self.broken, "subjects": self._subjects}
            partial.write_text(json.dumps(facts), "utf-8")

    def _write(self, rows: Sequence[Row]) -> None:
        path = self.folder / f"{self.number:05}-{len(self._files)}.safetensors"
        with atomic_path(path) as partial:
            save_file(packed(rows), partial)
        self._files[path.name] = len(rows)
        if any(row.subject is not None for row in rows):
            self._subjects[path.name] = [row.subject for row in rows]


def packed(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows of one shape as the tensors of a file, floats in half precision."""
    distinct: dict[str, int] = {}
    letters, words = bytearray(), []
    for row in rows:
        begin, key = len(letters), row.key.encode(*_TEXT)
        letters += key + row.text.encode(*_TEXT)
        words.append((distinct.setdefault(row.text, len(distinct)), begin, begin + len(key), len(letters)))
    firsts = [next(row for row in rows if row.text == text) for text in distinct]
    tensors = {
        "mean": _half("mean", [r.mean for r in rows]),
        "std": _half("std", [r.std for r in rows]),
        "image": _half("image", [r.image for r in rows]),
        "sizes": torch.stack([r.sizes for r in rows]).to(torch.int32),
        "states": _half("states", [r.states for r in firsts]),
        "words": torch.tensor(words, dtype=torch.int64),
        "letters": torch.frombuffer(bytearray(letters or b" "), dtype=torch.uint8).clone(),
    }
    if rows[0].pooled is not None:
        tensors["pooled"] = _half("pooled", [r.pooled for r in firsts if r.pooled is not None])
    if rows[0].weight is not None:
        tensors["weight"] = _half("weight", [r.weight for r in rows if r.weight is not None])
    return tensors


def _half(name: str, tensors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(tensors)).to(torch.float16)
    if not torch.isfinite(stacked).all():
        raise UserError(f"the features called {name} are not finite in half precision; encode with another --precision (float32)")
    return stacked
