"""An evaluation: resumed and shared among processes it gives the same table; what goes wrong is said before any work."""

import csv
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import imprompt
from imprompt.config import Evaluate, Train
from imprompt.data.records import Record
from imprompt.errors import ImageError, UserError
from imprompt.evaluation import metrics, report
from imprompt.evaluation import runner as suite
from imprompt.evaluation.features import Eyes
from imprompt.evaluation.samples import DataCases, open_cases
from imprompt.evaluation.scoring import Seen
from imprompt.evaluation.store import Shelf
from imprompt.evaluation.systems import load_contender, named
from imprompt.mini.judge import Judge
from imprompt.training import train

SMALL = Evaluate(limit=6, samples=2, steps=2, batch=4, resamples=20, curve=2, adapter=("mini",), against=("reference-only",))


def evaluated(folder, **choices):
    choice = replace(SMALL, out=str(folder), **choices)
    list(suite.draw(choice))
    found = list(report.scores(choice))
    report.write(choice.settled(), found, {})
    return {score.name: score for score in found}, (folder / "table.csv").read_text()


def without_seconds(table):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(table.splitlines())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *evaluated(folder)


def test_every_row_is_there_and_the_copy_is_a_copy(whole):
    _, found, _ = whole
    assert list(found)[:5] == ["copy", "real", "text", "mini", "reference-only"]
    assert found["copy"].figures["CLIP-I"].value == pytest.approx(1) and found["copy"].figures["structure"].value == pytest.approx(0)
    assert found["mini"].figures["CLIP-I"].value > found["reference-only"].figures["CLIP-I"].value
    assert found["mini"].pictures == 12 and found["real"].pictures == 6
    assert found["mini"].trainable == sum(p.numel() for p in imprompt.load("mini").adapter.parameters())
    assert set(found["mini"].figures) == {
        "CLIP-I", "CLIP-T", "likeness", "structure", "diversity", "FID", "KID × 1000", "CMMD", "IS",
    }  # fmt: skip


def test_figures_are_those_of_the_pictures_that_were_kept(whole):
    """Once more, from the files: CLIP-I, CLIP-T, diversity and FID by other means, CMMD and IS by what test_metrics.py proves."""
    folder, found, _ = whole
    judge, cases = Judge(), open_cases(Evaluate(limit=6))

    def pictures(name):
        return [Image.open(p).convert("RGB") for p in sorted((folder / "rows" / name / "pictures").iterdir())]

    for name in ("mini", "text"):
        seen = judge.image_embeddings(pictures(name)).double()
        said = judge.text_embeddings(cases.texts).double().repeat_interleave(2, 0)
        assert found[name].figures["CLIP-T"].value == pytest.approx(float((seen * said).sum(1).mean()), abs=1e-5)
        apart = 1 - (seen[0::2] * seen[1::2]).sum(1)
        assert found[name].figures["diversity"].value == pytest.approx(float(apart.mean()), abs=1e-5)
    assert found["text"].figures["CLIP-T"].value > found["reference-only"].figures["CLIP-T"].value
    look = Eyes("mini", "mini")
    wanted, seen = (look.see(pictures(name)) for name in ("copy", "mini"))
    figures = {name: interval.value for name, interval in found["mini"].figures.items()}
    alike = (seen["clip"].double() * wanted["clip"].double().repeat_interleave(2, 0)).sum(1)
    assert figures["CLIP-I"] == pytest.approx(float(alike.mean()), rel=1e-4)
    assert figures["CMMD"] == pytest.approx(metrics.cmmd(wanted["clip"], seen["clip"]), rel=1e-4, abs=1e-6)
    assert figures["IS"] == pytest.approx(metrics.inception_score(seen["classes"].log(), splits=1), rel=1e-4)
    real, drawn = (those["features"].double().numpy() for those in (wanted, seen))
    left, right = (x - x.mean(0) for x in (real, drawn))  # Tr (Σ Σ')^½ is the nuclear norm of left · rightᵀ / √(n − 1) √(m − 1)
    roots = np.linalg.norm(left @ right.T, "nuc") / ((len(real) - 1) * (len(drawn) - 1)) ** 0.5
    fid = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(np.cov(real.T) + np.cov(drawn.T)) - 2 * roots
    assert figures["FID"] == pytest.approx(fid, rel=1e-4)


def test_the_curve_goes_from_the_base_to_the_picture(whole):
    folder, found, _ = whole
    points = [score for score in found.values() if score.curve]
    assert [p.scale for p in points] == list(suite.SCALES)
    assert points[-1].figures["CLIP-I"].value > points[0].figures["CLIP-I"].value
    studio = suite.Studio(replace(SMALL, out=str(folder)).settled())
    base = suite.Row("base", "text", "other", 1, 2)
    studio.work(suite.Task(base, 0))
    off = Seen(folder, points[0].name, 1).column("clip")
    assert torch.equal(off, Seen(folder, "base", 1).column("clip"))


def test_interrupted_it_gives_the_same_table(whole, tmp_path):
    choice = replace(SMALL, out=str(tmp_path))
    steps = suite.draw(choice)
    for _ in range(5):
        next(steps)
    steps.close()
    half = next(iter(Shelf(tmp_path, "text").folder.glob("chunk-*")))
    before = half.stat().st_mtime_ns
    _, table = evaluated(tmp_path)
    assert half.stat().st_mtime_ns == before, "what was there is not drawn again"
    assert without_seconds(table) == without_seconds(whole[2])


def test_two_processes_give_the_same_table(whole, tmp_path):
    _, table = evaluated(tmp_path, processes=2)
    assert without_seconds(table) == without_seconds(whole[2])


