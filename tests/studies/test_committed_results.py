"""The committed reports of both papers, written again from their finished rows: every number is the committed one."""

import json
import re
import shutil
from pathlib import Path

import pytest

from imprompt.config import ReproduceConfig
from imprompt.studies.runner import STUDIES, create_study, write_report

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module", params=list(STUDIES))
def report(request, tmp_path_factory):
    """The committed folder of a paper, and a report written from its finished rows."""
    committed, out = RESULTS / request.param, tmp_path_factory.mktemp(request.param)
    shutil.copytree(committed / "finished", out / "finished")
    config = ReproduceConfig.from_options(paper=request.param, output_dir=str(out))
    return config, committed, write_report(config)[0].parent


def test_every_row_is_committed(report):
    config, committed, _ = report
    assert {path.stem for path in (committed / "finished").glob("*.json")} - {"seconds"} == {r.slug for r in create_study(config).row_ids()}


@pytest.mark.parametrize("name", ["README.md", "table.csv"])
def test_texts_and_tables_are_the_committed_ones(report, name):
    _, committed, written = report
    assert (written / name).read_text("utf-8") == (committed / name).read_text("utf-8")


def test_the_page_is_the_committed_one_except_for_its_images(report):
    _, committed, written = report

    def read_page(folder):
        return re.sub(r"data:image/png;base64,[^'\"]+", "", (folder / "index.html").read_text("utf-8"))

    assert read_page(written) == read_page(committed)


def test_every_number_for_machines_is_the_committed_one(report):
    _, committed, written = report
    results, expected = (json.loads((folder / "results.json").read_text("utf-8")) for folder in (written, committed))
    assert results.pop("machine") and expected.pop("machine")
    assert results == expected
