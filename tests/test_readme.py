"""The README's examples run, and CONTRIBUTING lists every file."""

import ast
import os
import re
import shlex
from pathlib import Path

import pytest

from imprompt.cli import build_app, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PACKAGE = ROOT / "src" / "imprompt"


@pytest.fixture
def working_copy(tmp_path, monkeypatch):
    """A working directory with the example images, where files may be written."""
    os.symlink(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run_in_order(working_copy):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), names)
    assert names["images"][0].size == (64, 64)
    assert names["image"].size == (64, 64)
    assert names["step"].index == 2
    assert (working_copy / "cat-in-the-snow.png").is_file()


@pytest.mark.filterwarnings("ignore")
def test_first_command_runs(working_copy, capsys):
    command = next(line for line in README.splitlines() if line.startswith("$ imprompt generate --image examples"))
    assert main(shlex.split(command.removeprefix("$ imprompt "), comments=True)) == 0
    assert capsys.readouterr().out.strip().endswith("sheet.png")


def test_every_command_parses():
    """Every command of the README names an existing command and existing options."""
    commands = re.findall(r"^\$ imprompt ((?:.*\\\n)*.*)$", README, re.M)
    assert len(commands) >= 25
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        build_app().parse_args(words, exit_on_error=False, print_error=False)


def table_of_files() -> str:
    """One row for each module: its path and the first line of its docstring."""
    rows = ["| file | what it is |", "|---|---|"]
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.relative_to(PACKAGE).parts) > 1, path)):
        summary = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").splitlines()
        assert summary, f"{path} has no docstring"
        rows.append(f"| `{path.relative_to(PACKAGE).as_posix()}` | {summary[0]} |")
    return "\n".join(rows)


def test_contributing_lists_every_file():
    """Regenerate the table with: python tests/test_readme.py"""
    assert table_of_files() in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


if __name__ == "__main__":
    contributing = ROOT / "CONTRIBUTING.md"
    contributing.write_text(
        re.sub(
            r"(with the first line of every module -->\n\n)(\|.*\n)*",
            lambda m: m[1] + table_of_files() + "\n",
            contributing.read_text("utf-8"),
        )
    )
