"""Batches, prepared ahead in threads; unreadable records are left out, counted and named."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from imprompt.data.records import Record, Records
from imprompt.data.sampler import Drawn, Place, ordered
from imprompt.errors import UserError, brief

Item = TypeVar("Item")
Tag = TypeVar("Tag")
UNREADABLE = (UserError, OSError, ValueError)  # what reading a damaged record raises


class Skipped:
    """What could not be read: counted, named in a log, and an end to the run when it is too much."""

    def __init__(self, most: float = 0.1, log: Path | None = None, enough: int = 100):
        self.most, self.log, self.enough = most, log, enough
        self.count = self.total = 0
        self._named: set[str] = set()

    def seen(self) -> None:
        """One record came through."""
        self.total += 1

    def lost(self, key: str, why: str) -> None:
        """One record did not. Raises UserError when more than the stated share is lost."""
        self.total += 1
        self.count += 1
        if self.log and key not in self._named:
            self._named.add(key)
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{key}\t{why}\n")
        if self.total >= self.enough and self.count > self.most * self.total:
            where = f"; see {self.log}" if self.log else ""
            last = f"last: {key}: {why}"
            raise UserError(
                f"{self.count} of {self.total} records could not be read, more than the {self.most:.0%} allowed ({last}){where}; "
                "mend the data (imprompt data validate) or allow more with --max-unreadable"
            )


def ahead(work: Iterable[tuple[Tag, Callable[[], Item]]], workers: int, window: int) -> Iterator[tuple[Tag, "Future[Item]"]]:
    """Do the work in threads, up to `window` pieces ahead, and hand it out in its own order."""
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="imprompt-data") as pool:
        waiting: deque[tuple[Tag, Future[Item]]] = deque()
        try:
            for tag, call in work:
                waiting.append((tag, pool.submit(call)))
                if len(waiting) >= window:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


class Loader(Generic[Item]):
    """Groups of `batch` items in the order of `ordered`, all of one shape, made in threads but never out of turn.

    `make(record, seed)` turns a record into an item, a tuple; `shape(item)` says which may stand in one batch, and
    `revive(*item)` makes an item of plain values. `state()` is where the last batch handed out ended, with what waits for
    others of its shape; a loader that is given it goes on exactly there.
    """

    def __init__(
        self,
        records: Records,
        make: Callable[[Record, int], Item],
        batch: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 2,
        skipped: Skipped | None = None,
        shape: Callable[[Item], Any] = lambda item: None,
        revive: Callable[..., Item] = lambda *values: values,  # type: ignore[assignment,return-value]
    ):
        self.records, self.make, self.batch, self.seed, self.rank, self.ranks = records, make, batch, seed, rank, ranks
        self.workers, self.skipped, self.shape, self.revive = workers, skipped or Skipped(), shape, revive
        self._place = Place()
        self._waiting: dict[Any, list[Item]] = {}

    def state(self) -> dict[str, Any]:
        """Plain numbers, strings and tensors: can be saved."""
        waiting = [[key, [tuple(item) for item in items]] for key, items in self._waiting.items()]  # type: ignore[arg-type]
        return {"place": asdict(self._place), "waiting": waiting}

    def load_state(self, state: dict[str, Any]) -> None:
        self._place = Place(**state["place"])
        self._waiting = {key: [self.revive(*item) for item in items] for key, items in state["waiting"]}

    def __iter__(self) -> Iterator[list[Item]]:
        drawn = ordered(self.records, self.seed, self._place, self.rank, self.ranks)
        work = ((d, partial(self._make, d)) for d in drawn)
        for one, future in ahead(work, self.workers, 2 * self.batch + self.workers):
            yield from self._take(one, future)

    def _make(self, drawn: Drawn) -> Item:
        return self.make(drawn.read(), drawn.seed)

    def _take(self, drawn: Drawn, future: "Future[Item]") -> Iterator[list[Item]]:
        try:
            item = future.result()
        except UNREADABLE as error:
            self._place = drawn.after
            self.skipped.lost(name_of(drawn.read, error), brief(error))
            return
        self._place = drawn.after
        self.skipped.seen()
        key = self.shape(item)
        waiting = self._waiting.setdefault(key, [])
        waiting.append(item)
        if len(waiting) == self.batch:
            del self._waiting[key]
            yield waiting


def name_of(read: Callable[[], Record], error: Exception) -> str:
    """What a log calls a record that could not be used."""
    try:
        return read().key
    except Exception:
        return brief(error)
