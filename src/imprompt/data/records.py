"""What a record is, and the two shapes that data comes in: counted, or as a stream of shards."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from imprompt.utils.images import Picture


@dataclass(frozen=True)
class Record:
    """One example, nothing opened yet. Without references of its own, the target is its own reference."""

    key: str  # names it in logs
    target: Picture
    text: str = ""
    references: tuple[Picture, ...] = ()
    mask: Picture | None = None
    subject: str | None = None
    loss_weight: float = 1.0  # how much its loss counts


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


class Without:
    """Counted records, some of them left out."""

    def __init__(self, records: Counted, left_out: Sequence[int]):
        self._records = records
        self._before = [n - k for k, n in enumerate(sorted(left_out))]  # how many that stay come before each one left out

    def __len__(self) -> int:
        return len(self._records) - len(self._before)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._records[i + bisect_right(self._before, i)]


Records = Counted | Sharded
