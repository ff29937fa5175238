"""Folders of images: subfolders are followed, also through links; what is not read is counted."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from imprompt.data.captions import MAX_CAPTION_BYTES, Caption
from imprompt.data.collection import ImageCollection, get_suffix
from imprompt.data.records import Record
from imprompt.data.tables import Table, open_table
from imprompt.errors import UserError
from imprompt.utils.images import IMAGE_SUFFIXES

MAX_LIST_BYTES = {".json": 2**28}  # of a list next to images that is read as a whole


class FolderFiles:
    """The names of the files below a folder, relative to it. What cannot be entered or is no file is counted in `skipped`, by kind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.skipped: Counter[str] = Counter()
        self.names = sorted(self._walk())

    def _walk(self) -> Iterator[str]:
        """Every real folder is read once, by its own path before any link to it, so that loops end."""
        pending, links, seen = [self.folder], list[Path](), set[str]()
        while pending or links:
            folder = pending.pop() if pending else links.pop(0)
            if os.path.realpath(folder) in seen:
                self.skipped["links to a folder that is read already"] += 1
                continue
            seen.add(os.path.realpath(folder))
            for entry in self._list(folder):
                path = Path(entry.path)
                if entry.is_dir():
                    (links if entry.is_symlink() else pending).append(path)
                elif entry.is_file():
                    yield path.relative_to(self.folder).as_posix()
                else:
                    self.skipped["links to nothing, pipes and devices"] += 1

    def _list(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            name = folder.relative_to(self.folder).as_posix()
            self.skipped[f"subfolder {name} ({error.strerror})"] += 1
            return []
        self.skipped["hidden images"] += sum(get_suffix(entry.name) in IMAGE_SUFFIXES for entry in found if entry.name.startswith("."))
        return [entry for entry in found if not entry.name.startswith(".")]


class ImageFolder:
    """All images below a folder; subfolders are subjects. For captions see ImageCollection."""

    def __init__(self, folder: Path, files: FolderFiles | None = None):
        self.folder, files = folder, files or FolderFiles(folder)
        self._collection = ImageCollection(files.names, self._read, self._open_table, lambda name: folder / name)
        self.names = self._collection.images
        self.skipped = files.skipped + self._collection.skipped
        if orphans := len(self._collection.orphans):
            self.skipped[f"caption files without an image ({self._collection.orphans[0]} …)"] = orphans
        if not self.names:
            found = f"; found {describe_skipped(self.skipped)}" if self.skipped else ""
            raise UserError(
                f"no images in {folder}; expected files ending in {', '.join(IMAGE_SUFFIXES)}, with captions in .txt files of the same name"
                f"{found}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        return self._collection.make_record(name, name, self.folder / name, _folder_subject(name))

    def get_subject(self, i: int) -> str | None:
        """The subject that a list names, or else the subfolder; no image is opened."""
        return self._collection.get_subject(self.names[i]) or _folder_subject(self.names[i])

    def get_caption(self, i: int) -> Caption:
        """The caption of an image, which is not opened. Raises UserError for a text that is not UTF-8."""
        return self._collection.get_caption(self.names[i])

    def _read(self, name: str) -> bytes:
        return read_limited(self.folder / name, name, MAX_CAPTION_BYTES)

    def _open_table(self, name: str) -> Table:
        limit = MAX_LIST_BYTES.get(get_suffix(name))
        if limit and os.path.getsize(self.folder / name) > limit:
            raise UserError(f"{name} has over {limit // 2**20} MiB")
        return open_table(name, self.folder / name)


def read_limited(path: Path, name: str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises UserError for a larger one, and where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise UserError(f"{name} has over {limit // 2**20} MiB; expected a caption")
    return data


def describe_skipped(skipped: Counter[str], max_kinds: int = 6) -> str:
    """What was not read, by kind: `3 .mp4, 1 .psd`; "" for nothing."""
    kinds = [(kind, count) for kind, count in skipped.most_common() if count]
    parts = [f"{count:,} {kind}" for kind, count in kinds[:max_kinds]]
    rest = sum(count for _, count in kinds[max_kinds:])
    return ", ".join([*parts, *([f"{rest:,} others"] if rest else [])])


def _folder_subject(name: str) -> str | None:
    return name.rpartition("/")[0] or None
