"""Times of several contestants, taken in turns: whatever else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Median over the rounds, with the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ±{(self.high - self.low) / 2:.2f}"


class Times(NamedTuple):
    """Seconds of every round by contestant, and what each returned when it was warmed up."""

    seconds: dict[str, list[float]]
    returned: dict[str, Any]

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str | None = None) -> Ratio:
        """To the baseline's time in the same round; the baseline is the first contestant unless named."""
        return ratio(self.seconds[name], self.seconds[baseline or next(iter(self.seconds))])


def interleave(contestants: Mapping[str, Callable[[], Any]], rounds: int = 5, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Call each once to warm up, then all in turns, `rounds` times; every round begins with the next one.

    `time.process_time` for the clock gives usable ratios on a busy machine, if torch has one thread.
    """
    returned = {name: call() for name, call in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return Times(seconds, returned)


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Round by round."""
    each = [mine / base for mine, base in zip(seconds, baseline, strict=True)]
    low, median, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return Ratio(median, low, high)
