"""The order of records: complete, reproducible, distributed over processes, and resumable anywhere."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imprompt.data.records import Record
from imprompt.data.sampler import SamplerState, iterate_shuffled
from imprompt.errors import UserError

property_test = settings(max_examples=40, deadline=None, derandomize=True)


class NumberedRecords:
    """A dataset with random access whose keys are the indices."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return Record(str(i), f"{i}.png")


class NumberedShards:
    """A dataset of shards with `size` records each."""

    def __init__(self, shards, size):
        self.shards, self.size = [f"s{i}" for i in range(shards)], size

    def read_shard(self, shard):
        for i in range(self.size):
            yield Record(f"{shard}/{i}", "x.png")


DATASETS = [NumberedRecords(25), NumberedShards(9, 7)]
EITHER_DATASET = pytest.mark.parametrize("records", DATASETS, ids=["map", "shards"])


def take(records, count, state=None, rank=0, world_size=1, seed=3):
    """Keys, seeds and next states of the first records from a state on."""
    sampled = iterate_shuffled(records, seed, state or SamplerState(), rank, world_size)
    return [(record.read().key, record.seed, record.next_state) for record in islice(sampled, count)]


@EITHER_DATASET
def test_each_epoch_has_every_record_once_in_an_order_of_its_own(records):
    size = 25 if isinstance(records, NumberedRecords) else 63
    keys = [key for key, *_ in take(records, 2 * size)]
    first, second = keys[:size], keys[size:]
    assert len(set(first)) == size and set(first) == set(second) and first != second
    assert first != sorted(first)


@EITHER_DATASET
def test_the_order_depends_on_the_seed_alone(records):
    assert take(records, 40) == take(records, 40)
    assert take(records, 40) != take(records, 40, seed=4)


@EITHER_DATASET
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_can_be_resumed_after_any_record(records, world_size):
    uninterrupted = take(records, 90, rank=world_size - 1, world_size=world_size)
    for n in (1, 10, 24, 25, 40, 63, 70):
        resumed = take(records, 10, state=uninterrupted[n - 1][2], rank=world_size - 1, world_size=world_size)
        assert resumed == uninterrupted[n : n + 10], n


def test_two_processes_see_what_one_would_see():
    single = take(NumberedRecords(25), 40)
    a, b = (take(NumberedRecords(25), 20, rank=rank, world_size=2) for rank in (0, 1))
    assert [x[:2] for pair in zip(a, b, strict=True) for x in pair] == [x[:2] for x in single]


def test_shards_are_distributed_without_overlap():
    parts = [{key for key, *_ in take(NumberedShards(8, 5), 20, rank=rank, world_size=2)} for rank in (0, 1)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40


def test_every_sampled_record_has_a_seed_of_its_own():
    seeds = [seed for _, seed, _ in take(NumberedRecords(5), 50)]
    assert len(set(seeds)) == 50 and all(0 <= s < 2**63 for s in seeds)


def test_fewer_shards_than_processes_are_an_error():
    with pytest.raises(UserError, match="3 shards cannot be distributed over 4"):
        take(NumberedShards(3, 1), 1, world_size=4)


def test_shards_without_a_single_record_are_an_error():
    with pytest.raises(UserError, match="none of the 2 shards"):
        take(NumberedShards(2, 0), 1)


@property_test
@given(count=st.integers(1, 40), world_size=st.integers(1, 5), seed=st.integers(0, 2**31), epochs=st.integers(1, 3))
def test_processes_together_see_every_record_once_per_epoch(count, world_size, seed, epochs):
    steps = -(-count * epochs // world_size)
    ranks = [take(NumberedRecords(count), steps, rank=rank, world_size=world_size, seed=seed) for rank in range(world_size)]
    keys = [int(key) for step in zip(*ranks, strict=True) for key, *_ in step]
    for epoch in range(epochs):
        assert sorted(keys[epoch * count : (epoch + 1) * count]) == list(range(count))


@property_test
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 12)), sharded=st.booleans(), seed=st.integers(0, 2**31),
    position=st.integers(1, 60), processes=st.data(),
)  # fmt: skip
def test_a_resumed_order_continues_the_uninterrupted_one(sizes, sharded, seed, position, processes):
    shards, size = sizes
    records = NumberedShards(shards, size) if sharded else NumberedRecords(shards * size)
    world_size = processes.draw(st.integers(1, min(3, shards)))
    rank = processes.draw(st.integers(0, world_size - 1))
    uninterrupted = take(records, position + 8, rank=rank, world_size=world_size, seed=seed)
    resumed = take(records, 8, state=uninterrupted[position - 1][2], rank=rank, world_size=world_size, seed=seed)
    assert resumed == uninterrupted[position:]
