"""Batches: in order whatever the threads do, resumable to the record, and tolerant of what cannot be read."""

import time
from itertools import islice
from typing import NamedTuple

import pytest
import torch

from imprompt.data.loader import Loader, Skipped
from imprompt.data.records import Record
from imprompt.errors import ImageError, UserError


class Item(NamedTuple):
    key: str
    seed: int
    value: torch.Tensor


class Numbers:
    """Records; those in `bad` cannot be read, those in `absent` not even found."""

    def __init__(self, count, bad=(), absent=()):
        self.count, self.bad, self.absent = count, set(bad), set(absent)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.absent:
            raise UserError(f"list:{i}: target is empty")
        return Record(f"{i}{'x' if i in self.bad else ''}", f"{i}.png")


def make(record, seed):
    if record.key.endswith("x"):
        raise ImageError(f"{record.key} is damaged")
    time.sleep(0.001 * (seed % 3))  # threads finish out of turn
    return Item(record.key, seed, torch.tensor(float(seed % 1000)))


def loader(records, **choices):
    return Loader(records, make, revive=Item, **{"batch": 4, "seed": 1, "workers": 3, **choices})


def keys(batches):
    return [[item.key for item in batch] for batch in batches]


def flat(batches):
    return [key for batch in batches for key in batch]


def test_threads_do_not_change_the_order():
    one, many = (keys(islice(loader(Numbers(30), workers=n), 12)) for n in (1, 4))
    assert one == many and all(len(batch) == 4 for batch in one)
    first = flat(one)[:28]
    assert sorted(first, key=int) != first


@pytest.mark.parametrize("shape", [lambda item: None, lambda item: int(item.key.rstrip("x")) % 3], ids=["one shape", "three shapes"])
def test_goes_on_exactly_where_the_last_batch_ended(shape, tmp_path):
    records = Numbers(37, bad=(3, 11), absent=(5,))
    batches = iter(loader(records, shape=shape))
    whole = [(next(batches)) for _ in range(20)]
    first = loader(records, shape=shape)
    for _ in islice(first, 7):
        pass
    torch.save(first.state(), tmp_path / "state.pt")
    second = loader(records, shape=shape)
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = list(islice(second, 13))
    assert keys(rest) == keys(whole[7:])
    assert [i.seed for b in rest for i in b] == [i.seed for b in whole[7:] for i in b]


def test_a_batch_has_one_shape():
    batches = keys(islice(loader(Numbers(50), shape=lambda item: int(item.key) % 3), 20))
    assert all(len({int(key) % 3 for key in batch}) == 1 and len(batch) == 4 for batch in batches)


def test_what_cannot_be_read_is_left_out_counted_and_named(tmp_path):
    skipped = Skipped(0.5, tmp_path / "unreadable.tsv")
    found = flat(keys(islice(loader(Numbers(20, bad=(3, 7), absent=(9,)), skipped=skipped), 10)))
    assert {"3x", "7x"}.isdisjoint(found) and "9" not in found and len(set(found)) == 17
    log = (tmp_path / "unreadable.tsv").read_text().splitlines()
    assert len(log) == 3 and any(line.startswith("3x\t3x is damaged") for line in log) and any("list:9" in line for line in log)
    assert skipped.count >= 3


def test_too_much_that_cannot_be_read_ends_the_run(tmp_path):
    skipped = Skipped(0.1, tmp_path / "log.tsv")
    with pytest.raises(UserError, match=r"more than the 10% allowed .*log\.tsv") as caught:
        list(islice(loader(Numbers(60, bad=range(30)), skipped=skipped), 100))
    assert "--max-unreadable" in str(caught.value)


def test_nothing_readable_at_all_ends_too():
    with pytest.raises(UserError, match="could not be read"):
        next(iter(loader(Numbers(3, bad=range(3)))))
