"""The IP-Adapter study at the smoke budget: every method end to end, continued, reported; its claims on invented numbers."""

import json

import pytest
import torch

from imprompt import cli
from imprompt.config import IP_ADAPTER_PAPER_METHODS, ReproduceConfig
from imprompt.errors import UserError
from imprompt.evaluation.scoring import RowScore
from imprompt.studies import ip_adapter_claims as claims
from imprompt.studies.base import RowId, RowResult, load_result, load_results, result_path
from imprompt.studies.ip_adapter import ADAPTER_ID, CUSTOM_MODEL_IDS, SWEEP_IDS, TEXT_SWEEP_ID
from imprompt.studies.runner import create_study, run_study
from imprompt.utils.statistics import Interval


@pytest.fixture(scope="module")
def smoke_study(tmp_path_factory, forked_workers):
    folder = tmp_path_factory.mktemp("smoke")
    config = ReproduceConfig.from_options(budget="smoke", output_dir=str(folder), num_processes=1)
    return config, folder, list(run_study(config))


def test_every_method_is_trained_and_measured(smoke_study):
    config, folder, progress = smoke_study
    row_ids = create_study(config).row_ids()
    rows = load_results(folder, row_ids)
    assert list(rows) == row_ids and set(map(RowId, IP_ADAPTER_PAPER_METHODS)) < set(rows)
    for method in set(IP_ADAPTER_PAPER_METHODS) - {"reference-only"}:
        assert (folder / "train" / method / "adapter.safetensors").is_file()
        row = rows[RowId(method)]
        assert row.score.trainable_params > 10_000 and row.score.num_images == 8
        assert len(row.per_prompt["CLIP-I (mini)"]) == 4
    assert rows[RowId("reference-only")].score.trainable_params == 0
    assert rows[RowId("copy")].score.metrics["CLIP-I (mini)"].value == pytest.approx(1)
    assert {step.stage for step in progress} >= {"encoding", "training", "generation", "ink"}


def test_a_second_run_has_nothing_to_do_and_a_lost_row_is_generated_again(smoke_study):
    config, folder, _ = smoke_study
    assert [step.total for step in run_study(config)] == [0]
    simple = RowId("simple")
    before = load_result(folder, simple).score
    result_path(folder, simple).unlink()
    store = folder / "evaluation" / "rows" / "simple"
    for chunk in store.glob("chunk-*"):
        chunk.unlink()
    (store / "score.json").write_text(
        (folder / "evaluation" / "rows" / "text-only" / "score.json").read_text()
    )  # and the score of another row
    list(run_study(config))
    after = load_result(folder, simple).score
    assert after.metrics == before.metrics and store.joinpath("score.json").is_file()


def test_two_processes_make_the_same_rows(smoke_study, tmp_path):
    methods = ("simple", "uni-controlnet")
    list(run_study(smoke_study[0].with_options(output_dir=str(tmp_path), num_processes=2, method=methods)))
    for row_id in map(RowId, ("text", *methods)):
        repeated, first = load_result(tmp_path, row_id), load_result(smoke_study[1], row_id)
        assert repeated.score.metrics == first.score.metrics and repeated.per_prompt == first.per_prompt


def test_another_budget_in_the_same_folder_is_refused(smoke_study):
    with pytest.raises(UserError, match="budget = 'smoke', and now it is 'full'"):
        next(run_study(smoke_study[0].with_options(budget="full")))


