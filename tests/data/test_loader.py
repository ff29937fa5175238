"""Batches: in an order that does not depend on the threads, resumable to the record, tolerant of unreadable records."""

import time
from itertools import islice
from typing import NamedTuple

import pytest
import torch

from imprompt.data.loader import ErrorBudget, Loader
from imprompt.data.records import Record
from imprompt.errors import ImageError, UserError


class Item(NamedTuple):
    key: str
    seed: int
    value: torch.Tensor


class NumberedRecords:
    """A dataset whose keys are the indices; the images of `damaged` cannot be read, and of `missing` not even the record."""

    def __init__(self, count, damaged=(), missing=()):
        self.count, self.damaged, self.missing = count, set(damaged), set(missing)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.missing:
            raise UserError(f"list:{i}: target is empty")
        return Record(f"{i}{'x' if i in self.damaged else ''}", f"{i}.png")


def load_item(record, seed):
    if record.key.endswith("x"):
        raise ImageError(f"{record.key} is damaged")
    time.sleep(0.001 * (seed % 3))  # threads finish out of order
    return Item(record.key, seed, torch.tensor(float(seed % 1000)))


def make_loader(records, **options):
    return Loader(records, load_item, rebuild_item=Item, **{"batch_size": 4, "seed": 1, "workers": 3, **options})


def keys_of(batches):
    return [[item.key for item in batch] for batch in batches]


def flatten(batches):
    return [key for batch in batches for key in batch]


def test_threads_do_not_change_the_order():
    one, many = (keys_of(islice(make_loader(NumberedRecords(30), workers=n), 12)) for n in (1, 4))
    assert one == many and all(len(batch) == 4 for batch in one)
    first = flatten(one)[:28]
    assert sorted(first, key=int) != first


@pytest.mark.parametrize("batch_key", [lambda item: None, lambda item: int(item.key.rstrip("x")) % 3], ids=["one shape", "three shapes"])
def test_it_continues_exactly_after_the_last_batch(batch_key, tmp_path):
    records = NumberedRecords(37, damaged=(3, 11), missing=(5,))
    batches = iter(make_loader(records, batch_key=batch_key))
    uninterrupted = [(next(batches)) for _ in range(20)]
    first = make_loader(records, batch_key=batch_key)
    for _ in islice(first, 7):
        pass
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_loader(records, batch_key=batch_key)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed = list(islice(second, 13))
    assert keys_of(resumed) == keys_of(uninterrupted[7:])
    assert [i.seed for b in resumed for i in b] == [i.seed for b in uninterrupted[7:] for i in b]


def test_a_batch_has_one_shape():
    batches = keys_of(islice(make_loader(NumberedRecords(50), batch_key=lambda item: int(item.key) % 3), 20))
    assert all(len({int(key) % 3 for key in batch}) == 1 and len(batch) == 4 for batch in batches)


def test_unreadable_records_are_skipped_counted_and_logged(tmp_path):
    budget = ErrorBudget(0.5, tmp_path / "unreadable.tsv")
    loader = make_loader(NumberedRecords(20, damaged=(3, 7), missing=(9,)), error_budget=budget)
    keys = flatten(keys_of(islice(loader, 10)))
    assert {"3x", "7x"}.isdisjoint(keys) and "9" not in keys and len(set(keys)) == 17
    log = (tmp_path / "unreadable.tsv").read_text().splitlines()
    assert len(log) == 3 and any(line.startswith("3x\t3x is damaged") for line in log) and any("list:9" in line for line in log)
    assert budget.failed >= 3


def test_too_many_unreadable_records_end_the_run(tmp_path):
    budget = ErrorBudget(0.1, tmp_path / "log.tsv")
    with pytest.raises(UserError, match=r"more than the 10% allowed .*log\.tsv") as caught:
        list(islice(make_loader(NumberedRecords(60, damaged=range(30)), error_budget=budget), 100))
    assert "--max-unreadable-fraction" in str(caught.value)


def test_a_dataset_without_readable_records_ends_the_run_too():
    with pytest.raises(UserError, match="could not be read"):
        next(iter(make_loader(NumberedRecords(3, damaged=range(3)))))


def test_a_run_ends_where_no_record_can_be_read_however_many_are_allowed():
    budget = ErrorBudget(max_fraction=1.0, min_records=3)
    budget.record_failure("a", "x"), budget.record_failure("b", "x")
    with pytest.raises(UserError, match="3 of 3 records could not be read"):
        budget.record_failure("c", "x")
    budget.record_success(), budget.record_failure("d", "x")
