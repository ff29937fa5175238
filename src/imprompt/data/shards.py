"""Shards: tar files as img2dataset and WebDataset write them, local or streamed. Only images and captions are read, up to a size."""

import lzma
import os
import re
import struct
import tarfile
import tempfile
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.parse import urlsplit

from imprompt.data.captions import CAPTION_SUFFIXES, MAX_CAPTION_BYTES
from imprompt.data.collection import ImageCollection, get_suffix
from imprompt.data.records import Record
from imprompt.data.tables import LIST_SUFFIXES, open_table
from imprompt.errors import UserError, redact_secrets, summarize_error
from imprompt.utils.compat import BoundedTarInfo
from imprompt.utils.images import IMAGE_SUFFIXES, ImageInput

MAX_MEMBER_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 64 * 2**30  # of the images and captions of a compressed or streamed shard, which are copied to a temporary file
ALLOW_PIPE_VARIABLE = "IMPROMPT_ALLOW_PIPE"
TIMEOUT, ATTEMPTS = 10, 3  # seconds without an answer of a server, and how often it is asked
_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_READ_SUFFIXES = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, *LIST_SUFFIXES)
# TypeError, struct.error and OverflowError: tarfile's, for compressed archives that are cut and for lengths that are no lengths
_SHARD_ERRORS = (
    OSError, ValueError, EOFError, tarfile.TarError, HTTPException, zlib.error, lzma.LZMAError, TypeError, struct.error, OverflowError,
)  # fmt: skip


