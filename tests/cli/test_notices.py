"""What happens to an input without being an error is one line on standard error, or a warning in Python."""

import warnings

import pytest

from imprompt.cli import main
from imprompt.errors import Notice, notify


def test_the_command_line_prints_each_notice_once_and_no_warning_of_a_library(monkeypatch, capsys):
    def run(*arguments, **options):
        for _ in range(2):
            notify("the mask is\nblack everywhere")
            warnings.warn("meant for developers", stacklevel=1)

    monkeypatch.setattr("imprompt.cli.files.run_inspect", run)
    for _ in range(2):  # nothing is remembered from one command to the next
        assert main(["inspect", "mini"]) == 0
        assert capsys.readouterr() == ("", "imprompt: note: the mask is black everywhere\n")


def test_python_receives_a_warning_that_names_the_line_of_the_caller():
    def report():
        notify("only the first frame is used")

    with pytest.warns(Notice, match="only the first frame") as caught:
        report()
    assert caught[0].filename == __file__
