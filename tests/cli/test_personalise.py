"""Several photographs in, a contact sheet out; what was learned is kept, and used again by every door."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imprompt import cli
from imprompt.config import COMBINE
from imprompt.data.readers import Mini

QUICK = ["--steps", "2", "--count", "1", "--json"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mein Hündchen")
    records = Mini(5, held_out=True, photos=5)
    for i in range(5):
        records[i].target.resize((80, 96)).save(folder / f"Foto {i}.jpg")
    (folder / "kaputt.png").write_bytes(b"no")
    return folder


def told(capsys, *words):
    code = cli.main(list(map(str, words)))
    out, err = capsys.readouterr()
    return code, (json.loads(out) if code == 0 else err)


@pytest.mark.parametrize("method", [*COMBINE, "attention"])
def test_photographs_become_a_sheet(photographs, tmp_path, capsys, method):
    code, found = told(capsys, "personalise", photographs, "--method", method, "--out", tmp_path, *QUICK)
    assert code == 0 and Image.open(found["sheet"]).width > 500
    settings = json.loads(Image.open(found["pictures"][0]).text["imprompt"])
    assert settings["method"] == method and settings["seed"] == 0 and len(found["pictures"]) == 1


def test_a_prompt_names_the_subject_by_a_star(photographs, tmp_path, capsys):
    words = ["--prompt", "a * on a beach", "--prompt", "a * at night", "--noun", "cat", "--method", "average"]
    code, found = told(capsys, "personalise", photographs, "--out", tmp_path, *words, *QUICK)
    assert code == 0
    assert [json.loads(Image.open(p).text["imprompt"])["prompt"] for p in found["pictures"]] == ["a cat on a beach", "a cat at night"]


@pytest.mark.parametrize("method", ["dreambooth", "dreambooth-lora", "inversion"])
def test_what_was_learned_is_kept_and_used_again(photographs, tmp_path, capsys, method):
    words = ["personalise", photographs, "--method", method, "--noun", "cat", "--learning", "1", "--prior", "1", "--out", tmp_path, *QUICK]
    code, first = told(capsys, *words)
    assert code == 0
    file = Path(first["learned"])
    before = file.stat().st_mtime_ns
    picture = Image.open(first["pictures"][0]).tobytes()
    code, again = told(capsys, *words)
    assert code == 0 and file.stat().st_mtime_ns == before and again["learning"] < first["learning"]
    assert Image.open(again["pictures"][0]).tobytes() == picture
    code, found = told(capsys, "generate", "--adapter", file, "--prompt", "a photo of a cat", "--out", tmp_path / "g", *QUICK)
    assert code == 0 and Image.open(found["pictures"][0]).tobytes() == picture
    code, said = told(capsys, "generate", "--adapter", file, "--prompt", "a dog", "--out", tmp_path / "g", *QUICK)
    assert code == 2 and "expected the word 'cat', or *" in said
    code, said = told(capsys, "generate", "--adapter", file, "--image", photographs / "Foto 1.jpg", "--out", tmp_path / "g", *QUICK)
    assert code == 2 and "has learned its subject; leave --image out" in said
    code, _ = told(capsys, *words, "--learning", "2")
    assert code == 0 and file.stat().st_mtime_ns != before  # other settings: learned anew


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "folder: expected a folder of photographs"),
        (["nowhere"], "no data at nowhere"),
        (["{photos}", "--method", "magic"], "method: expected one of concat, average"),
        (["{photos}", "--method", "dreambooth"], "noun: dreambooth has to know what the subject is"),
        (["{photos}", "--method", "self-attention"], "has weights that are trained: name an adapter"),
        (["{photos}", "--method", "attention", "--base", "elsewhere"], "has weights that are trained: name an adapter"),
        (["{photos}", "--count", "0"], "count: expected at least 1"),
        (["{broken}"], "none of the 1 pictures in"),
        (["{photos}", "--learning", "-1"], "learning: expected at least 0"),
        (["{photos}", "--method", "self-attention", "--adapter", "mini"], "brings photographs together by concat"),
        (["{photos}", "--method", "average", "--learning", "9"], "learning: does nothing with average"),
        (["{photos}", "--method", "inversion", "--noun", "cat", "--adapter", "mini"], "adapter: does nothing with inversion"),
        (["{photos}", "--method", "inversion", "--noun", "cat", "--prompt", "on a beach"], "expected the word 'cat', or *"),
        (["{photos}", "--method", "average", "--prompt", "a * at night"], "noun: * stands for the subject"),
        (["{photos}", "--method", "average", "--out", "{photos}"], "out: expected another folder"),
        (["{photos}", "--method", "inversion", "--noun", "cat", "--scale", "0.5"], "scale: inversion learns words"),
        (["{photos}", "--method", "dreambooth", "--noun", "cat", "--fit", "pad"], "fit: does nothing with dreambooth"),
        (["{photos}", "--method", "dreambooth", "--noun", "cat", "--size", "66"], "size: the model draws multiples of"),
    ],
)
def test_mistakes_are_said(photographs, tmp_path, capsys, words, said):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no")
    filled = [w.format(photos=photographs, broken=tmp_path / "broken") for w in words]
    code, err = told(capsys, "personalise", "--out", tmp_path / "out", *filled)
    assert code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.rglob("adapter*"))  # nothing was learned before it was said


def test_what_was_drawn_is_not_taken_for_photographs(photographs, capsys):
    words = ["personalise", photographs, "--method", "average", *QUICK]
    widths = {Image.open(told(capsys, *words, "--out", photographs / name)[1]["sheet"]).width for name in ("drawn", "drawn", "anew")}
    assert len(widths) == 1


def test_photographs_of_several_are_told(photographs, tmp_path, capsys):
    for name in ("Ana", "Zoë"):
        (tmp_path / "people" / name).mkdir(parents=True)
        Image.open(photographs / "Foto 1.jpg").save(tmp_path / "people" / name / "a.png")
    words = ["personalise", tmp_path / "people", "--method", "average", "--out", tmp_path / "out", "--steps", "2", "--count", "1"]
    assert cli.main(list(map(str, words))) == 0
    assert "photographs of 2 subjects are taken for one (Ana, Zoë)" in "".join(capsys.readouterr())


def test_an_interrupted_learning_of_another_subject_spoils_nothing(photographs, tmp_path, monkeypatch, capsys):
    words = ["personalise", photographs, "--method", "inversion", "--noun", "cat", "--learning", "2", "--out", tmp_path, *QUICK]
    code, first = told(capsys, *words)
    assert code == 0
    picture = Image.open(first["pictures"][0]).tobytes()
    from imprompt import training

    real = training.train

    def dies(choice):
        yield next(real(choice))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", dies)
    assert told(capsys, *words, "--noun", "fish")[0] == 130
    monkeypatch.undo()
    code, again = told(capsys, *words)
    assert code == 0 and Image.open(again["pictures"][0]).tobytes() == picture
    assert json.loads((tmp_path / "inversion" / "learned.json").read_text())["noun"] == "cat"
