"""The second paper's comparison at the smoke budget: every row end to end, resumed, reported; its claims on made-up figures."""

import json
from dataclasses import replace

import pytest
import torch

from imprompt import cli
from imprompt.config import PERSONAL, Reproduce
from imprompt.errors import UserError
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.scoring import Score
from imprompt.studies import personalization_claims as claims
from imprompt.studies.base import Finished, finished, run, study_of
from imprompt.studies.personalization import PLAIN, SEVERAL, TRAINED, by_subject, timed


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    choice = Reproduce(paper="personalisation", budget="smoke", out=str(folder), processes=1)
    return choice, folder, list(run(choice))


def test_every_row_is_trained_and_measured(smoke):
    choice, folder, told = smoke
    rows = {name: finished(folder, name) for name in study_of(choice).names()}
    assert all(rows.values())
    assert {"copy", "real", "reference", "text", *PLAIN, *PERSONAL, *(f"{kind} seed {n}" for kind in TRAINED for n in (0, 1))} < set(rows)
    assert {f"{way} after {n}" for way in (*SEVERAL, *(f"{kind} seed 0" for kind in TRAINED)) for n in (1, 9)} < set(rows)
    for name, row in rows.items():
        if " after " not in name and name not in ("copy", "real", "reference"):
            assert row.score.pictures == 12 and len(row.each["identity"]) == 6 and len(set(row.each["subject"])) == 3
    for name in PERSONAL:
        assert claims.seconds_of(name, rows[name], {}) > 0
    seconds = timed(folder)
    assert set(seconds) == {*PLAIN, *TRAINED}
    assert 0 < seconds["one"] < seconds["average-tokens"] < claims.seconds_of("dreambooth", rows["dreambooth"], seconds)
    assert rows["attention-tokens seed 0"].score.trainable > rows["one"].score.trainable
    assert rows["attention-tokens seed 0"].each["identity"] != rows["attention-tokens seed 1"].each["identity"]
    assert {at.stage for at in told} >= {"encoding", "training", "drawing"}
    split = json.loads((folder / "train" / "attention-tokens seed 0" / "subjects.json").read_text())
    assert len(split["train"]) == 4 and not split["test"]


def test_a_second_run_has_nothing_to_do(smoke):
    assert [at.total for at in run(smoke[0])] == [0]
    with pytest.raises(UserError, match="budget = 'smoke', and now it is 'full'"):
        next(run(replace(smoke[0], budget="full")))


