"""A few seconds of tests/fuzz/fuzz_options.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_options


def test_hostile_flags_and_files_are_accepted_or_refused_in_one_sentence():
    outcomes, findings = fuzz_options.fuzz(minutes=3 / 60, seed=1)
    assert not findings, "\n".join(findings.values())
    assert outcomes["refused"] and outcomes["accepted"]
