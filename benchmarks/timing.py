"""Times of several candidates, measured in turns: whatever else the machine does affects all of them equally."""

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
    """Seconds of every round by candidate, and what each returned when it was warmed up."""

    seconds: dict[str, list[float]]
    returned: dict[str, Any]

    def median(self, name: str) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str | None = None) -> Ratio:
        """Ratio to the baseline's time in the same round; the baseline is the first candidate unless named."""
        return ratio_by_round(self.seconds[name], self.seconds[baseline or next(iter(self.seconds))])


def interleave(candidates: Mapping[str, Callable[[], Any]], rounds: int = 5, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Call each once to warm up, then all in turns, `rounds` times; every round begins with the next one.

    `time.process_time` as the clock gives usable ratios on a busy machine, if torch has one thread.
    """
    returned = {name: call() for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            candidates[name]()
            seconds[name].append(clock() - start)
    return Times(seconds, returned)


def ratio_by_round(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """The ratios of all rounds, summarized."""
    ratios = [own / base for own, base in zip(seconds, baseline, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high)
