"""A record, and the two kinds of datasets: with random access, or as a stream of shards."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from imprompt.utils.images import ImageInput


@dataclass(frozen=True)
class Record:
    """One example whose files are not opened yet. Without `references`, the target image is its own reference."""

    key: str  # identifies the record in logs
    target: ImageInput
    caption: str = ""
    references: tuple[ImageInput, ...] = ()
    mask: ImageInput | None = None
    subject: str | None = None
    loss_weight: float = 1.0
    caption_source: str = ""  # where the caption was found: a suffix, a column, a list; "" without one


@runtime_checkable
class MapRecords(Protocol):
    """A dataset with random access: a folder, a list, the mini world, a feature cache."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Record: ...


@runtime_checkable
class ShardRecords(Protocol):
    """A dataset that is read shard by shard."""

    @property
    def shards(self) -> Sequence[str]:
        """Files or URLs."""
        ...

    def read_shard(self, shard: str) -> Iterator[Record]:
        """The records of one shard, in its order."""
        ...


class Subset:
    """A dataset with random access without the records at some indices."""

    def __init__(self, records: MapRecords, excluded: Sequence[int]):
        self._records = records
        self._remaining_before = [n - k for k, n in enumerate(sorted(excluded))]  # remaining records before each excluded one

    def __len__(self) -> int:
        return len(self._records) - len(self._remaining_before)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._records[i + bisect_right(self._remaining_before, i)]


Records = MapRecords | ShardRecords
