"""In which order records come: shuffled by seed, split among processes, resumable at any record.

Everything follows from a few integers, so a training that was killed sees the same records, with the same random
numbers, as one that was not.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from imprompt.data.records import Counted, Record, Records, Sharded
from imprompt.errors import UserError

GROUP = 4  # shards that are mixed with each other
BUFFER = 1000  # records held back for mixing within a group


@dataclass(frozen=True)
class Place:
    """Where in the data a process stands: `done` records of this group of this epoch are behind it."""

    epoch: int = 0
    group: int = 0
    done: int = 0


@dataclass(frozen=True)
class Drawn:
    """A record in its turn, read when asked; a seed of its own for all that is random about it; the place behind it."""

    read: Callable[[], Record]
    seed: int
    after: Place


def ordered(records: Records, seed: int, place: Place, rank: int = 0, ranks: int = 1) -> Iterator[Drawn]:
    """Records without end from `place` on, for process `rank` of `ranks`.

    Counted records are dealt out one by one, so that two processes see together what one alone would. Shards are dealt
    out whole.
    """
    if isinstance(records, Sharded):
        return _from_shards(records, seed, place, rank, ranks)
    return _from_counted(records, seed, place, rank, ranks)


def once(records: Records) -> Iterator[Callable[[], Record]]:
    """Every record one time, in the order in which it lies there; read when asked."""
    if isinstance(records, Sharded):
        for shard in records.shards:
            for record in records.read(shard):
                yield partial(itself, record)
    else:
        for i in range(len(records)):
            yield partial(records.__getitem__, i)


def _from_counted(records: Counted, seed: int, place: Place, rank: int, ranks: int) -> Iterator[Drawn]:
    count = len(records)
    at = place.epoch * count + place.done + rank
    while True:
        epoch, i = divmod(at, count)
        at += ranks
        next_epoch, done = divmod(at - rank, count)
        chosen = int(_permutation(seed, epoch, count)[i])
        yield Drawn(partial(records.__getitem__, chosen), mixed_seed(seed, epoch, i), Place(next_epoch, 0, done))


def itself(record: Record) -> Record:
    """A record that is read already, asked for like any other."""
    return record


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    numbers = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(numbers)


def _from_shards(records: Sharded, seed: int, place: Place, rank: int, ranks: int) -> Iterator[Drawn]:
    if len(records.shards) < ranks:
        raise UserError(f"{len(records.shards)} shards cannot be dealt out to {ranks} processes; expected at least one for each")
    epoch, first, skip = place.epoch, place.group, place.done
    while True:
        shards = list(records.shards)
        random.Random(f"{seed} {epoch}").shuffle(shards)
        mine = shards[rank::ranks]
        groups = [mine[i : i + GROUP] for i in range(0, len(mine), GROUP)]
        seen = False
        for group in range(first, len(groups)):
            for done, record in enumerate(_mixed(records, groups[group], seed, epoch)):
                seen = True
                if done >= skip:
                    own = mixed_seed(seed, epoch, zlib.crc32(record.key.encode()))
                    yield Drawn(partial(itself, record), own, Place(epoch, group, done + 1))
            skip = 0
        if not seen and first == 0:
            raise UserError(f"none of the {len(mine)} shards holds a record that can be read")
        epoch, first = epoch + 1, 0


def _mixed(records: Sharded, shards: list[str], seed: int, epoch: int) -> Iterator[Record]:
    """The records of a few shards, through a buffer from which they are drawn at random."""
    rng = random.Random(f"{seed} {epoch} {shards[0]}")
    buffer: list[Record] = []
    for shard in shards:
        for record in records.read(shard):
            if len(buffer) < BUFFER:
                buffer.append(record)
                continue
            i = rng.randrange(BUFFER)
            buffer[i], record = record, buffer[i]
            yield record
    rng.shuffle(buffer)
    yield from buffer


def mixed_seed(seed: int, epoch: int, i: int) -> int:
    """One seed from three numbers: that of record i in an epoch."""
    return int(np.random.SeedSequence((seed, epoch, i)).generate_state(1, np.uint64)[0] >> 1)
