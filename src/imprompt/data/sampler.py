"""The order of training records: shuffled by seed, distributed over processes, resumable at any record.

The order and all random numbers follow from a few integers, so that a resumed training continues with exactly the records and
random numbers of an uninterrupted one.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from imprompt.data.records import MapRecords, Record, Records, ShardRecords
from imprompt.errors import UserError

SHARDS_PER_GROUP = 4  # shards whose records are shuffled together
SHUFFLE_BUFFER = 1000  # records in the shuffle buffer of a group

RecordReader = Callable[[], Record]  # opens nothing until it is called


@dataclass(frozen=True)
class SamplerState:
    """The position of a process in the data: `offset` records of this group of this epoch are consumed."""

    epoch: int = 0
    group: int = 0
    offset: int = 0


@dataclass(frozen=True)
class SampledRecord:
    """The next record, read on demand; the seed of everything random about it; the position after it."""

    read: RecordReader
    seed: int
    next_state: SamplerState


def iterate_shuffled(records: Records, seed: int, state: SamplerState, rank: int = 0, world_size: int = 1) -> Iterator[SampledRecord]:
    """Endless shuffled records from `state` on, for process `rank` of `world_size`.

    Datasets with random access are distributed record by record, so that all processes together see the records that a single one
    would see. Shards are distributed whole; UserError is raised for fewer shards than processes.
    """
    if isinstance(records, ShardRecords):
        return _iterate_shards(records, seed, state, rank, world_size)
    return _iterate_map(records, seed, state, rank, world_size)


def iterate_once(records: Records) -> Iterator[RecordReader]:
    """Every record once, in the order of the dataset; read on demand."""
    if isinstance(records, ShardRecords):
        for shard in records.shards:
            yield from map(to_reader, records.read_shard(shard))
    else:
        for i in range(len(records)):
            yield partial(records.__getitem__, i)


def _iterate_map(records: MapRecords, seed: int, state: SamplerState, rank: int, world_size: int) -> Iterator[SampledRecord]:
    count = len(records)
    position = state.epoch * count + state.offset + rank
    while True:
        epoch, i = divmod(position, count)
        position += world_size
        next_epoch, offset = divmod(position - rank, count)
        index = int(_permute_epoch(seed, epoch, count)[i])
        yield SampledRecord(partial(records.__getitem__, index), derive_seed(seed, epoch, i), SamplerState(next_epoch, 0, offset))


def to_reader(record: Record) -> RecordReader:
    """A reader of a record that is already read."""
    return lambda: record


@lru_cache(maxsize=2)
def _permute_epoch(seed: int, epoch: int, count: int) -> np.ndarray:
    indices = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(indices)


def _iterate_shards(records: ShardRecords, seed: int, state: SamplerState, rank: int, world_size: int) -> Iterator[SampledRecord]:
    if len(records.shards) < world_size:
        raise UserError(f"{len(records.shards)} shards cannot be distributed over {world_size} processes; expected at least one for each")
    epoch, first_group, skip = state.epoch, state.group, state.offset
    while True:
        shuffled = list(records.shards)
        random.Random(f"{seed} {epoch}").shuffle(shuffled)
        shards = shuffled[rank::world_size]
        groups = [shards[i : i + SHARDS_PER_GROUP] for i in range(0, len(shards), SHARDS_PER_GROUP)]
        empty = True
        for group in range(first_group, len(groups)):
            for n, record in enumerate(_shuffle_shards(records, groups[group], seed, epoch)):
                empty = False
                if n >= skip:
                    record_seed = derive_seed(seed, epoch, zlib.crc32(record.key.encode()))
                    yield SampledRecord(to_reader(record), record_seed, SamplerState(epoch, group, n + 1))
            skip = 0
        if empty and first_group == 0:
            raise UserError(f"none of the {len(shards)} shards holds a record that can be read")
        epoch, first_group = epoch + 1, 0


def _shuffle_shards(records: ShardRecords, shards: list[str], seed: int, epoch: int) -> Iterator[Record]:
    """The records of a group of shards, shuffled in a buffer."""
    rng = random.Random(f"{seed} {epoch} {shards[0]}")
    buffer: list[Record] = []
    for shard in shards:
        for record in records.read_shard(shard):
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(record)
                continue
            i = rng.randrange(SHUFFLE_BUFFER)
            buffer[i], record = record, buffer[i]
            yield record
    rng.shuffle(buffer)
    yield from buffer


def derive_seed(seed: int, epoch: int, i: int) -> int:
    """The seed of record i in an epoch, in 0 … 2⁶³ − 1."""
    return int(np.random.SeedSequence((seed, epoch, i)).generate_state(1, np.uint64)[0] >> 1)