def is_shard(name: str) -> bool:
    """Whether a name or a URL ends as that of a tar file."""
    return bool(_TAR.search(re.split(r"[?#]", name)[0] if "://" in name else name))


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL or a command, rather than a file."""
    return not os.path.exists(shard) and (shard.startswith("pipe:") or bool(re.match(r"[a-z][a-z0-9+]*://", shard, re.IGNORECASE)))


class Member(NamedTuple):
    """Where the content of a file of an archive lies."""

    file: IO[bytes]
    offset: int
    size: int


class WebDatasetShards:
    """Shards in which files with the same name but for the suffix belong together, in any order, also in folders of the archive.

    `on_unreadable(key, reason)` is called for every shard and every sample that cannot be read; what is no part of a sample is
    counted in `skipped`, by kind. A local file that is not compressed is read in place, any other copied to a temporary file.
    """

    def __init__(self, shards: Sequence[str], on_unreadable: Callable[[str, str], None] = lambda key, reason: None):
        self.shards = list(shards)
        self.on_unreadable = on_unreadable
        self._skipped: dict[str, Counter[str]] = {}  # by shard, as each may be read many times

    @property
    def skipped(self) -> Counter[str]:
        """What was no part of a sample in the shards that were read, by kind."""
        return sum(self._skipped.values(), Counter())

    @classmethod
    def expand(cls, pattern: str) -> "WebDatasetShards":
        """The shards of a pattern with ranges in braces: `part-{0000..0099}.tar`. Raises UserError where there are none."""
        from webdataset.shardlists import expand_urls

        parts = [pattern] if pattern.startswith("pipe:") or os.path.exists(pattern) else pattern.split("::")
        shards = [shard for part in parts for shard in ([part] if os.path.exists(part) else expand_urls(part))]
        local = [shard for shard in shards if not is_remote(shard)]
        if local and not any(os.path.isfile(shard) for shard in local):
            raise UserError(f"no shards at {redact_secrets(pattern)}")
        has_pipe = any(is_remote(shard) and shard.startswith("pipe:") for shard in shards)
        if has_pipe and os.environ.get(ALLOW_PIPE_VARIABLE) != "1":
            raise UserError(f"pipe: runs a command of the shell; if you trust it, set the environment variable {ALLOW_PIPE_VARIABLE}=1")
        return cls(shards)

    def read_shard(self, shard: str) -> Iterator[Record]:
        """The records of one shard; damaged samples are reported and skipped."""
        name, skipped = redact_secrets(shard), Counter[str]()
        self._skipped[shard] = skipped
        with ExitStack() as stack:
            members, problems, is_damaged = dict[str, Member](), list[tuple[str, str]](), False
            try:
                copy = stack.enter_context(tempfile.TemporaryFile())
                file = open_shard(shard)
                in_place = not is_remote(shard) and _is_plain_tar(file)
                if in_place:
                    stack.callback(file.close)  # after its records are read
                with nullcontext() if in_place else closing(file):  # a command or a server may fail only when it is closed
                    self._index(file, copy, members, problems, skipped, in_place=in_place)
            except _SHARD_ERRORS as error:  # the part before the damage is read
                problems.append(("", summarize_error(error)))
                is_damaged = True
            for member, reason in problems:
                self.on_unreadable(f"{PurePosixPath(name).name}/{member}" if member else name, reason)
            yield from self._read_records(shard, members, is_damaged=is_damaged)

    def _index(
        self, file: IO[bytes], copy: IO[bytes], members: dict[str, Member], problems: list[tuple[str, str]], skipped: Counter[str], *,
        in_place: bool,
    ) -> None:  # fmt: skip
        """Find the members that are read, those that would be but cannot, with the reason, and count the others."""
        with tarfile.open(fileobj=file, mode="r:" if in_place else "r|*", tarinfo=BoundedTarInfo) as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if kind := "" if info.isdir() else _find_kind(name):
                    skipped[kind] += 1
                elif not info.isdir():
                    if problem := _find_problem(info, name, members):
                        problems.append((name, problem))
                    else:
                        is_whole = in_place and info.sparse is None
                        members[name] = Member(file, info.offset_data, info.size) if is_whole else _copy(tar, info, copy)
                tar.members = []  # type: ignore[attr-defined]  # they are not needed again

    def _read_records(self, path: str, members: Mapping[str, Member], *, is_damaged: bool) -> Iterator[Record]:
        shard, extras = PurePosixPath(redact_secrets(path)).name, set(find_extras(members))
        if extras:
            self._skipped[path]["further images of a sample"] = len(extras)
        names = [name for name in members if name not in extras]
        collection = ImageCollection(
            names, lambda name: read_member(members[name]), lambda name: open_table(name, read_member(members[name])),
            lambda name: _resolve(members, name),
        )  # fmt: skip
        without_caption = {name for name in collection.images if is_damaged and not collection.has_caption(name)}
        if len(without_caption) == len(collection.images):  # of a shard without captions, none is lost
            without_caption = set()
        for name in collection.images:
            key = f"{shard}/{name[: len(name) - len(get_suffix(name))]}"
            try:
                record = None if name in without_caption else collection.make_record(name, key, read_member(members[name]))
                reason = "its caption is in the part of the archive that cannot be read"
            except _SHARD_ERRORS as error:
                record, reason = None, summarize_error(error)
            if record is None:
                self.on_unreadable(key, reason)
            else:
                yield record
        for name in collection.orphans:
            self.on_unreadable(f"{shard}/{name}", "no image")
        self._skipped[path] += collection.skipped


def _find_kind(name: str) -> str:
    """Under which kind a member is counted; "" for an image, a caption or a list, which are read."""
    if any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts) or "__MACOSX/" in name:
        return "hidden files"
    return "" if get_suffix(name) in _READ_SUFFIXES else get_suffix(name) or "without a suffix"


def _find_problem(info: tarfile.TarInfo, name: str, members: Mapping[str, Member]) -> str:
    """Why a member cannot be read; "" for one that can."""
    limit = MAX_CAPTION_BYTES if get_suffix(name) in CAPTION_SUFFIXES else MAX_MEMBER_BYTES
    if not info.isreg():
        return "it is a link or a device; expected a file"
    if info.size > limit:
        return f"it has {info.size / 2**20:,.0f} MiB; expected at most {limit // 2**20}"
    return "the archive holds a file of this name before" if name in members else ""


def find_extras(names: Iterable[str]) -> Iterator[str]:
    """Further images of a sample, as WebDataset names them: `000.depth.png` or `000.png` next to `000.jpg`."""
    first: dict[str, str] = {}
    images = [name for name in names if get_suffix(name) in IMAGE_SUFFIXES]
    for name in sorted(images, key=lambda name: IMAGE_SUFFIXES.index(get_suffix(name))):
        stem = name[: len(name) - len(get_suffix(name))]
        if first.setdefault(stem, name) != name:
            yield name
    for stem, name in first.items():
        base, _, extra = stem.rpartition(".")
        if base in first and re.fullmatch(r"[A-Za-z_]\w*", extra):
            yield name


def read_member(member: Member) -> bytes:
    """The content of a file of an archive. Raises UserError where the archive is cut."""
    member.file.seek(member.offset)
    data = member.file.read(member.size)
    if len(data) < member.size:
        raise UserError("the archive ends within this file")
    return data


def _resolve(members: Mapping[str, Member], name: str) -> ImageInput:
    if name not in members:
        raise UserError(f"no image {name} in the archive")
    return read_member(members[name])


def _is_plain_tar(file: IO[bytes]) -> bool:
    """Whether a file is a tar archive that is not compressed."""
    start = file.read(512)
    file.seek(0)
    return len(start) == 512 and start[257:262] == b"ustar"


def _copy(tar: tarfile.TarFile, info: tarfile.TarInfo, copy: IO[bytes]) -> Member:
    """Append the content of a member to the temporary file."""
    source = tar.extractfile(info)
    assert source is not None
    offset = copy.seek(0, os.SEEK_END)
    if offset + info.size > MAX_SHARD_BYTES:
        raise UserError(f"its images and captions have over {MAX_SHARD_BYTES / 2**30:g} GiB")
    while block := source.read(2**20):
        copy.write(block)
    return Member(copy, offset, info.size)


def open_shard(shard: str) -> IO[bytes]:
    """The content of a shard. Tokens stay in this process: they are in no command line and no error. Raises OSError or UserError."""
    if not is_remote(shard):
        return Path(shard).open("rb")
    if shard.startswith(("http://", "https://")):
        return _open_url(shard)
    if shard.startswith("hf://"):
        return _open_hub_file(shard)
    from webdataset.gopen import gopen

    stream: IO[bytes] = gopen(shard)
    return stream


def _open_url(url: str) -> IO[bytes]:
    """The answer of a server, which is asked again after a failure of its own or of the connection."""
    for attempt in range(ATTEMPTS):
        try:
            response: IO[bytes] = urllib.request.urlopen(url, timeout=TIMEOUT)
            return response
        except (OSError, HTTPException) as error:
            is_temporary = getattr(error, "code", 0) >= 500 or isinstance(error, (TimeoutError, ConnectionError))
            if not is_temporary or attempt == ATTEMPTS - 1:
                host, reason = urlsplit(url).hostname, getattr(error, "reason", error)
                raise UserError(f"{host} does not give the shard ({reason}); check the address and the connection") from error
    raise AssertionError


def _open_hub_file(url: str) -> IO[bytes]:
    from imprompt.models.hub import open_hub_file

    return open_hub_file(url)
