"""The README's examples are what they say: each Python block runs in turn, each command of `generate` and `mini` too."""

import os
import re
import shlex
from pathlib import Path

import pytest

from imprompt.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
    """Somewhere with the example pictures, where files may be written."""
    os.symlink(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run_in_order(in_a_copy):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), names)
    assert names["images"][0].size == (64, 64)
    assert names["image"].size == (64, 64)
    assert (in_a_copy / "cat-in-the-snow.png").is_file()


@pytest.mark.filterwarnings("ignore")
def test_first_command_runs(in_a_copy, capsys):
    command = next(line for line in README.splitlines() if line.startswith("$ imprompt generate --image examples"))
    assert main(shlex.split(command.removeprefix("$ imprompt "), comments=True)) == 0
    assert capsys.readouterr().out.strip().endswith("sheet.png")


def test_every_command_named_exists():
    verbs = re.findall(r"^\$ imprompt ((?:mini )?\w+)", README, re.M)
    assert len(verbs) >= 6
    for verb in verbs:
        with pytest.raises(SystemExit) as stop:
            main([*verb.split(), "--help"])
        assert stop.value.code == 0


def test_every_file_of_the_package_has_its_line():
    table = README[README.index("| file | what it is |") :]
    for path in (ROOT / "src" / "imprompt").rglob("*.py"):
        name = path.name if path.name != "__init__.py" else path.parent.name + "/"
        if name in ("imprompt/", "core/", "hosts/", "mini/", "data/", "training/", "__main__.py") or path.parent.name == "cli":
            continue
        if path.parent.name == "methods":
            name = "methods/"
        assert name in table, f"{path.name} has no line in the README"