def test_every_picture_is_kept_with_its_seed(whole):
    folder, *_ = whole
    names = sorted(p.name for p in (folder / "rows" / "mini" / "pictures").iterdir())
    assert names[:3] == ["00000-0-0.png", "00000-1-1.png", "00001-0-2.png"] and len(names) == 12
    contender = load_contender("mini", SMALL.settled())
    case = open_cases(Evaluate(limit=6))[1]
    how = suite.How(2, 3.0, (64, 64))
    alone = contender.draw([case], [""], [2], how)[0]
    kept = Image.open(folder / "rows" / "mini" / "pictures" / names[2])
    difference = torch.tensor(list(alone.tobytes())).float() - torch.tensor(list(kept.convert("RGB").tobytes())).float()
    assert difference.abs().mean() < 2  # bfloat16, another batch


def test_the_report_opens_without_a_network(whole):
    folder, *_ = whole
    page = (folder / "index.html").read_text("utf-8")
    assert "data:image/png" in page and "://" not in page and "reference-only" in page
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"][3]["name"] == "mini" and table["rows"][3]["figures"]["CLIP-I"]["low"] < 1
    assert (folder / "table.md").read_text().startswith("| |")
    assert "interval over prompts. CLIP-I: ↑ cosine with the reference; " in page


def test_a_mistake_is_said_before_any_work_and_does_not_stick(tmp_path):
    for wrong in ({"judge": "./typo"}, {"steps": 5000}, {"adapter": ("mini", "./nowhere.safetensors")}, {"against": ("./no-pipeline",)}):
        with pytest.raises(UserError):
            next(suite.draw(replace(SMALL, out=str(tmp_path), **wrong)))
        assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.json"))
    assert next(suite.draw(replace(SMALL, out=str(tmp_path)))).done == 1


def test_other_data_of_the_same_name_are_refused(tmp_path):
    for parent, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / parent / "pictures").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64 + i, 64), colour).save(tmp_path / parent / "pictures" / f"{i}.png")
    small = replace(SMALL, out=str(tmp_path / "out"), curve=0, against=())
    next(suite.draw(replace(small, data=str(tmp_path / "a" / "pictures"))))
    with pytest.raises(UserError, match=r"was begun with (data|captions and pictures) = "):
        next(suite.draw(replace(small, data=str(tmp_path / "b" / "pictures"))))


def test_a_worker_that_dies_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_begin", os._exit)  # takes the choice for an exit code, and is gone
    with pytest.raises(UserError, match="a process was ended from outside"):
        list(suite.draw(replace(SMALL, out=str(tmp_path), processes=2)))


def test_a_real_picture_is_never_the_reference(tmp_path):
    records = [Record(str(i), Image.new("RGB", (8, 8), (i, 0, 0)), subject="x") for i in range(3)]
    turned = [Record("a", records[0].target, references=(records[1].target,), subject="x")]
    turned.append(Record("b", records[1].target, references=(records[0].target,), subject="x"))
    for cases in (DataCases(records), DataCases(turned)):
        assert cases.has_others
        assert all(cases.other(i).tobytes() != cases[i].target.tobytes() for i in range(len(cases)))
    with pytest.raises(ImageError, match="no other picture"):
        DataCases(records[:1]).other(0)


def test_other_settings_in_the_same_folder_are_refused(whole):
    with pytest.raises(UserError, match=r"steps = 2, and now it is 3"):
        next(suite.draw(replace(SMALL, out=str(whole[0]), steps=3)))


def test_a_method_that_was_trained_is_a_row(tmp_path):
    run = Train(method="uni-controlnet", steps=1, batch=2, validation=0, preflight=False, out=str(tmp_path / "run"))
    list(train(run))
    _, table = evaluated(tmp_path / "out", limit=2, curve=0, adapter=(str(tmp_path / "run" / "adapter.safetensors"),), against=())
    assert [row["row"] for row in csv.DictReader(table.splitlines())][-1] == "run"


def test_own_data_with_subjects_and_a_damaged_picture(tmp_path):
    for i in range(4):
        folder = tmp_path / "data" / f"subject {i // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 64), (60 * i, 100, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    broken = tmp_path / "data" / "subject 1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    found, _ = evaluated(tmp_path / "out", data=str(tmp_path / "data"), limit=0, curve=0, against=())
    assert list(found) == ["copy", "real", "text", "mini"]
    assert (found["mini"].prompts, found["mini"].lost, found["mini"].pictures) == (3, 1, 6)


def test_names():
    assert named("runs/mine/adapter.safetensors") == ("mine", "runs/mine/adapter.safetensors")
    assert named("x=a/b.safetensors") == ("x", "a/b.safetensors")
    assert named("h94/thing") == ("thing", "h94/thing")
    assert named("text") == ("text", "text")


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"adapter": ("seecoder",)}, "seecoder is a method; train it first"),
        ({"adapter": ("mini", "mini=mini-plus")}, "two rows are called 'mini'"),
        ({"adapter": ("nowhere.safetensors",)}, "no adapter at nowhere.safetensors"),
        ({"against": ("no/such/thing",)}, "no/such/thing"),
        ({"data": "nowhere"}, "no data at nowhere"),
        ({"size": 65}, "multiples of"),
        ({"features": "nowhere/at-all"}, "no image model at nowhere/at-all"),
        ({"features": "inception"}, "Inception needs torch-fidelity"),
        ({"lpips": True}, "LPIPS needs a torchvision"),
        ({"judge": "nowhere/at-all"}, "no CLIP model at nowhere/at-all"),
    ],
)
def test_what_goes_wrong_is_said(tmp_path, choices, said):
    with pytest.raises(UserError, match=said):
        list(suite.draw(replace(SMALL, out=str(tmp_path), limit=2, **choices)))
