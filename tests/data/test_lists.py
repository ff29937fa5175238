"""Lists as other tools write them: each row is read, or is reported with its number."""

import json

import pytest
from PIL import Image

from imprompt.data.readers import open_data
from imprompt.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png", "[x] a.png", "a|b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def read_rows(path):
    """The caption of each row, or the sentence that reports it."""
    records, rows = open_data(path), []
    for i in range(len(records)):
        try:
            rows.append(records[i].caption)
        except UserError as error:
            rows.append(str(error))
    return rows


@pytest.mark.parametrize(
    "content",
    [
        b"file_name,text\ra.png,one\rb.png,two\r", b"file_name,text\r\na.png,one\r\nb.png,two", b"file_name;Text\na.png;one\nb.png;two",
        b'file_name, text\na.png, "one"\nb.png, two\n', b"text|FILE NAME\none|a.png\ntwo|b.png", b"file_name,text,\na.png,one,\nb.png,two",
        b"\xef\xbb\xbffile_name,text\na.png,one\n\nb.png,two\n", "file_name,text\na.png,one\nb.png,two\n".encode("utf-16"),
        b"file_name,caption,text\na.png,one,\nb.png,,two\n", b"text,file_name,text\none,a.png,\n,b.png,two\n",
    ],
)  # fmt: skip
def test_forms_of_csv(folder, content):
    (folder / "list.csv").write_bytes(content)
    assert read_rows(folder / "list.csv") == ["one", "two"]


@pytest.mark.parametrize(
    ("bad_row", "message"),
    [
        (b'a.png,"one\n', "quotes do not match"),
        (b'a.png,"one" two"\n', "quotes do not match"),
        (b"a.png,one, two, three\n", "has 4 cells, and the table 2 columns"),
        (b"a.png,caf\xe9\n", "not text in UTF-8"),
        (b",one\n", "target is empty"),
    ],
)
def test_a_damaged_row_is_reported_and_the_others_are_read(folder, bad_row, message):
    (folder / "list.csv").write_bytes(b"file_name,text\nb.png,two\n" + bad_row + b'b.png,"two"\nc.png,three\n')
    first, bad, *others = read_rows(folder / "list.csv")
    assert [first, *others] == ["two", "two", "three"] and message in bad
    assert "list.csv, record 2" in bad or "list.csv:2" in bad or "UTF-8" in bad


def test_a_quote_that_is_closed_rows_later_swallows_none(folder):
    (folder / "list.csv").write_text('file_name,text\na.png,"one\nb.png,two\nc.png,three"\nb.png,"in\nlines"\n')
    first, *others = read_rows(folder / "list.csv")
    assert "record 1: a double quote is opened and not closed" in first and others == ["two", 'three"', "in\nlines"]


def test_long_cells_are_read(folder):
    (folder / "list.csv").write_text(f'file_name,text\na.png,"{"x " * 100_000}"\n')
    assert len(read_rows(folder / "list.csv")[0]) == 199_999


def test_lists_in_json(folder):
    (folder / "data.json").write_text('[{"image_file": "a.png", "text": "one"}, 7]')
    (folder / "lines.json").write_text('{"image": "a.png", "text": "one"}\n{"image": "b.png", "text": "two"}\n')
    (folder / "captions.json").write_text('{"a.png": "one", "b": {"caption": "two"}}')
    assert read_rows(folder / "lines.json") == read_rows(folder / "captions.json") == ["one", "two"]
    assert open_data(folder / "captions.json")[1].target == folder / "b.png"  # named without its suffix
    first, second = read_rows(folder / "data.json")
    assert first == "one" and "data.json, record 2: expected an object" in second


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"references": 1.5}, "expected a list of paths, received float"), ({"references": [3]}, "expected a path, received int"),
        ({"references": "[1, "}, None), ({"mask": 7}, "mask is empty"), ({"target": "https://x.org/a.png"}, "received a URL"),
        ({"text": "\ud800"}, "not text in UTF-8"),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_reported(folder, row, problem):
    (folder / "list.jsonl").write_text(json.dumps({"target": "a.png"} | row) + "\n" + "[" * 3000 + "\n")
    first, second = read_rows(folder / "list.jsonl")
    assert (problem in first if problem else first == "") and "record 2 is not JSON" in second


@pytest.mark.parametrize(
    ("references", "names"),
    [
        ("[x] a.png", ["[x] a.png"]), ("a|b.png", ["a|b.png"]), ("a.png|b.png", ["a.png", "b.png"]), ('["a.png", null]', ["a.png"]),
        (float("nan"), []), ("a.png|", ["a.png"]), ([], []),
    ],
)  # fmt: skip
def test_forms_of_references(folder, references, names):
    (folder / "list.jsonl").write_text(json.dumps({"file_name": "a.png", "references": references}))
    assert [path.name for path in open_data(folder / "list.jsonl")[0].references] == names


def test_of_several_image_columns_the_one_that_exists_is_read(folder):
    (folder / "list.jsonl").write_text(json.dumps({"path": "a.png", "image": "/data/2023/a.png", "file_name": "sub\\a.png"}))
    assert open_data(folder / "list.jsonl")[0].target == folder / "a.png"


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/*.tar", "\0", "/", "pipe:touch PWNED #.tar", "//", "http://127.0.0.1:9/a.tar"])
def test_impossible_sources_are_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        records = open_data(name)
        problems = []
        records.on_unreadable = lambda key, reason: problems.append(reason)
        assert not list(records.read_shard(name)) and "127.0.0.1 does not give the shard" in problems[0]
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    assert not (tmp_path / "PWNED").exists()
