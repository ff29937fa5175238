"""Evaluation by subject: which photographs are references and which are to be drawn; who is recognised; real folders with odd cases."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from imprompt.config import Evaluate
from imprompt.data.readers import Mini, open_data
from imprompt.data.subjects import Identities
from imprompt.errors import ImageError, UserError
from imprompt.evaluation import report
from imprompt.evaluation import runner as suite
from imprompt.evaluation.gallery import Gallery, kept_gallery, looked_at
from imprompt.evaluation.samples import SubjectCases, open_cases
from imprompt.evaluation.system import How
from imprompt.evaluation.systems import load_contender, named
from imprompt.mini import world

SMALL = Evaluate(
    subjects=7, references=5, targets=2, limit=6, samples=2, steps=2, batch=8, resamples=20, text="caption", learning=1, prior=1,
)  # fmt: skip


@pytest.fixture
def people(tmp_path):
    """As LFW: Name/Name_0001.jpg; one photograph only, damaged files, spaces and letters beyond ASCII; all damaged but one."""
    photos = Mini(12, photos=4)
    for n, (name, count) in enumerate((("Ana_Guevara", 4), ("Zoë Ünal", 4), ("Only One", 1), ("李娜", 3))):
        folder = tmp_path / "lfw" / name
        folder.mkdir(parents=True)
        for i in range(count):
            photos[(4 * n + i) % 12].target.resize((90, 80)).save(folder / f"{name}_{i + 1:04}.jpg", quality=95)
    (tmp_path / "lfw" / "李娜" / "李娜_0002.jpg").write_bytes(b"no picture")
    (tmp_path / "lfw" / "Ana_Guevara" / "notes.txt").write_text("no picture either")
    return tmp_path / "lfw"


def test_targets_are_never_references(people):
    cases = SubjectCases(Identities(open_data(str(people)), 3), references=3, targets=1, noun="person")
    assert len(cases) == 3 and list(cases.subjects) == ["Ana_Guevara", "Zoë Ünal", "李娜"]
    for i in range(len(cases)):
        try:
            case = cases[i]
        except ImageError:
            continue
        assert case.text == "a photo of a person" and case.noun == "person" and len(case.references) == 3
        assert case.target.size[0] == case.target.size[1]
        assert all(r.tobytes() != case.target.tobytes() for r in case.references)
    assert [cases.group(i) for i in range(3)] == [0, 1, 2]


def test_too_few_photographs_are_repeated_and_damaged_ones_passed_over(people):
    cases = SubjectCases(Identities(open_data(str(people)), 3, {"李娜"}), references=4, targets=1, caption="someone")
    gallery = cases.gallery(0, 9)
    assert 1 <= len(gallery) <= 2
    if len(gallery) == 1:  # the damaged one is among the references
        assert len({r.tobytes() for r in cases[0].references}) == 1
    assert cases.texts == ["someone"]
    for path in (people / "李娜").iterdir():
        path.write_bytes(b"no")
    with pytest.raises(ImageError, match="no photograph of 李娜 can be opened"):
        cases.gallery(0, 1)


def test_minis_subjects_are_new_and_told_by_kind_and_place_alone():
    cases = open_cases(SMALL.settled())
    assert len(cases) == 6 and len(cases.subjects) == 3
    for i in range(6):
        case = cases[i]
        subject = world.subject(int(case.subject))
        assert world.combination_held_out(subject) and case.noun == subject.kind and subject.kind in case.text
        assert not set(case.text.split()) & {*world.COLOURS, *world.PATTERNS[1:]} and len(case.references) == 5
    assert cases[0].references[0].tobytes() == cases[1].references[0].tobytes() and cases[0].target.tobytes() != cases[1].target.tobytes()


def test_only_the_test_subjects_of_a_training(people, tmp_path):
    (tmp_path / "subjects.json").write_text(json.dumps({"test": ["Zoë Ünal", "Ana_Guevara"]}))
    choice = Evaluate(data=str(people), subjects=3, split=str(tmp_path / "subjects.json"), noun="person").settled()
    assert list(open_cases(choice).subjects) == ["Ana_Guevara", "Zoë Ünal"]
    (tmp_path / "subjects.json").write_text("[]")
    with pytest.raises(UserError, match=r"split: expected the subjects.json of a training"):
        open_cases(choice)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    choice = replace(SMALL, out=str(folder), adapter=("one=mini", "mini@average", "mini@max"), against=("dreambooth-lora", "inversion"))
    list(suite.draw(choice))
    found = list(report.scores(choice))
    report.write(choice.settled(), found, {})
    return folder, {score.name: score for score in found}, choice


def test_every_row_says_who_was_recognised(measured):
    folder, found, _ = measured
    assert list(found) == ["copy", "real", "reference", "text", "one", "mini@average", "mini@max", "dreambooth-lora", "inversion"]
    assert all({"identity", "recognised"} <= set(score.figures) for score in found.values())
    assert found["copy"].figures["recognised"].value == 1 and found["copy"].figures["identity"].value > 0.9
    assert found["text"].figures["identity"].value < found["mini@average"].figures["identity"].value
    assert found["one"].pictures == 12
    table = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert {"identity", "recognised low", "no face"} & set(table[0]) == {"identity", "recognised low"}


def test_the_reference_row_gives_a_reference_back(measured):
    folder, found, choice = measured
    cases, kept = open_cases(choice.settled()), sorted((folder / "rows" / "reference" / "pictures").iterdir())
    for i, path in enumerate(kept):
        given = cases[i].references[i % choice.targets]
        assert Image.open(path).convert("RGB").tobytes() == given.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    figures = found["reference"].figures
    assert len(kept) == 6 and figures["identity"].value > 0.9 and figures["CLIP-I"].value < found["copy"].figures["CLIP-I"].value


def test_with_one_target_the_real_row_is_no_reference():
    cases = open_cases(replace(SMALL, subjects=8, references=5, targets=1).settled())
    assert cases.other(0).tobytes() not in {picture.tobytes() for picture in (*cases[0].references, cases[0].target)}


def test_learning_is_not_drawing(measured):
    folder, found, _ = measured
    learning = suite.Studio(measured[2].settled())
    for name, spent in (("dreambooth-lora", True), ("mini@max", False)):
        row = suite.Row(name, name, "caption", 2, 6)
        seen = report.Seen(folder, name, learning.chunks(row))
        assert bool(seen.column("learning").sum() > 0) == spent
    assert found["inversion"].trainable == 4 * 128
    kinds = {name.rsplit("-", 2)[0] for name in (p.name for p in (folder / "class").iterdir())}
    assert len(list((folder / "class").iterdir())) == SMALL.prior * len(kinds)  # drawn once for every kind, for all subjects of it


def test_a_second_run_learns_nothing_again(measured):
    folder, _, choice = measured
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("chunk-*")}
    list(suite.draw(choice))
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("chunk-*")}


def test_several_references_are_heard_and_one_is_where_a_row_says_so():
    choice = SMALL.settled()
    cases = open_cases(choice)
    case, how = cases[0], How(2, 3.0, (64, 64))

    def drawn(source, references):
        return load_contender(source, choice).draw([case._replace(references=references)], [case.text], [0], how)[0].tobytes()

    alone = case.references[:1]
    assert drawn("mini", case.references) != drawn("mini", alone) and drawn("mini@average", alone) == drawn("mini", alone)
    assert drawn("mini@average", case.references) != drawn("mini@max", case.references)
    orders = (drawn("mini@average", case.references), drawn("mini@average", case.references[::-1]))
    assert max(abs(a - b) for a, b in zip(*orders, strict=True)) <= 2


def test_a_gallery_is_looked_at_anew_where_the_subjects_are_others(tmp_path):
    path = tmp_path / "gallery.safetensors"
    studios = [suite.Studio(replace(SMALL, out=str(tmp_path), limit=limit).settled()) for limit in (4, 6)]
    few, more = (kept_gallery(path, studio.identity, studio.cases) for studio in studios)
    assert (len(few.centroids), len(more.centroids)) == (2, 3)
    before = path.stat().st_mtime_ns
    kept_gallery(path, studios[1].identity, studios[1].cases)
    assert path.stat().st_mtime_ns == before


def test_the_real_row_shows_what_is_in_no_gallery():
    cases = open_cases(SMALL.settled())
    gallery = [picture.tobytes() for picture in cases.gallery(0, 99)]
    others = [cases.other(i).tobytes() for i in (0, 1)]
    assert others == [cases[1].target.tobytes(), cases[0].target.tobytes()] and not set(others) & set(gallery)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"against": ("inversion",), "text": "none"}, "told by the text that its subject is meant"),
        ({"limit": 2}, "expected at least 2 subjects"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_learned(tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        next(suite.draw(replace(SMALL, out=str(tmp_path), **more)))


def test_names_of_rows():
    assert named("mini@average") == ("mini@average", "mini@average")
    assert named("a/b/adapter.safetensors@max") == ("b@max", "a/b/adapter.safetensors@max")
    assert named("x=mini@max") == ("x", "mini@max")


class Faces:
    """Finds nobody in dark pictures."""

    name = "faces"

    def embed(self, images):
        seen = torch.tensor([[float(sum(i.resize((1, 1)).getpixel((0, 0)))), 1.0] for i in images])
        there = seen[:, 0] > 30
        return torch.nn.functional.normalize(seen, dim=1) * there[:, None], there


def test_a_subject_in_whom_nobody_is_found(tmp_path):
    for name, light in (("bright", 200), ("dark", 0), ("other", 90)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32), (light + i, light, light)).save(tmp_path / name / f"{i}.png")
    cases = SubjectCases(Identities(open_data(str(tmp_path)), 3), 2, 1)
    found = looked_at(Faces(), cases)
    assert found.found.tolist() == [True, False, True] and not found.centroids[1].any()
    assert isinstance(found, Gallery) and torch.allclose(found.centroids[[0, 2]].norm(dim=1), torch.ones(2))

    class Nobody(Faces):
        def embed(self, images):
            return torch.zeros(len(images), 2), torch.zeros(len(images), dtype=torch.bool)

    with pytest.raises(UserError, match="nobody was found in any photograph"):
        looked_at(Nobody(), cases)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"subjects": 1}, "at least 2 photographs"),
        ({"subjects": 0}, "say how many photographs, --subjects 10"),
        ({"identity": "magic"}, "identity: expected one of"),
        ({"identity": "insightface"}, "insightface is not installed"),
        ({"against": ("dreambooth",), "subjects": 0, "references": 1, "targets": 1}, "learns a subject from several photographs"),
        ({"against": ("reference-only@max",)}, r"reference-only@max|no IP-Adapter"),
    ],
)
def test_mistakes_are_said(tmp_path, choices, said):
    with pytest.raises(UserError, match=said):
        list(suite.draw(replace(SMALL, out=str(tmp_path), **choices)))
    assert not list(tmp_path.rglob("*.png"))


def test_a_real_tree_goes_from_folder_to_report(people, tmp_path):
    from imprompt import cli

    words = ["evaluate", "--data", str(people), "--out", str(tmp_path / "out"), "--json"]
    words += [
        "--subjects",
        "3",
        "--references",
        "2",
        "--noun",
        "cat",
        "--identity",
        "mini",
        "--samples",
        "2",
        "--steps",
        "2",
        "--limit",
        "9",
        "--text",
        "caption",
    ]
    assert cli.main([*words, "--adapter", "mini@average"]) == 0
    rows = {row["row"]: row for row in csv.DictReader(Path(tmp_path / "out" / "table.csv").read_text().splitlines())}
    assert int(rows["mini@average"]["prompts"]) + int(rows["mini@average"]["lost"]) == 3 and rows["mini@average"]["identity"]
    assert "mini@average" in (tmp_path / "out" / "index.html").read_text("utf-8")
