"""Claims of a paper about result rows (one evaluated system each), and whether our rows support them.

A claim that one row is better than another is tested by the mean of the paired differences, prompt by prompt or, where prompts
belong to subjects, subject by subject; it is supported if the whole 95 % confidence interval of that mean lies on the right side of zero. A
claim about a ratio ("within 3 %") or about a trend ("monotonically") is evaluated on the values as rounded in the report.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from imprompt.evaluation.report import score_to_json
from imprompt.studies.base import RowId, RowResult
from imprompt.utils.statistics import Interval, mean_interval

Rows = Mapping[RowId, RowResult]
Evaluator = Callable[[Rows], tuple[bool, str]]  # whether the rows support a claim, and the numbers that show it


class Claim(NamedTuple):
    """One claim and its evaluation."""

    letter: str
    text: str
    supported: bool | None  # None: rows are missing
    evidence: str

    @property
    def verdict(self) -> str:
        """The evaluation in words."""
        return "not evaluated" if self.supported is None else "supported" if self.supported else "not supported"


def evaluate_claims(rows: Rows, evaluators: Mapping[str, tuple[str, Evaluator]]) -> list[Claim]:
    """Evaluate claims by letter: each has its text and its evaluator."""
    claims = []
    for letter, (text, evaluate) in evaluators.items():
        try:
            claims.append(Claim(letter, text, *evaluate(rows)))
        except KeyError as missing:
            claims.append(Claim(letter, text, None, f"{missing.args[0]} is not there yet"))
    return claims


def withhold_verdicts(claims: Sequence[Claim], budget: str) -> list[Claim]:
    """The claims without verdicts where the budget is too small for any: a smoke run shows only that everything runs."""
    if budget != "smoke":
        return list(claims)
    return [claim._replace(supported=None, evidence="A smoke run shows only that it runs.") for claim in claims]


def metric_value(rows: Rows, row_id: RowId, name: str) -> float:
    """A row's value of a metric."""
    return rows[row_id].score.metrics[name].value


def paired_difference(rows: Rows, first: RowId, second: RowId, name: str) -> Interval:
    """Mean difference in a metric, first − second, over the prompts that both rows have; over subjects where there are any."""
    a, b = rows[first].per_prompt, rows[second].per_prompt
    count = min(len(a[name]), len(b[name]))  # sweeps have fewer prompts
    differences = [x - y for x, y in zip(a[name][:count], b[name][:count], strict=True)]
    return independent_mean(mean_per_subject(differences, a["subject"][:count]) if "subject" in a else torch.tensor(differences))


def mean_per_subject(values: Sequence[float], subjects: Sequence[float]) -> torch.Tensor:
    """The mean of each subject's values, (subjects,) in float64. subjects: the number of each value's subject, from 0."""
    groups = torch.tensor(subjects, dtype=torch.long)
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, torch.tensor(values, dtype=torch.float64))
    return sums / groups.bincount()


def independent_mean(values: torch.Tensor) -> Interval:
    """The mean of independent values, one for each subject (or prompt), with its interval."""
    return mean_interval(values, torch.arange(len(values)))


def format_difference(value: Interval) -> str:
    """A difference with both ends of its interval."""
    return f"{value.value:+.3f} ({value.low:+.3f} … {value.high:+.3f})"


def to_json(claims: Sequence[Claim], rows: Rows) -> dict[str, object]:
    """The claims, the metrics of every row, and the machine that they were computed on."""
    return {
        "claims": [{"claim": c.letter, "text": c.text, "verdict": c.verdict, "evidence": c.evidence} for c in claims],
        "rows": {str(r): score_to_json(row.score) | {"minutes": row.minutes, "protocol": row.protocol} for r, row in rows.items()},
        "machine": machine_name(),
    }


def merge_protocols(rows: Rows) -> dict[str, str]:
    """The evaluation settings, field by field. Where rows differ, values other than the most common are followed by their rows."""
    protocols = {row_id: row.protocol for row_id, row in rows.items() if row.protocol}
    merged = {}
    for field in dict.fromkeys(field for protocol in protocols.values() for field in protocol):
        rows_by_value: dict[str, list[str]] = {}
        for row_id, protocol in protocols.items():
            rows_by_value.setdefault(str(protocol.get(field, "–")), []).append(str(row_id))
        most_frequent = max(rows_by_value, key=lambda value: len(rows_by_value[value]))
        others = [f"{value} ({'; '.join(labels)})" for value, labels in rows_by_value.items() if value != most_frequent]
        merged[field] = "; ".join([most_frequent, *others])
    return merged


def machine_name() -> str:
    """The hardware on which the rows' minutes were measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"one thread of {platform.processor() or platform.machine()} for each row"
