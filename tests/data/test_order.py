"""The order of records: all of them, the same again, dealt out fairly, and resumable anywhere."""

from itertools import islice

import pytest

from imprompt.data.records import Record
from imprompt.data.sampler import Place, ordered
from imprompt.errors import UserError


class Numbers:
    """Counted records, each its own number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return Record(str(i), f"{i}.png")


class Heaps:
    """Sharded records."""

    def __init__(self, shards, each):
        self.shards, self.each = [f"s{i}" for i in range(shards)], each

    def read(self, shard):
        for i in range(self.each):
            yield Record(f"{shard}/{i}", "x.png")


BOTH = [Numbers(25), Heaps(9, 7)]


def take(records, count, place=None, rank=0, ranks=1, seed=3):
    return [(d.read().key, d.seed, d.after) for d in islice(ordered(records, seed, place or Place(), rank, ranks), count)]


@pytest.mark.parametrize("records", BOTH, ids=["counted", "sharded"])
def test_each_epoch_has_every_record_once_in_an_order_of_its_own(records):
    size = 25 if isinstance(records, Numbers) else 63
    keys = [key for key, *_ in take(records, 2 * size)]
    first, second = keys[:size], keys[size:]
    assert len(set(first)) == size and set(first) == set(second) and first != second
    assert first != sorted(first)


@pytest.mark.parametrize("records", BOTH, ids=["counted", "sharded"])
def test_the_same_seed_gives_the_same_order_and_another_one_another(records):
    assert take(records, 40) == take(records, 40)
    assert take(records, 40) != take(records, 40, seed=4)


@pytest.mark.parametrize("records", BOTH, ids=["counted", "sharded"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumes_behind_any_record(records, ranks):
    whole = take(records, 90, rank=ranks - 1, ranks=ranks)
    for at in (1, 10, 24, 25, 40, 63, 70):
        rest = take(records, 10, place=whole[at - 1][2], rank=ranks - 1, ranks=ranks)
        assert rest == whole[at : at + 10], at


def test_two_processes_see_what_one_would_see():
    alone = take(Numbers(25), 40)
    a, b = (take(Numbers(25), 20, rank=rank, ranks=2) for rank in (0, 1))
    assert [x[:2] for pair in zip(a, b, strict=True) for x in pair] == [x[:2] for x in alone]


def test_shards_are_dealt_out_without_overlap():
    parts = [{key for key, *_ in take(Heaps(8, 5), 20, rank=rank, ranks=2)} for rank in (0, 1)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40


def test_every_turn_has_a_seed_of_its_own():
    seeds = [seed for _, seed, _ in take(Numbers(5), 50)]
    assert len(set(seeds)) == 50 and all(0 <= s < 2**63 for s in seeds)


def test_fewer_shards_than_processes_is_said():
    with pytest.raises(UserError, match="3 shards cannot be dealt out to 4"):
        take(Heaps(3, 1), 1, ranks=4)


def test_shards_without_a_single_record_end_the_run():
    with pytest.raises(UserError, match="none of the 2 shards"):
        take(Heaps(2, 0), 1)