def test_the_report_has_the_papers_table_and_every_claim(smoke, capsys):
    folder = smoke[1]
    assert cli.main(["reproduce", "personalisation", "--budget", "smoke", "--out", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [claim["letter"] for claim in told["claims"]] == list("abcdefghi")
    text = (folder / "report" / "README.md").read_text("utf-8")
    for title, *_ in claims.PAPER.values():
        assert f"| {title} |" in text
    assert "18.72" in text and "Seed by seed" in text and "attention-tokens seed 1" in text
    page = (folder / "report" / "index.html").read_text("utf-8")
    assert "://" not in page and page.count("data:image/png") == len(claims.SHOWN) + 1
    for place in (text, page):
        assert (
            "interval over subjects. CLIP-I: ↑ cosine with the photograph to be drawn; " in place and "(row reference shows one)" in place
        )
    assert "<img alt='average' " in page
    assert {"README.md", "index.html", "results.json", "table.csv", "sheet.png", "references.png"} == {
        p.name for p in (folder / "report").iterdir()
    }


def test_what_was_timed_is_not_timed_again_and_what_is_not_there_cannot_be(tmp_path):
    study = study_of(Reproduce(paper="personalisation", budget="smoke", out=str(tmp_path)))
    assert study.to_time([]) == [*PLAIN] and study.to_time(["self-attention seed 0"]) == [*PLAIN, "self-attention"]
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "seconds.json").write_text('{"one": 0.1}')
    assert study.to_time([]) == [name for name in PLAIN if name != "one"]


def test_one_row_can_be_asked_for(tmp_path):
    names = study_of(Reproduce(paper="personalisation", budget="smoke", method=("average", "attention-tokens"))).names()
    trained = [f"attention-tokens seed {seed}{more}" for seed in range(2) for more in ("", " given one")]
    assert names == ["copy", "real", "reference", "text", "average", *trained]
    with pytest.raises(UserError, match="method: expected one of one, one-plus, concat"):
        Reproduce(paper="personalisation", method=("kandinsky",))


# ------------------------------------------------------------------------------------- the claims, on made-up figures


def row(identity=0.5, fid=10.0, score=5.0, width=0.1, spread=0.0):
    """What rows share is the subjects' difficulty; `spread` is the row's own."""
    noise = torch.randn(12, generator=torch.Generator().manual_seed(0))
    noise += 5 * spread * torch.randn(12, generator=torch.Generator().manual_seed(round(1000 * identity)))
    figures = {"identity": Interval(identity, identity, identity), "FID": Interval(fid, fid - width, fid + width)}
    figures |= {"IS": Interval(score, score - width, score + width)}
    each = {"identity": (identity + 0.2 * noise).tolist(), "subject": [n // 2 for n in range(12)]}
    return Finished(Score("x", 24, 12, 0, 300_000, figures=figures), {"training": 0, "drawing": 0}, each, {})


def made_up(**changes):
    rows = {"one": row(0.6, 9.0, 5), "average": row(0.65, 10, 4), "max": row(0.62, 11, 4), "dreambooth": row(0.7, 9.6, 5.5)}
    rows |= {"self-attention": row(0.8, 7.5, 6), "attention-tokens": row(0.9), "average-tokens": row(0.88), "one-plus": row(0.7)}
    rows |= {"average-plus": row(0.66), "max-plus": row(0.64), "self-attention given one": row(0.52)}
    rows |= {f"self-attention seed 0 after {n}": row(0.5 + 0.02 * n) for n in (1, 3, 9)}
    return rows | changes


def verdicts(**changes):
    return "".join(c.letter for c in claims.claims(made_up(**changes)) if c.holds)


def test_claims_hold_where_the_figures_say_so():
    assert verdicts() == "abcdefghi"


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"dreambooth": row(0.7, 7.0, 5.5)}, "bcdefghi"),
        ({"dreambooth": row(0.7, 7.6, 5.5)}, "bcdefghi"),  # within the intervals
        ({"one": row(0.6, 9.0, 7.0)}, "acdefghi"),
        ({"average": row(0.85, 10, 4)}, "abdefghi"),
        ({"max": row(0.62, 8.0, 4)}, "abcefghi"),
        ({"self-attention given one": row(0.85)}, "abcdfghi"),
        ({"attention-tokens": row(0.61)}, "abcdefg"),
        ({"attention-tokens": row(0.87)}, "abcdefgi"),
        ({"one": row(0.9, 9.0, 5)}, "abdegh"),
        ({"one-plus": row(0.95)}, "abcdefhi"),
        ({"max-plus": row(0.9)}, "abcdefhi"),
        ({"attention-tokens": row(0.89, spread=0.3)}, "abcdefgi"),  # better in the mean, but not surely
        ({"self-attention": row(0.8, 7.5, 6, spread=1.0)}, "abdfghi"),
    ],
)
def test_a_claim_falls_where_the_figures_say_so(changes, left):
    assert verdicts(**changes) == left


def test_differences_of_trained_ways_are_told_seed_by_seed():
    seeds = {f"self-attention seed {n}": row(0.8 + 0.1 * n) for n in range(2)}
    seeds |= {f"self-attention seed {n} given one": row(0.5) for n in range(2)}
    found = {c.letter: c.figures for c in claims.claims(made_up(**seeds))}
    assert (
        found["e"].count("seed by seed +0.300 +0.400") == 1 and "to one +0.200 (+0.200 … +0.200), seed by seed +0.200 +0.300;" in found["c"]
    )
    assert "seed by seed" not in found["f"]


def test_a_missing_row_leaves_a_claim_unjudged():
    rows = made_up()
    del rows["max"]
    found = {c.letter: c for c in claims.claims(rows)}
    assert found["d"].verdict == "not judged" and "max" in found["d"].figures and found["e"].holds


def test_seeds_become_one_row_once_all_are_there():
    rows = {f"attention-tokens seed {n}": row(0.5 + 0.1 * n, 8.0 + n) for n in range(3)}
    found = claims.gathered(rows, 3)["attention-tokens"]
    assert found.score.figures["identity"].value == pytest.approx(sum(found.each["identity"]) / 12)
    assert found.score.figures["FID"].value == 9 and found.score.figures["FID"].low == pytest.approx(7.9)
    assert "attention-tokens" not in claims.gathered({k: v for k, v in rows.items() if "2" not in k}, 3)


def test_subjects_weigh_the_same():
    assert by_subject([1.0, 3.0, 10.0], [0, 0, 1]).tolist() == [2.0, 10.0]


def test_a_protocol_that_rows_do_not_share_is_told_in_full():
    rows = {name: row()._replace(protocol={"steps": steps, "data": "mini"}) for name, steps in (("a", 8), ("b", 6), ("c", 8))}
    assert claims.protocols(rows) == {"steps": "8; 6 (b)", "data": "mini"}
