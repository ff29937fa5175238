"""Batches prepared ahead in threads; unreadable records are skipped, counted and logged."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from imprompt.data.records import Record, Records
from imprompt.data.sampler import RecordReader, SampledRecord, SamplerState, iterate_shuffled
from imprompt.errors import UserError, summarize_error

Item = TypeVar("Item")
Tag = TypeVar("Tag")
READ_ERRORS = (UserError, OSError, ValueError)  # raised while a damaged record is read


class ErrorBudget:
    """Counts and logs unreadable records, and ends the run where their fraction exceeds `max_fraction`.

    The fraction is checked from `min_records` records on. `log` is a file of tab-separated keys and reasons.
    """

    def __init__(self, max_fraction: float = 0.1, log: Path | None = None, min_records: int = 100):
        self.max_fraction, self.log, self.min_records = max_fraction, log, min_records
        self.failed = self.total = 0
        self._logged: set[str] = set()

    def record_success(self) -> None:
        """Count a record that was read."""
        self.total += 1

    def record_failure(self, key: str, reason: str) -> None:
        """Count and log an unreadable record. Raises UserError where more than `max_fraction`, or all, are unreadable."""
        self.total += 1
        self.failed += 1
        if self.log and key not in self._logged:
            self._logged.add(key)
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{key}\t{reason}\n")
        if self.total >= self.min_records and (self.failed > self.max_fraction * self.total or self.failed == self.total):
            see_log = f"; see {self.log}" if self.log else ""
            raise UserError(
                f"{self.failed} of {self.total} records could not be read, more than the {self.max_fraction:.0%} allowed "
                f"(last: {key}: {reason}){see_log}; repair the data (imprompt data validate) or allow more with --max-unreadable-fraction"
            )


def prefetch(tasks: Iterable[tuple[Tag, Callable[[], Item]]], workers: int, window: int) -> Iterator[tuple[Tag, "Future[Item]"]]:
    """Run tasks in threads, up to `window` of them ahead, and yield their tags and futures in the order of the tasks."""
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="imprompt-data") as pool:
        pending: deque[tuple[Tag, Future[Item]]] = deque()
        try:
            for tag, task in tasks:
                pending.append((tag, pool.submit(task)))
                if len(pending) >= window:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, future in pending:
                future.cancel()


class Loader(Generic[Item]):
    """Batches of `batch_size` items with equal `batch_key`, loaded in threads, in an order that does not depend on the threads.

    `load_item(record, seed)` makes an item, a named tuple, of a record, and `rebuild_item(*item)` makes it of its plain values.
    `state_dict()` describes the position after the last batch, including the items that do not fill a batch yet; a loader that
    restores it continues exactly there.
    """

    def __init__(
        self,
        records: Records,
        load_item: Callable[[Record, int], Item],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        error_budget: ErrorBudget | None = None,
        batch_key: Callable[[Item], Hashable] = lambda item: None,
        rebuild_item: Callable[..., Item] = lambda *values: values,  # type: ignore[assignment,return-value]
    ):
        self.records, self.load_item, self.batch_size, self.workers = records, load_item, batch_size, workers
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.error_budget, self.batch_key, self.rebuild_item = error_budget or ErrorBudget(), batch_key, rebuild_item
        self._sampler_state = SamplerState()
        self._incomplete: dict[Hashable, list[Item]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The position as plain numbers, strings and tensors, which can be saved."""
        incomplete = [[key, [tuple(item) for item in items]] for key, items in self._incomplete.items()]  # type: ignore[arg-type]
        return {"sampler": asdict(self._sampler_state), "incomplete_batches": incomplete}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position of `state_dict()`."""
        self._sampler_state = SamplerState(**state["sampler"])
        self._incomplete = {key: [self.rebuild_item(*item) for item in items] for key, items in state["incomplete_batches"]}

    def __iter__(self) -> Iterator[list[Item]]:
        sampled = iterate_shuffled(self.records, self.seed, self._sampler_state, self.rank, self.world_size)
        tasks = ((record, partial(self._load, record)) for record in sampled)
        for record, future in prefetch(tasks, self.workers, 2 * self.batch_size + self.workers):
            yield from self._add_to_batch(record, future)

    def _load(self, sampled: SampledRecord) -> Item:
        return self.load_item(sampled.read(), sampled.seed)

    def _add_to_batch(self, sampled: SampledRecord, future: "Future[Item]") -> Iterator[list[Item]]:
        """Yield the batch that the item fills, if it does."""
        try:
            item = future.result()
        except READ_ERRORS as error:
            self._sampler_state = sampled.next_state
            self.error_budget.record_failure(get_record_key(sampled.read, error), summarize_error(error))
            return
        self._sampler_state = sampled.next_state
        self.error_budget.record_success()
        key = self.batch_key(item)
        batch = self._incomplete.setdefault(key, [])
        batch.append(item)
        if len(batch) == self.batch_size:
            del self._incomplete[key]
            yield batch


def get_record_key(read: RecordReader, error: Exception) -> str:
    """The key of an unreadable record for the log; its number or the error where even the key cannot be read."""
    try:
        return read().key
    except Exception:
        return f"record {read.args[0] + 1}" if isinstance(read, partial) else summarize_error(error)
