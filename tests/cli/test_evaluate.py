"""`imprompt evaluate` through the front door: a table and a page, or one sentence and exit code 2."""

import json

import pytest

from imprompt.cli import main
from imprompt.config import Train
from imprompt.training import train


@pytest.fixture(scope="module")
def other_method(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simple")
    list(train(Train(method="simple", steps=1, batch=2, validation=0, preflight=False, out=str(folder))))
    return folder / "adapter.safetensors"


def test_it_prints_a_table_and_the_page(tmp_path, capsys, other_method):
    words = ["evaluate", "--limit", "4", "--samples", "1", "--steps", "2", "--resamples", "10", "--out", str(tmp_path)]
    assert main([*words, "--adapter", "mini", "--adapter", f"mine={other_method}"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("| | trainable | CLIP-I") and told[-1] == str(tmp_path / "index.html")
    assert [line.split(" | ")[0] for line in told[2:7]] == ["| copy", "| real", "| text", "| mini", "| mine"]
    assert main([*words, "--adapter", "mini", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["copy", "real", "text", "mini"] and rows[0]["figures"]["CLIP-I"]["value"] > 0.99


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "0"], "samples: expected at least 1, received 0"),
        (["--text", "all"], "text: expected one of none, caption; received 'all'"),
        (["--limit", "1"], "expected at least 2 prompts"),
        (["--adapter", "nowhere.safetensors"], "no adapter at nowhere.safetensors"),
        (["--against", "kandinsky"], "kandinsky is a method; train it first"),
        (["--against", "./nothing"], "no adapter at ./nothing"),
        (["--data", "nothing"], "no data at nothing"),
        (["--judge", "./nothing"], "no CLIP model at ./nothing"),
        (["--base", "./nothing"], "no base model at ./nothing"),
        (["--scheduler", "fast"], "scheduler: expected one of"),
        (["--steps", "5000"], "steps: expected at most"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, capsys, words, said):
    code = main(["evaluate", "--out", str(tmp_path / "out"), *(["--limit", "4"] if "--limit" not in words else []), *words])
    error = capsys.readouterr().err
    assert code == 2 and said in error and "Traceback" not in error and error.count("\n") <= 1


def test_generate_says_that_a_file_is_of_another_method(other_method, capsys):
    assert main(["generate", "--image", "examples/cat.png", "--adapter", str(other_method)]) == 2
    assert "was trained by method 'simple'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sdxl"], "paper: expected one of ip-adapter, personalisation; received 'sdxl'"),
        (["--budget", "huge"], "budget: expected one of full, smoke"),
    ],
)
def test_reproduce_says_what_it_does_not_know(words, said, capsys):
    assert main(["reproduce", *words]) == 2
    assert said in capsys.readouterr().err
