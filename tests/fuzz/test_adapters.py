"""Some rounds of tests/fuzz/fuzz_adapters.py for every kind of file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_adapters


@pytest.mark.parametrize("target", fuzz_adapters.TARGETS)
def test_mutated_files_are_read_or_refused_in_one_sentence(target):
    outcomes, findings = fuzz_adapters.fuzz(minutes=1, seed=1, targets=(target,), max_rounds=25)
    assert not findings, "\n".join(findings.values())
    assert outcomes[f"{target}: refused"]
