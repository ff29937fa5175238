"""The first paper's comparison at the smoke budget: every method end to end, resumed, reported, judged."""

import json
from dataclasses import replace

import pytest
import torch

from imprompt import cli
from imprompt.config import GENERAL, Reproduce
from imprompt.errors import UserError
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.scoring import Score
from imprompt.studies import ip_adapter_claims as claims
from imprompt.studies.base import Finished, finished, finished_path, run, study_of
from imprompt.studies.ip_adapter import CUSTOM, curve_names


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    choice = Reproduce(budget="smoke", out=str(folder), processes=1)
    told = list(run(choice))
    return choice, folder, told


def test_every_method_is_trained_and_measured(smoke):
    choice, folder, told = smoke
    rows = {name: finished(folder, name) for name in study_of(choice).names()}
    assert all(rows.values()) and set(GENERAL) < set(rows)
    for name in set(GENERAL) - {"reference-only"}:
        assert (folder / "train" / name / "adapter.safetensors").is_file()
        assert rows[name].score.trainable > 10_000 and rows[name].score.pictures == 8
        assert len(rows[name].each["CLIP-I"]) == 4
    assert rows["reference-only"].score.trainable == 0
    assert rows["copy"].score.figures["CLIP-I"].value == pytest.approx(1)
    assert {at.stage for at in told} >= {"encoding", "training", "drawing", "ink"}


def test_a_second_run_has_nothing_to_do_and_a_lost_row_is_made_again(smoke):
    choice, folder, _ = smoke
    assert [at.total for at in run(choice)] == [0]
    before = finished(folder, "simple").score
    finished_path(folder, "simple").unlink()
    shelf = folder / "evaluation" / "rows" / "simple"
    for lost in shelf.glob("chunk-*"):
        lost.unlink()
    (shelf / "score.json").write_text((folder / "evaluation" / "rows" / "text" / "score.json").read_text())  # and figures of something else
    list(run(choice))
    after = finished(folder, "simple").score
    assert after.figures == before.figures and shelf.joinpath("score.json").is_file()


def test_two_processes_make_the_same_rows(smoke, tmp_path):
    choice = replace(smoke[0], out=str(tmp_path), processes=2, method=("simple", "uni-controlnet"))
    list(run(choice))
    for name in ("text", "simple", "uni-controlnet"):
        mine, theirs = finished(tmp_path, name), finished(smoke[1], name)
        assert mine.score.figures == theirs.score.figures and mine.each == theirs.each


def test_another_budget_in_the_same_folder_is_refused(smoke):
    with pytest.raises(UserError, match="budget = 'smoke', and now it is 'full'"):
        next(run(replace(smoke[0], budget="full")))


def test_the_report_has_the_papers_table_and_every_claim(smoke, capsys):
    folder = smoke[1]
    assert cli.main(["reproduce", "ip-adapter", "--budget", "smoke", "--out", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [claim["letter"] for claim in told["claims"]] == list("abcdef")
    assert all(claim["verdict"] in ("holds", "does not hold") for claim in told["claims"])
    text = (folder / "report" / "README.md").read_text("utf-8")
    for title, *_ in claims.PAPER.values():
        assert f"| {title} |" in text
    assert "0.858" in text and "(e) λ trades" in text
    page = (folder / "report" / "index.html").read_text("utf-8")
    assert "://" not in page and page.count("data:image/png") == 21  # 20 rows and the curve
    assert {"README.md", "index.html", "results.json", "table.csv", "sheet.png", "curve.png"} == {
        p.name for p in (folder / "report").iterdir()
    }


# ------------------------------------------------------------------------------------- the claims, on made-up figures


def row(likeness, text=0.5, diversity=0.1, trainable=360_000, scale=1.0, seen=()):
    figures = {name: Interval(v, v, v) for name, v in (("CLIP-I", likeness), ("CLIP-T", text), ("diversity", diversity))}
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0))  # from prompt to prompt, alike in every row
    each = {name: (v.value + 0.2 * noise).tolist() for name, v in figures.items()} | {"seen": list(seen)}
    return Finished(Score("x", 8, 8, 0, trainable, scale=scale, figures=figures), {"training": 0, "drawing": 0}, each, {})


def made_up(**changes):
    rows = {name: row(0.8, 0.4) for name in GENERAL}
    rows |= {name: row(0.9, 0.5, trainable=12_000_000) for name in claims.FULL}
    rows |= {"text": row(0.7), "ip-adapter": row(0.89, 0.5), "ip-adapter-plus": row(0.91, 0.5, 0.05)}
    for i, name in enumerate(curve_names()):
        rows[name] = row(0.1 + 0.1 * i, 0.5 - 0.05 * i, scale=i, seen=(1.0, 2.0))
    rows |= {f"text {CUSTOM}": row(0.68), f"ip-adapter {CUSTOM}": row(0.87)}
    return rows | changes


def verdicts(**changes):
    return "".join(c.letter for c in claims.claims(made_up(**changes)) if c.holds)


def test_claims_hold_where_the_figures_say_so():
    assert verdicts() == "abcdef"


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"kandinsky": row(0.95, trainable=12_000_000)}, "bcdef"),
        ({"kandinsky": row(0.91, trainable=5_000_000)}, "bcdef"),
        ({"shuffle": row(0.9, 0.4)}, "acdef"),
        ({"seecoder": row(0.8, 0.6)}, "acdef"),
        ({"simple": row(0.89, 0.4)}, "adef"),
        ({"ip-adapter-plus": row(0.91, 0.5, 0.2)}, "abcef"),
        ({"ip-adapter-plus": row(0.88, 0.5, 0.05)}, "abcef"),
        ({"ip-adapter λ 0.4": row(0.05, 0.4, scale=0.4)}, "abcdf"),
        ({"ip-adapter λ base": row(0.1, seen=(1.0, 2.5))}, "abcdf"),
        ({f"ip-adapter {CUSTOM}": row(0.8)}, "abcde"),
    ],
)
def test_a_claim_falls_where_the_figures_say_so(changes, left):
    assert verdicts(**changes) == left


def test_a_difference_within_its_interval_does_not_count():
    unlike = row(0.87)
    unlike.each["CLIP-I"] = [v + 0.3 * (-1) ** i for i, v in enumerate(unlike.each["CLIP-I"])]  # lower in the mean, not for sure
    assert verdicts(simple=unlike) == "adef"


def test_a_missing_row_leaves_a_claim_unjudged():
    rows = made_up()
    del rows["simple"]
    found = {c.letter: c for c in claims.claims(rows)}
    assert found["c"].verdict == "not judged" and "simple" in found["c"].figures and found["d"].holds
