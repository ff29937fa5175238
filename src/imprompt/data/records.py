"""What a record is, and the two shapes that data comes in: counted, or as a stream of shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from imprompt.images import Picture


@dataclass(frozen=True)
class Record:
    """One example, nothing opened yet. Without references of its own, the target is its own reference."""

    key: str  # names it in logs
    target: Picture
    text: str = ""
    references: tuple[Picture, ...] = ()
    mask: Picture | None = None
    subject: str | None = None


@runtime_checkable
class Counted(Protocol):
    """Records that can be had in any order: folders, lists, the mini world, a feature cache."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Record: ...


@runtime_checkable
class Sharded(Protocol):
    """Records that come one after the other out of shards."""

    @property
    def shards(self) -> Sequence[str]: ...
    def read(self, shard: str) -> Iterator[Record]: ...


Records = Counted | Sharded
