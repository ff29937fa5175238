"""`imprompt evaluate` from the command line: a table and a page, or one sentence and exit code 2."""

import json

import pytest

from imprompt.cli import main
from imprompt.config import TrainConfig
from imprompt.training import train_adapter


@pytest.fixture(scope="module")
def other_method(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simple")
    list(
        train_adapter(
            TrainConfig.from_options(
                method="simple", max_train_steps=1, train_batch_size=2, num_validation_images=0, sanity_check=False, output_dir=str(folder)
            )
        )
    )
    return folder / "adapter.safetensors"


def test_a_table_and_the_page_are_printed(tmp_path, capsys, other_method):
    arguments = [
        "evaluate",
        "--num-prompts",
        "4",
        "--num-images-per-prompt",
        "1",
        "--steps",
        "2",
        "--bootstrap-samples",
        "10",
        "--output-dir",
        str(tmp_path),
    ]
    assert main([*arguments, "--adapter", "mini", "--adapter", f"mine={other_method}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["trainable", "params"] and "CLIP-I (mini)" in lines[0] and "FD" not in lines[0]
    assert "need at least 50 images" in lines[6] and "files" in lines[7] and lines[-1] == str(tmp_path / "index.html")
    built_in = ["target (upper bound)", "another real image", "text only"]
    assert [line.split("  ")[0].strip() for line in lines[1:6]] == [*built_in, "mini", "mine"]
    assert main([*arguments, "--adapter", "mini", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == [*built_in, "mini"] and rows[0]["metrics"]["CLIP-I (mini)"]["value"] > 0.99


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-images-per-prompt", "0"], "num_images_per_prompt: expected at least 1, received 0"),
        (["--prompt-mode", "all"], "prompt_mode: expected one of none, caption; received 'all'"),
        (["--num-prompts", "1"], "expected at least 2 prompts"),
        (["--adapter", "nowhere.safetensors"], "no adapter at nowhere.safetensors"),
        (["--baseline", "kandinsky"], "kandinsky is a method; train it first"),
        (["--baseline", "./nothing"], "no adapter at ./nothing"),
        (["--data", "nothing"], "no data at nothing"),
        (["--clip-model", "./nothing"], "no CLIP model at ./nothing"),
        (["--model", "./nothing"], "no base model at ./nothing"),
        (["--scheduler", "fast"], "scheduler: expected one of"),
        (["--steps", "5000"], "num_inference_steps: expected at most"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path, capsys, arguments, expected):
    code = main(
        [
            "evaluate",
            "--output-dir",
            str(tmp_path / "out"),
            *(["--num-prompts", "4"] if "--num-prompts" not in arguments else []),
            *arguments,
        ]
    )
    error = capsys.readouterr().err
    assert code == 2 and expected in error and "Traceback" not in error and error.count("\n") <= 1


def test_generate_names_the_method_of_a_checkpoint(other_method, capsys):
    assert main(["generate", "--image", "examples/cat.png", "--adapter", str(other_method)]) == 2
    assert "was trained by method 'simple'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sdxl"], "paper: expected one of ip-adapter, personalization; received 'sdxl'"),
        (["--budget", "huge"], "budget: expected one of full, smoke"),
    ],
)
def test_reproduce_refuses_unknown_values(arguments, expected, capsys):
    assert main(["reproduce", *arguments]) == 2
    assert expected in capsys.readouterr().err