def test_the_report_has_the_papers_table_and_every_claim(smoke_study, capsys):
    folder = smoke_study[1]
    assert cli.main(["reproduce", "ip-adapter", "--budget", "smoke", "--output-dir", str(folder), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert [claim["letter"] for claim in output["claims"]] == list("abcdef")
    assert {claim["verdict"] for claim in output["claims"]} == {"not evaluated"}  # a smoke run
    text = (folder / "report" / "README.md").read_text("utf-8")
    for title, *_ in claims.PAPER_TABLE.values():
        assert f"| {title} |" in text
    assert "0.858" in text and "(e) λ trades" in text
    page = (folder / "report" / "index.html").read_text("utf-8")
    assert "://" not in page and page.count("data:image/png") == 21  # 20 rows and the sweep
    assert {"README.md", "index.html", "results.json", "table.csv", "sheet.png", "curve.png"} == {
        path.name for path in (folder / "report").iterdir()
    }


# ------------------------------------------------------------------------------------- the claims, on invented numbers


def invent_row(clip_i, clip_t=0.5, diversity=0.1, trainable_params=360_000, scale=1.0, clip_embeddings=()):
    metrics = {name: Interval(v, v, v) for name, v in (("CLIP-I (mini)", clip_i), ("CLIP-T (mini)", clip_t), ("diversity", diversity))}
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0))  # from prompt to prompt, the same in every row
    per_prompt = {name: (v.value + 0.2 * noise).tolist() for name, v in metrics.items()} | {"CLIP embeddings": list(clip_embeddings)}
    score = RowScore("x", 8, 8, 0, trainable_params, scale=scale, metrics=metrics)
    return RowResult(score, {"training": 0, "generation": 0}, per_prompt, {})


def invent_rows(changes=None):
    rows = {RowId(method): invent_row(0.8, 0.4) for method in IP_ADAPTER_PAPER_METHODS}
    rows |= {RowId(method): invent_row(0.9, 0.5, trainable_params=12_000_000) for method in claims.FULL_FINETUNING_METHODS}
    rows |= {RowId("text"): invent_row(0.7), ADAPTER_ID: invent_row(0.89, 0.5), claims.PLUS_ID: invent_row(0.91, 0.5, 0.05)}
    for i, row_id in enumerate((*SWEEP_IDS, TEXT_SWEEP_ID)):
        rows[row_id] = invent_row(0.1 + 0.1 * i, 0.5 - 0.05 * i, scale=i, clip_embeddings=(1.0, 2.0))
    rows |= dict(zip(CUSTOM_MODEL_IDS, (invent_row(0.68), invent_row(0.87)), strict=True))
    return rows | (changes or {})


def supported_claims(changes=None):
    return "".join(claim.letter for claim in claims.ip_adapter_claims(invent_rows(changes)) if claim.supported)


def test_claims_are_supported_where_the_numbers_say_so():
    assert supported_claims() == "abcdef"


@pytest.mark.parametrize(
    ("row_id", "row", "supported"),
    [
        (RowId("kandinsky"), invent_row(0.95, trainable_params=12_000_000), "bcdef"),
        (RowId("kandinsky"), invent_row(0.91, trainable_params=5_000_000), "bcdef"),
        (RowId("shuffle"), invent_row(0.9, 0.4), "acdef"),
        (RowId("seecoder"), invent_row(0.8, 0.6), "acdef"),
        (RowId("simple"), invent_row(0.89, 0.4), "adef"),
        (RowId("ip-adapter-plus"), invent_row(0.91, 0.5, 0.2), "abcef"),
        (RowId("ip-adapter-plus"), invent_row(0.88, 0.5, 0.05), "abcef"),
        (RowId("ip-adapter", scale=0.4, sweep=True), invent_row(0.05, 0.4, scale=0.4), "abcdf"),
        (TEXT_SWEEP_ID, invent_row(0.1, clip_embeddings=(1.0, 2.5)), "abcdf"),
        (RowId("ip-adapter", custom_model=True), invent_row(0.8), "abcde"),
    ],
)
def test_a_claim_is_not_supported_where_the_numbers_say_so(row_id, row, supported):
    assert row_id in invent_rows() and supported_claims({row_id: row}) == supported


def test_a_difference_within_its_interval_does_not_count():
    noisy = invent_row(0.87)
    noisy.per_prompt["CLIP-I (mini)"] = [
        v + 0.3 * (-1) ** i for i, v in enumerate(noisy.per_prompt["CLIP-I (mini)"])
    ]  # lower in the mean, not for sure
    assert supported_claims({RowId("simple"): noisy}) == "adef"


def test_a_missing_row_leaves_a_claim_unevaluated():
    rows = invent_rows()
    del rows[RowId("simple")]
    by_letter = {claim.letter: claim for claim in claims.ip_adapter_claims(rows)}
    assert by_letter["c"].verdict == "not evaluated" and "simple" in by_letter["c"].evidence and by_letter["d"].supported
