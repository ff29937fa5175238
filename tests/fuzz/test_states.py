"""A few seconds of tests/fuzz/fuzz_states.py, and a few kills of tests/fuzz/kill.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_states
import kill


@pytest.mark.parametrize("target", fuzz_states.TARGETS)
def test_mutated_files_are_read_or_refused_in_one_sentence(target):
    outcomes, findings = fuzz_states.fuzz(minutes=1 / 60, seed=1, targets=(target,))
    assert not findings, "\n".join(findings.values())
    assert outcomes[f"{target}: refused"]


@pytest.mark.slow
def test_killed_commands_end_with_the_same_result(capsys):
    assert kill.main(["--convert", "3", "--generate", "2", "--seed", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
