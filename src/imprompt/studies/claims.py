"""Claims about rows, and whether they hold.

A claim that one row is better than another is judged by the mean of the differences, prompt by prompt; it holds where
the whole 95 % interval of that mean is on the right side. A claim that names a share ("within 3 %") or a course
("rises") is judged by the figures as the table prints them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from imprompt.evaluation.metrics import Interval, mean_interval
from imprompt.evaluation.report import as_dict
from imprompt.studies.base import Finished, machine

Rows = Mapping[str, Finished]


class Claim(NamedTuple):
    """One claim and what became of it."""

    letter: str
    text: str
    holds: bool | None  # None: rows are missing
    figures: str

    @property
    def verdict(self) -> str:
        return "not judged" if self.holds is None else "holds" if self.holds else "does not hold"


def better(rows: Rows, one: str, other: str, column: str) -> Interval:
    """Mean difference of two rows over the same prompts."""
    a, b = (torch.tensor(rows[name].each[column]) for name in (one, other))
    return mean_interval(a - b, torch.arange(len(a)))


def difference(value: Interval) -> str:
    return f"{value.value:+.3f} ({value.low:+.3f} … {value.high:+.3f})"


def value_of(rows: Rows, name: str, column: str) -> float:
    return rows[name].score.figures[column].value


def judged(rows: Rows, texts: Mapping[str, tuple[str, Callable[[Rows], tuple[bool, str]]]]) -> list[Claim]:
    """Each claim by its letter: its text, and what judges it."""
    found = []
    for letter, (text, judge) in texts.items():
        try:
            found.append(Claim(letter, text, *judge(rows)))
        except KeyError as missing:
            found.append(Claim(letter, text, None, f"row {missing.args[0]} is not there yet"))
    return found


def plain(claims: Sequence[Claim], rows: Rows) -> dict[str, object]:
    """For JSON: the claims, every row's figures, and what they were made on."""
    return {
        "claims": [{"claim": c.letter, "text": c.text, "verdict": c.verdict, "figures": c.figures} for c in claims],
        "rows": {name: as_dict(row.score) | {"minutes": row.minutes, "protocol": row.protocol} for name, row in rows.items()},
        "machine": machine(),
    }


def protocols(rows: Rows) -> dict[str, str]:
    """The protocol, field by field; where rows differ in it, all that they have and which rows it is."""
    kept = {name: row.protocol for name, row in rows.items() if row.protocol}
    found = {}
    for field in dict.fromkeys(field for protocol in kept.values() for field in protocol):
        whose: dict[str, list[str]] = {}
        for name, protocol in kept.items():
            whose.setdefault(str(protocol.get(field, "–")), []).append(name)
        most = max(whose, key=lambda value: len(whose[value]))
        others = [f"{value} ({', '.join(names)})" for value, names in whose.items() if value != most]
        found[field] = "; ".join([most, *others])
    return found
