"""Any console: narrow encodings, closed and full output, no terminal, JSON alone on standard output."""

import codecs
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imprompt.cli import console, main
from imprompt.cli.console import (
    ProgressDisplay,
    format_bytes,
    format_duration,
    print_json,
    print_location,
    print_table,
    progress_bar,
    replace_unencodable,
)
from imprompt.cli.mini import _print_scores
from imprompt.mini.held_out import make_held_out_samples
from imprompt.recipes.benchmark import THRESHOLDS
from imprompt.studies.claims import Claim, withhold_verdicts

COMMAND = f"{sys.executable} -m imprompt"

# A command that does nothing but print, without the seconds in which torch is imported.
SCRIPT = """{python} -c "
import sys, time
from imprompt.cli import console, files, main
files.run_inspect = lambda *_, **__: (time.sleep(.2), {statement})
sys.exit(main(['inspect', 'mini']))" """
PRINT_JSON = SCRIPT.format(python=sys.executable, statement="console.print_json(a=1)")
PRINT_TABLE = SCRIPT.format(python=sys.executable, statement="console.print_table([[1, 2]])")


def run_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash; standard output as text with what is no UTF-8 escaped."""
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, errors="backslashreplace", timeout=300, env=settings)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437", "utf-8"])
def test_help_is_printed_on_any_console(encoding):
    done = run_shell(f"{COMMAND} generate --help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "") and "--scale" in done.stdout
    assert ("λ" if encoding == "utf-8" else "lambda") in done.stdout


def test_names_that_the_console_does_not_have_are_escaped():
    done = run_shell(f"{COMMAND} generate --config 猫.toml", PYTHONIOENCODING="cp1252")
    assert (done.returncode, done.stderr) == (2, "imprompt: no configuration at \\u732b.toml\n")


def test_characters_are_spelled_with_what_the_console_has():
    codecs.register_error("imprompt-test", replace_unencodable)
    assert "λ → 猫 ± …".encode("ascii", "imprompt-test") == b"lambda -> \\u732b +- ..."
    assert "λ ± …".encode("cp1252", "imprompt-test") == "lambda ± …".encode("cp1252")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_closes_the_output_is_no_error(unbuffered):
    for command in (PRINT_JSON, PRINT_TABLE, f"{COMMAND} generate --help"):
        done = run_shell(f"{command} | head -c0; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_one_sentence(unbuffered):
    done = run_shell(f"{PRINT_JSON} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


@pytest.fixture
def quick_lines(monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)


def test_progress_without_a_terminal_is_a_line_now_and_then(quick_lines, capsys):
    with progress_bar("loading") as progress:
        time.sleep(0.12)
        progress.rename("generating")
        progress.advance(1, 40, "loss 0.5")
        time.sleep(0.1)
        progress.advance(11, 40, "loss 0.25")
        time.sleep(0.1)
    time.sleep(0.1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == "imprompt: loading: 0 s" and 3 <= len(lines) <= 8
    assert lines[-1].startswith("imprompt: generating: 11 of 40, ") and "/s, " in lines[-1] and lines[-1].endswith("left · loss 0.25")


def test_rate_and_remaining_time_are_of_this_process(monkeypatch):
    """What an earlier run had done does not count."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with progress_bar("training", show=False) as progress:
        assert isinstance(progress, ProgressDisplay)
        now = 100.0
        progress.advance(501, 1000)
        now = 110.0
        progress.advance(520, 1000)
        assert progress.describe() == "training: 520 of 1000, 2/s, 4 min left"


def test_amounts_are_readable():
    assert [format_duration(seconds) for seconds in (4, 119, 130, 3 * 3600)] == ["4 s", "119 s", "2 min", "3.0 h"]
    assert [format_bytes(count) for count in (0, 5 * 2**20, 3 * 2**30)] == ["0.0 MiB", "5.0 MiB", "3.0 GiB"]


def test_a_table_is_not_cut_where_there_is_no_terminal(capsys):
    print_table([["[bold]\x1b[2J", "x" * 300], ["猫", 3]], ["name", "value"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "x" * 300 in lines[1] and r"[bold]\x1b[2J" in lines[1]


def test_json_is_pure_and_notices_are_elsewhere(tmp_path, capsys):
    reference = tmp_path / "wide.png"
    make_held_out_samples(1)[0].image.resize((128, 64)).save(reference)
    arguments = ["--steps", "1", "-n", "1", "--negative-prompt", "dog", "--guidance-scale", "1", "--output-dir", str(tmp_path / "out")]
    assert main(["generate", str(reference), *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert Path(result["images"][0]).is_file() and result["seconds"] > 0
    assert "negative_prompt" in err and "is cropped" in err


def test_json_fits_any_console(monkeypatch, capsys):
    print_json(name="ö 猫 \x1b[2J \x7f \udcff")
    printed = capsys.readouterr().out
    assert json.loads(printed)["name"] == "ö 猫 \x1b[2J \x7f \udcff" and printed.removesuffix("\n").isprintable()


def test_the_table_of_mini_evaluate_has_verdicts_with_enough_prompts_only(capsys):
    protocol = {"prompts": 1000, "scheduler": "ddim", "num_inference_steps": 50, "guidance_scale": 3.0}
    scores = {"image": dict.fromkeys(THRESHOLDS["image"], 1.0), "text": dict.fromkeys(THRESHOLDS["text"], 0.0)}
    _print_scores(scores, protocol)
    printed = capsys.readouterr().out
    assert "1000 prompts, ddim, 50 steps" in printed and "reached" in printed and "missed" in printed
    _print_scores(scores, protocol | {"prompts": 8})
    printed = capsys.readouterr().out
    assert "reached" not in printed and "no verdicts: expected at least 100 prompts, received 8" in printed


def test_a_smoke_run_has_no_verdicts():
    claims = [Claim("a", "it is better", True, "by 3"), Claim("b", "it is worse", False, "by 4")]
    assert withhold_verdicts(claims, "full") == claims
    assert {claim.verdict for claim in withhold_verdicts(claims, "smoke")} == {"not evaluated"}


def test_what_a_folder_holds_is_printed(tmp_path, capsys):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a.bin").write_bytes(bytes(2**20))
    (tmp_path / "index.html").write_text("")
    print_location(tmp_path / "index.html", tmp_path)
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}: 1.0 MiB in 2 files", str(tmp_path / "index.html")]


def test_too_little_memory_for_the_libraries_is_one_sentence():
    """With 600 MB of address space torch ends the process, by an exception of C++ or a segmentation fault."""
    done = run_shell(f"ulimit -v 600000 && {COMMAND} generate examples/cat.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "may use 0.6 GB of memory (ulimit -v); expected at least 1.5 GB" in done.stderr
